"""The two numbers of an exported folder, and folders that another version of Vitrail exported."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path

import pytest
import torch

import standin
import vitrail
from exported.make_golden import opened, served
from helpers import make, save
from vitrail.errors import CheckpointError, InputError
from vitrail.exported.format import RECORD
from vitrail.exported.head import MAGIC, UNNUMBERED, encode_record, read_head
from vitrail.plan.record import KERNEL_ABI, PLAN_GRAMMAR, string
from vitrail.tools import export
from vitrail.tools.export import export_model
from vitrail_kernels.launch import MISSING, interpreted

HEADER = Path(__file__).parents[2] / "csrc/numbers.hpp"
BLOCK = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_python_and_cpp_have_the_same_two_numbers() -> None:
    numbers = dict(re.findall(r"constexpr uint32_t (\w+) = (\d+);", HEADER.read_text()))
    assert numbers == {"kPlanGrammar": str(PLAN_GRAMMAR), "kKernelAbi": str(KERNEL_ABI)}


# -- the head alone --------------------------------------------------------------------------------


def signed(body: bytes, magic: bytes = MAGIC) -> bytes:
    return magic + hashlib.sha256(body).digest() + body


def test_a_head_that_is_written_is_read() -> None:
    version, reader = read_head(encode_record("7.8", string("the rest")), "here")
    assert (version, reader.string()) == ("7.8", b"the rest")


@pytest.mark.parametrize(
    ("grammar", "abi"),
    [(PLAN_GRAMMAR + 1, KERNEL_ABI), (PLAN_GRAMMAR, KERNEL_ABI + 1), (0, 2**32 - 1)],
)
def test_other_numbers_are_refused_naming_all_four(grammar: int, abi: int) -> None:
    """Whatever follows the head: another grammar may have another rest."""
    record = signed(struct.pack("<II", grammar, abi) + string("9.9") + b"another grammar")
    wanted = (
        f"here: got plan grammar {grammar} and kernel ABI {abi}, exported by Vitrail '9.9', wanted "
        f"plan grammar {PLAN_GRAMMAR} and kernel ABI {KERNEL_ABI}, which Vitrail "
        f"{vitrail.__version__} reads: export the checkpoint again with it, or load the folder"
    )
    with pytest.raises(CheckpointError, match=re.escape(wanted)):
        read_head(record, "here")


def test_a_head_from_before_the_two_numbers_is_refused_alike() -> None:
    record = signed(string("0.1.0.dev0") + string("{}"), UNNUMBERED)
    wanted = (
        "here: got plan grammar 2 and no kernel ABI, exported by Vitrail '0.1.0.dev0', wanted plan "
        f"grammar {PLAN_GRAMMAR} and kernel ABI {KERNEL_ABI}"
    )
    with pytest.raises(CheckpointError, match=wanted):
        read_head(record, "here")


@pytest.mark.parametrize("magic", [MAGIC, UNNUMBERED])
def test_damage_is_told_before_numbers(magic: bytes) -> None:
    record = bytearray(signed(struct.pack("<II", 9, 9) + string("9.9"), magic))
    record[-9] ^= 1
    with pytest.raises(CheckpointError, match="here: got bytes that do not match their digest"):
        read_head(bytes(record), "here")
    for body in (b"", b"\0" * 7, struct.pack("<II", 9, 9) + b"\xff" * 9):
        with pytest.raises(CheckpointError, match=r"here: got .* which end early"):
            read_head(signed(body, magic), "here")


# -- a folder of another version -------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(
    MISSING is not None or interpreted(), reason="export: needs triton's compiler"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uncompiled: None) -> Path:
    """An export by Vitrail 0.0.1, whose kernels are names alone."""
    save(make("ViTModel", **BLOCK, intermediate_size=64), tmp_path / "vit")
    with monkeypatch.context() as patch:
        patch.setattr(export, "__version__", "0.0.1")
        export_model(tmp_path / "vit", tmp_path / "out", [90])
    return tmp_path / "out"


@needs_compiler
def test_it_loads_and_its_record_stays_as_it_was_written(folder: Path) -> None:
    record, raw = opened(folder).record, (folder / RECORD).read_bytes()
    summary = json.loads((folder / "vitrail.json").read_text())
    assert record.version == summary["version"] == "0.0.1" != vitrail.__version__
    assert (summary["plan_grammar"], summary["kernel_abi"]) == (PLAN_GRAMMAR, KERNEL_ABI)
    assert record.encode() == raw
    head = struct.pack("<II", PLAN_GRAMMAR, KERNEL_ABI) + string("0.0.1")
    assert raw[len(MAGIC) + 32 :].startswith(head)


@needs_compiler
def test_its_fingerprint_is_its_own_where_its_kernels_compute(
    folder: Path, libcuda: standin.Standin
) -> None:
    """And this version's elsewhere: PyTorch's operators are not what was exported."""
    exported = opened(folder)
    stored = exported.record.builds[90].fingerprint
    model = served(exported, libcuda)
    assert model.fingerprint == stored
    elsewhere = vitrail.load(folder, device="cpu")
    this = vitrail.load(folder.parent / "vit", device="cpu", dtype="float16")
    assert elsewhere.fingerprint == this.fingerprint != stored


@needs_compiler
def test_it_computes_nothing_else_with_its_kernels(folder: Path, libcuda: standin.Standin) -> None:
    """Plans that this version would compile have other bits than the fingerprint's."""
    model = served(opened(folder), libcuda)
    for pixels in (torch.zeros(1, 3, 32, 48), torch.zeros(1, 3, 32, 32)):
        with pytest.raises(InputError) as caught:
            model.forward(pixels)
        message = str(caught.value)
        assert f"Vitrail 0.0.1 exported, and this Vitrail {vitrail.__version__} adds" in message
        assert "export the checkpoint again, or load it instead" in message
        assert "wanted what was exported: pooled embeddings of images of 32x32" in message
