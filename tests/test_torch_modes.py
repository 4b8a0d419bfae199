"""A forked process gets an error or the right numbers, never a hang."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from helpers import clip_folder

FORKED = """
import os, sys
import torch, vitrail

torch.set_num_threads(2)
model = vitrail.load(sys.argv[1])
pixels = torch.randn(6, 3, 32, 32)
expected = model.encode_image(pixels, batch_size=2)
child = os.fork()
if child == 0:
    torch.set_num_threads(int(sys.argv[2]))
    try:
        found = model.encode_image(pixels, batch_size=2)
        said = "equal" if torch.allclose(found, expected, atol=1e-5) else "other numbers"
    except vitrail.VitrailError as error:
        said = str(error)
    os.write(1, said.encode())
    os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.parametrize(
    ("threads", "said"), [(1, "equal"), (2, "do not survive a fork: call torch.set_num_threads(1)")]
)
def test_a_forked_process_is_told_or_served(tmp_path: Path, threads: int, said: str) -> None:
    clip_folder(tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED, str(tmp_path), str(threads)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert said in done.stdout
