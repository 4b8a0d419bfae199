"""The golden folder: an export of the present numbers, kept to notice a change of its meaning.

    make golden-export

writes ``golden/clip.tar.xz``, a small exported folder, and ``golden/expected.json``, the facts that
`test_golden.py` and `tests/csrc/test_library.py` compare. It refuses to while ``PLAN_GRAMMAR`` and
``KERNEL_ABI`` are those of the folder that is there: CONTRIBUTING.md ("The two numbers") says why.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import export_folder
import standin
import vitrail
from vitrail.exported.folder import ExportFolder, open_exported
from vitrail.model.model import Model
from vitrail.plan.record import KERNEL_ABI, PLAN_GRAMMAR
from vitrail.runtime.native import NativeRunner
from vitrail.text.tokens import TokenIds
from vitrail.tools import export

GOLDEN = Path(__file__).parent / "golden"
ARCHIVE, EXPECTED = GOLDEN / "clip.tar.xz", GOLDEN / "expected.json"
PICTURE = (np.arange(50 * 70 * 3).reshape(50, 70, 3) * 7919 >> 7 & 255).astype(np.uint8)
VERSION = "0.0.0"
"""The folder is of another version than any, so nothing is compiled besides what it holds."""
TEXTS = ["a cat", "The red mat near the window, at night.", "blue"]
PIXELS = (np.arange(3 * 32 * 32 * 3).reshape(3, 32, 32, 3) * 31 % 251).astype(np.uint8)
IDS = [[1, 5, 9, 2], [1, 2], [1, *range(3, 20), 2]]


def expected() -> dict[str, Any]:
    """The committed facts."""
    facts: dict[str, Any] = json.loads(EXPECTED.read_text())
    return facts


def unpack(folder: Path) -> Path:
    """The golden folder, unpacked into ``folder``."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "clip"


def opened(folder: Path) -> ExportFolder:
    exported = open_exported(folder)
    assert exported is not None, f"{folder}: got no exported folder"
    return exported


def served(exported: ExportFolder, driver: standin.Standin) -> Model:
    """The model of the folder, by the native runner on the stand-in."""
    weights, cpu = exported.load(), torch.device("cpu")
    runner = NativeRunner(weights, exported.dtype, cpu, str(driver.path), exported)
    weights_hash = exported.record.weights_hash
    return Model(exported.checkpoint(), exported.spec, lambda: weights_hash, runner)


def answers(folder: Path) -> dict[str, Any]:
    """The numbers around and after the plans, by PyTorch on the CPU."""
    model = vitrail.load(folder, device="cpu")
    pixels = model.preprocess(PICTURE)
    return {
        "pixels": hashlib.sha256(pixels.numpy().tobytes()).hexdigest(),
        "ids": model.tokenize(TEXTS).tolist(),
        "image": _rounded(model.encode_image(PICTURE)),
        "texts": _rounded(model.encode_text(TEXTS)),
    }


def _rounded(rows: torch.Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in rows.tolist()]


def launches(folder: Path, driver: standin.Standin) -> dict[str, str]:
    """The fingerprint, and a digest of the launches of each plan, through ``vitrail._C``."""
    model = served(opened(folder), driver)
    images, texts = model._image_encoder("").tower, model._text_encoder("").tower
    floats = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).contiguous().float() / 64 - 2
    calls = {
        "uint8": lambda: images.embeddings(torch.from_numpy(PIXELS)),
        "float": lambda: images.embeddings(floats),
        "text": lambda: texts.embeddings(TokenIds.of(IDS)),
    }
    facts = {"fingerprint": model.fingerprint}
    empty = torch.empty

    def fresh(*shape: Any, **options: Any) -> torch.Tensor:
        """New memory as the stand-in gives it: a launch's digest is of what it writes to, too."""
        memory = empty(*shape, **options)
        memory.view(-1).view(torch.uint8).fill_(0xA5)
        return memory

    try:
        torch.empty = fresh
        for name, call in calls.items():
            driver.reset()
            driver.record(True)
            call()
            assert driver.complaint() == ""
            facts[name] = digest(driver.launched())
            driver.reset()
    finally:
        torch.empty = empty
        driver.record(False)
    return facts


def digest(launched: Sequence[standin.Launch]) -> str:
    """Of what was launched, in order: kernels, grids, and what the parameters point to.

    The last two launches have pointers to the caller's outputs, which Python and C++ prepare
    differently.
    """
    assert len(launched) > 10, f"got {len(launched)} launches"
    content = [(x.name, x.grid, x.block, x.shared, x.pdl) for x in launched]
    pointed = [x.digest for x in launched[:-2]]
    return hashlib.sha256(repr((content, pointed)).encode()).hexdigest()


def main() -> None:
    numbers = [PLAN_GRAMMAR, KERNEL_ABI]
    if EXPECTED.exists() and expected()["numbers"] == numbers:
        sys.exit(
            f"got the numbers {numbers} of the folder that is there, wanted another PLAN_GRAMMAR "
            "or KERNEL_ABI: see CONTRIBUTING.md, The two numbers"
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "clip")
        export.__version__ = VERSION
        export_folder.export_clip(folder)
        GOLDEN.mkdir(exist_ok=True)
        with tarfile.open(ARCHIVE, "w:xz", preset=9) as archive:
            archive.add(folder, "clip", filter=_plain)
        driver = standin.own(Path(temporary))
        facts = {
            "numbers": numbers,
            "archive": hashlib.sha256(ARCHIVE.read_bytes()).hexdigest(),
            "answers": answers(folder),
            "launches": launches(folder, driver),
        }
    EXPECTED.write_text(json.dumps(facts) + "\n")


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    main()
