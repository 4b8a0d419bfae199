"""Programs that fork, run in an interpreter of their own: pytest's own process must not fork."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

SECONDS = 60
"""A program that takes longer hangs: it and its children are killed, and the test fails."""

PRELUDE = '''
import os, sys, threading
import numpy as np, torch, vitrail
from vitrail.demo.demo import bundled

torch.set_num_threads(2)


def rows(model):
    """Numbers of every kind of call that computes, as bytes."""
    pixels = np.random.default_rng(5).integers(0, 256, (24, 64, 48, 3), np.uint8)
    texts = [f"a photo of {n} things" for n in range(200)]
    scores = model.classify(pixels, ["red", "blue"], ["a {} thing", "one {}"])
    tensors = (
        model.encode_image(pixels, batch_size=8),
        model.encode_text(texts),
        scores.probs,
        model.preprocess(pixels),
        model.forward(pixel_values=model.preprocess(pixels[:4])).image_embeds,
    )
    return b"".join(tensor.numpy().tobytes() for tensor in tensors)


def in_fork(function):
    """What function() returns in a fork of this process: bytes, or the error as text."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = function()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}".encode()
        with os.fdopen(sender, "wb") as pipe:
            pipe.write(said)
        os._exit(0)
    os.close(sender)
    with os.fdopen(receiver, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


def error_of(function):
    """The error that function() raises, as bytes for in_fork."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}".encode()
    return b"no error"


def same(got, wanted, name):
    assert got == wanted, (name, len(got), got[:300])
'''


def environment(*folders: Path) -> dict[str, str]:
    """This process's variables and import paths, with ``folders`` before them. OpenMP threads wait
    asleep: beside other tests, waiting threads that spin take the cores of those that compute."""
    path = os.pathsep.join([*map(str, folders), *sys.path])
    return {**os.environ, "PYTHONPATH": path, "OMP_WAIT_POLICY": "passive"}


def run_program(code: str, folder: Path, *arguments: str, prelude: str = PRELUDE) -> str:
    """The output of ``prelude`` + ``code``. Raises AssertionError if it fails or hangs."""
    file = folder / "program.py"
    file.write_text(prelude + code)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(file), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        start_new_session=True,  # its children are killed with it
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"no end after {SECONDS} s: {output}") from None
    assert process.returncode == 0, output
    return output
