"""docs/production.md: its programs and commands run as they stand, and the tests that it names
exist."""

from __future__ import annotations

import ast
import functools
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

import hub_cache
import vitrail
from helpers import clip_folder
from hub_cache import PHOTOS, ROOT

PAGE = (ROOT / "docs/production.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.M | re.S)
PROGRAMS = {
    text.partition("\n")[0].removeprefix("# "): text for kind, text in BLOCKS if kind == "python"
}
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
SERVICE = "service.py"
SAYS = {
    "threads.py": r"2 torch\.Size\(\[1, \d+\]\)",
    "prefork.py": r"\[\(1, \d+\), \(1, \d+\)\]",
    "save.py": "",
    "serve.py": r"torch\.Size\(\[1, \d+\]\)",
    "loader.py": r"torch\.Size\(\[2, \d+\]\)",
    "memory.py": rf"100 {256 << 20} True 0",
    "replicas.py": r"torch\.Size\(\[2, \d+\]\)",
}
MODEL = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
GUARD = 60  # seconds: a hang is a failure


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder with photos and the page's programs; an environment whose cache has the model."""
    folder = tmp_path_factory.mktemp("desk")
    environment = hub_cache.desk(folder)
    clip_folder(hub_cache.snapshot(folder / "hub", MODEL))
    for name, text in PROGRAMS.items():
        (folder / name).write_text(text)
    return folder, environment


def run(words: list[str], desk: tuple[Path, dict[str, str]]) -> subprocess.CompletedProcess[str]:
    folder, environment = desk
    return subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=GUARD
    )


def test_every_program_and_command_of_the_page_is_run_here() -> None:
    assert set(PROGRAMS) == {*SAYS, SERVICE}
    assert {line.split()[0] for line in COMMANDS} == {"gunicorn", "torchrun", "vitrail"}


@pytest.mark.slow
def test_programs_run_as_they_stand(desk: tuple[Path, dict[str, str]]) -> None:
    for name, pattern in SAYS.items():
        done = run([sys.executable, name], desk)
        assert done.returncode == 0, f"{name}: {done.stderr}"
        assert re.fullmatch(pattern, done.stdout.strip()), f"{name}: {done.stdout}"


@pytest.mark.slow
def test_commands_run_as_they_stand(desk: tuple[Path, dict[str, str]]) -> None:
    folder, outs = desk[0], set()
    for line in COMMANDS:
        if not line.startswith("gunicorn"):
            done = run(["bash", "-c", line], desk)
            assert done.returncode == 0, f"{line}: {done.stderr}"
            words = shlex.split(line)
            outs.add(words[words.index("--out") + 1])
    assert len(outs) > 1
    for out in outs:
        found = vitrail.read_embeddings(folder / out)
        assert len(found.paths) == len(list(PHOTOS.iterdir()))


def test_the_service_answers_with_the_bits_of_the_model(desk: tuple[Path, dict[str, str]]) -> None:
    pytest.importorskip("gunicorn")
    folder, environment = desk
    (line,) = [line for line in COMMANDS if line.startswith("gunicorn")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = shlex.split(line)
    words[words.index("--bind") + 1] = address
    photo = PHOTOS / "cat.jpg"
    server = subprocess.Popen(
        words, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        answers = [ask(address, photo.read_bytes()) for _ in range(4)]
        with pytest.raises(urllib.request.HTTPError, match="400"):
            ask(address, b"no picture")
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            _, log = server.communicate(timeout=GUARD)
        finally:
            server.kill()
    assert b"Traceback" not in log, log
    snapshot = next((folder / "hub").rglob("snapshots/*"))
    model = vitrail.load(snapshot, device="cpu")
    assert set(answers) == {model.encode_image(photo, normalize=True).numpy().tobytes()}
    assert np.isfinite(np.frombuffer(answers[0], np.float32)).all()


def ask(address: str, body: bytes) -> bytes:
    """The answer of the service, once it serves."""
    deadline = time.monotonic() + GUARD
    while True:
        request = urllib.request.Request(f"http://{address}", body)
        try:
            with urllib.request.urlopen(request, timeout=GUARD) as answer:
                content: bytes = answer.read()
                return content
        except (ConnectionError, urllib.error.URLError) as error:
            if isinstance(error, urllib.error.HTTPError) or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@functools.cache
def functions_of(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


HELD = re.findall(r"`(tests/[^`]*?)::(\w+)`", PAGE)


def test_promises_name_tests() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "| what |" not in line]
    promises = [row for row in rows if "::test_" in row]
    assert len(promises) > 20
    assert len(promises) <= len(HELD)
    tables = [block for block in PAGE.split("\n\n") if block.startswith("| promised |")]
    assert sum(len(table.splitlines()) - 2 for table in tables) == len(promises)


@pytest.mark.parametrize(("file", "name"), HELD)
def test_the_test_of_a_promise_exists(file: str, name: str) -> None:
    assert name in functions_of(ROOT / file)


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", PAGE))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / "docs" / link).exists()
