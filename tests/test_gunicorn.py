"""A real gunicorn that loads before it forks: its workers give the bits of their parent and share
its memory."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from forked import PRELUDE, SECONDS, environment
from helpers import clip_folder

pytest.importorskip("gunicorn")
pytestmark = pytest.mark.slow

APP = """
import hashlib, json


def digest():
    return hashlib.sha256(rows(model)).hexdigest()


def memory():
    # kB of this process, and of them its own kB of the weights
    words = [line.split() for line in open("/proc/self/smaps_rollup")]
    kb = {line[0].rstrip(":"): int(line[1]) for line in words if line[-1] == "kB"}
    address, inside, own = model._runner.weights.arena.data_ptr(), False, 0
    for line in open("/proc/self/smaps"):
        name, *values = line.split()
        if "-" in name and not name.endswith(":"):
            start, end = (int(word, 16) for word in name.split("-"))
            inside = start <= address < end
            size = end - start
        elif inside and name.startswith("Private_"):
            own += int(values[0])
        elif inside and name == "Size:":
            kb["Mapping"] = int(values[0])
    return {"rss": kb["Rss"], "pss": kb["Pss"], "mapping": kb["Mapping"], "own": own}


model = vitrail.load(os.environ["MODEL"], device="cpu")
parent = os.getpid(), (digest() if os.environ["BEFORE"] == "used" else "")


def app(environ, start_response):
    got = {"process": os.getpid(), "thread": threading.current_thread().name, "parent": parent}
    got["rows"] = digest()
    got |= {"threads": torch.get_num_threads(), "weights": model.weight_bytes}
    if environ["PATH_INFO"] == "/memory":
        got |= memory()
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(got).encode()]
"""


def _ask(address: str, path: str = "/") -> dict[str, Any]:
    connection = http.client.HTTPConnection("localhost", timeout=SECONDS)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.settimeout(SECONDS)
    connection.sock.connect(address)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    assert response.status == 200, body
    said: dict[str, Any] = json.loads(body)
    return said


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 77 MB of weights, so that it matters whether workers share them."""
    folder = tmp_path_factory.mktemp("clip")
    layers = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    clip_folder(folder, vision={**layers, "num_hidden_layers": 6})
    return folder


@contextmanager
def _served(folder: Path, model: Path, *options: str, before: str) -> Iterator[tuple[int, str]]:
    """The master's process and the socket of a gunicorn with two workers."""
    (folder / "app.py").write_text(PRELUDE + APP)
    short = tempfile.mkdtemp()  # the path of a socket has at most 107 bytes
    address = f"{short}/socket"
    log = folder / "log"
    command = [sys.executable, "-W", "ignore", "-m", "gunicorn", "--preload", "--workers", "2"]
    command += ["--bind", f"unix:{address}", "--timeout", str(SECONDS), *options, "app:app"]
    with log.open("w") as output:
        master = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            cwd=folder,
            env={**environment(folder), "MODEL": str(model), "BEFORE": before},
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + SECONDS
        while not os.path.exists(address):
            assert master.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield master.pid, address
        master.terminate()
        assert master.wait(SECONDS) == 0, log.read_text()
    except BaseException:
        print(log.read_text())
        raise
    finally:
        if master.poll() is None:
            os.killpg(master.pid, signal.SIGKILL)
            master.wait()
        shutil.rmtree(short)


@pytest.mark.parametrize("before", ["used", "unused"])
@pytest.mark.parametrize("options", [(), ("--threads", "4")], ids=["sync", "threads"])
def test_gunicorn_with_preload(
    tmp_path: Path, clip: Path, options: tuple[str, ...], before: str
) -> None:
    with _served(tmp_path, clip, *options, before=before) as (master, address):
        said: list[dict[str, Any]] = []
        with ThreadPoolExecutor(8) as clients:
            while len({answer["process"] for answer in said}) < 2 and len(said) < 160:
                said += clients.map(lambda _: _ask(address, "/memory"), range(16))
    workers = {answer["process"] for answer in said}
    assert len(workers) == 2
    assert master not in workers
    assert {answer["parent"][0] for answer in said} == {master}
    assert {answer["threads"] for answer in said} == {2}
    main = {answer["thread"] == "MainThread" for answer in said}
    assert main == {not options}
    assert len({answer["rows"] for answer in said}) == 1
    if before == "used":
        assert said[0]["rows"] == said[0]["parent"][1]
    for answer in said:
        assert answer["pss"] < answer["rss"] / 2, answer
        assert answer["mapping"] * 1024 >= answer["weights"]
        # the mapping also holds a few buffers beside the weights
        assert answer["own"] * 1024 < answer["weights"] / 2, answer
    print({key: said[-1][key] for key in ("rss", "pss", "own", "weights")})


def test_gunicorn_replaces_a_killed_worker(tmp_path: Path, clip: Path) -> None:
    with _served(tmp_path, clip, before="used") as (_, address):
        first = _ask(address)
        os.kill(first["process"], signal.SIGKILL)
        said = [_ask_again(address) for _ in range(6)]
    assert {answer["rows"] for answer in said} == {first["parent"][1]}
    assert first["process"] not in {answer["process"] for answer in said}


def _ask_again(address: str) -> dict[str, Any]:
    """A request that the killed worker had accepted is lost with it."""
    for _ in range(20):
        try:
            return _ask(address)
        except (ConnectionError, http.client.HTTPException):
            time.sleep(0.1)
    return _ask(address)
