"""A desk of images to embed, and a process whose jobs die when told to (tests/crash_job.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from helpers import clip_folder
from jobs.processes import GUARD

ROOT = Path(__file__).parents[2]
IMPORTS = os.pathsep.join(str(ROOT / name) for name in ("engine", "kernels"))
BAD = 3
"""The last digit of the numbers of images that `make_desk` harms."""

Ask = Callable[..., dict[str, Any]]


def cut_short(path: Path, number: int) -> None:
    path.write_bytes(path.read_bytes()[:300])


def make_desk(
    folder: Path, count: int, harm: Callable[[Path, int], None] = cut_short, step: int = 0
) -> list[str]:
    """The paths of ``count`` small images in ``folder``/images, beside a small CLIP and the file
    "list" of the paths. Each is ``step`` pixels wider than the image before. ``harm`` (path,
    number) spoils every tenth image."""
    clip_folder(folder / "clip", size=32)
    (folder / "images").mkdir()
    dice = np.random.default_rng(0)
    names = []
    for number in range(count):
        path = folder / "images" / f"{number:04}.jpg"
        names.append(str(path))
        pixels = dice.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40 + step * number, 36)).save(path)
        if number % 10 == BAD:
            harm(path, number)
    (folder / "list").write_text("\n".join(names))
    return names


@contextmanager
def crash_server(stderr: int | None = None, **defaults: Any) -> Iterator[Ask]:
    """Sends requests to tests/crash_job.py and gives its answers; ``defaults``: of each request."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "crash_job.py")],
        env={**os.environ, "PYTHONPATH": IMPORTS, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    stdin, stdout = process.stdin, process.stdout

    def ask(out: Path, **request: Any) -> dict[str, Any]:
        print(json.dumps(defaults | {"out": str(out)} | request), file=stdin, flush=True)
        answer: dict[str, Any] = json.loads(stdout.readline())
        return answer

    yield ask
    stdin.close()
    process.wait(timeout=GUARD)
