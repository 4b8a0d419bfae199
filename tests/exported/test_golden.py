"""An exported folder of the present numbers means what it meant when it was written.

If a test here fails, either the change was a mistake, or a number has to be raised: see "The two
numbers" in CONTRIBUTING.md.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

import standin
from exported import make_golden
from exported.make_golden import ARCHIVE, answers, expected, launches, opened, unpack
from vitrail.plan.record import KERNEL_ABI, PLAN_GRAMMAR

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("golden"))


def test_the_folder_is_of_the_present_numbers_and_as_it_was_committed(golden: Path) -> None:
    assert expected()["numbers"] == [PLAN_GRAMMAR, KERNEL_ABI]
    assert hashlib.sha256(ARCHIVE.read_bytes()).hexdigest() == expected()["archive"]
    raw = (golden / "model.vitrail").read_bytes()
    record = opened(golden).record
    assert record.encode() == raw
    assert record.version == make_golden.VERSION


def test_its_pixels_ids_and_embeddings_are_as_they_were(golden: Path) -> None:
    found, wanted = answers(golden), expected()["answers"]
    assert found["pixels"] == wanted["pixels"]
    assert found["ids"] == wanted["ids"]
    for name in ("image", "texts"):  # in float16, whose sums another PyTorch may round differently
        ours, theirs = np.array(found[name]), np.array(wanted[name])
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() < 0.005 * np.abs(theirs).max()


def test_its_plans_launch_as_they_did(golden: Path, libcuda: standin.Standin) -> None:
    libcuda.device(9, 0, 132)
    assert launches(golden, libcuda) == expected()["launches"]


def test_it_is_not_written_again_under_the_same_numbers() -> None:
    with pytest.raises(SystemExit, match="wanted another PLAN_GRAMMAR or KERNEL_ABI"):
        make_golden.main()
