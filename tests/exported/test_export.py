"""`vitrail export`: the folder says what the model said, bit for bit, and damage is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import ViTImageProcessorPil
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from typer.testing import CliRunner

import standin
import vitrail
from exported.make_golden import opened
from helpers import clip_folder, make, save
from vitrail import runtime as runners
from vitrail.checkpoint.files import open_checkpoint
from vitrail.cli import app
from vitrail.demo.demo import bundled
from vitrail.durable import write_file
from vitrail.errors import CheckpointError, InputError, VitrailError
from vitrail.exported.contents import COPIED, exported_plans, pixel_batch
from vitrail.exported.folder import ExportFolder
from vitrail.model import loading
from vitrail.model.loading import read_model
from vitrail.model.model import Model
from vitrail.plan.kernel_binary import compile_binary
from vitrail.plan.lowering import lower
from vitrail.plan.record import KERNEL_ABI, PLAN_GRAMMAR
from vitrail.runtime import native
from vitrail.runtime.native import NativeRunner
from vitrail.runtime.torch_runner import TorchRunner
from vitrail.text.tokens import TokenIds
from vitrail.tools import export, verify
from vitrail.tools.export import export_model
from vitrail_kernels.launch import MISSING, Target, interpreted

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        MISSING is not None or interpreted(), reason="export: needs triton's compiler"
    ),
]

PHOTOS = sorted((Path(vitrail.__file__).parent / "assets/photos").iterdir())
TEXTS = ["a cat", "The red mat near the window, at night.", "blue"]
BLOCK: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
VIT = {**BLOCK, "id2label": {i: f"label {i}" for i in range(5)}}
DINOV2 = {
    **{key: value for key, value in BLOCK.items() if key != "intermediate_size"},
    "mlp_ratio": 1,
    "num_register_tokens": 3,
}
HEADS: dict[str, dict[str, Any]] = {
    "ViTForImageClassification": VIT,
    "Dinov2WithRegistersForImageClassification": {**DINOV2, "id2label": VIT["id2label"]},
}
TEXT_KEYS = (
    "vocab_size",
    "max_position_embeddings",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
)
CPU = torch.device("cpu")
KINDS: Any = ("scale", "clip")
Listing = Callable[[list[tuple[str, int, bytes]]], list[tuple[str, int, bytes]]]
BUILD = {"runner": "x", "fingerprint": "x"}
MAGIC = {
    kind: f"vitrail {kind} {PLAN_GRAMMAR}.{KERNEL_ABI}\n".encode() for kind in ("plan", "kernel")
}
MAGIC["export"] = b"vitrail export\n"
BODY = len(MAGIC["export"]) + 32  # after the digest
RECORD = "model.vitrail"


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP checkpoint, small as kernels go."""
    folder = tmp_path_factory.mktemp("checkpoint") / "clip"
    model, _ = clip_folder(folder)  # for the tokenizer's sizes
    text = {key: getattr(model.config.text_config, key) for key in TEXT_KEYS}
    shutil.rmtree(folder)
    clip_folder(folder, vision=BLOCK, text={**text, **BLOCK})
    return folder


@pytest.fixture(scope="session")
def whole(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its export for sm_90, with every kernel compiled. Not to be changed."""
    folder = tmp_path_factory.mktemp("export") / "out"
    export_model(clip, folder, [90])
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """One that may be changed."""
    return shutil.copytree(whole, tmp_path / "copy")


def save_classifier(architecture: str, folder: Path) -> None:
    save(make(architecture, **HEADS[architecture]), folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def both(checkpoint: Path, folder: Path, dtype: str = "float16") -> tuple[Model, Model]:
    loaded = vitrail.load(folder, device="cpu")
    assert (loaded.backend, loaded.source) == ("torch", str(folder))
    assert loaded.dtype == getattr(torch, dtype)
    return loaded, vitrail.load(checkpoint, device="cpu", dtype=dtype)


# -- it is the model -------------------------------------------------------------------------------


def test_a_clip_gives_the_bits_that_its_checkpoint_gives(clip: Path, whole: Path) -> None:
    ours, wanted = both(clip, whole)
    assert ours.fingerprint == wanted.fingerprint
    assert ours.spec == wanted.spec
    assert ours.weight_bytes == wanted.weight_bytes
    assert same(ours.encode_image(PHOTOS), wanted.encode_image(PHOTOS))
    assert same(
        ours.encode_image(PHOTOS, size=(40, 24)), wanted.encode_image(PHOTOS, size=(40, 24))
    )
    pixels = wanted.preprocess(PHOTOS)
    assert same(ours.preprocess(PHOTOS), pixels)
    assert same(ours.encode_image(pixels), wanted.encode_image(pixels))
    assert same(ours.encode_text(TEXTS), wanted.encode_text(TEXTS))
    found = (model.classify(PHOTOS, labels=["cat", "red mat"]).logits for model in (ours, wanted))
    assert same(*found)


def test_the_fingerprint_follows_the_options_of_loading_too(clip: Path, whole: Path) -> None:
    prints = [vitrail.load(whole, device="cpu", sixteen_bit=kind).fingerprint for kind in KINDS]
    assert len(set(prints)) == 2
    clipped = vitrail.load(clip, device="cpu", dtype="float16", sixteen_bit="clip")
    assert clipped.fingerprint == prints[1]


@pytest.mark.usefixtures("uncompiled")
def test_a_dinov2_with_registers_gives_the_bits_of_its_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "dinov2"
    save(make("Dinov2WithRegistersModel", **DINOV2), checkpoint)
    BitImageProcessorPil(size={"shortest_edge": 56}, crop_size=48).save_pretrained(checkpoint)
    export_model(checkpoint, tmp_path / "out", [90], dtype="bfloat16")
    ours, wanted = both(checkpoint, tmp_path / "out", "bfloat16")
    assert ours.fingerprint == wanted.fingerprint
    assert same(ours.encode_image(PHOTOS), wanted.encode_image(PHOTOS))
    pixels = wanted.preprocess(PHOTOS)
    for one, other in zip(
        ours.get_intermediate_layers(pixels), wanted.get_intermediate_layers(pixels), strict=True
    ):
        assert same(one, other)
    found = opened(tmp_path / "out")
    assert found.size == (48, 48), "wanted what the processor makes, not the checkpoint's 32x32"
    assert found.extent == "pooled embeddings of images of 48x48"


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("architecture", HEADS)
def test_a_classifier_keeps_its_head_and_its_labels(architecture: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    save_classifier(architecture, checkpoint)
    export_model(checkpoint, tmp_path / "out", [80, 90])
    ours, wanted = both(checkpoint, tmp_path / "out")
    assert ours.fingerprint == wanted.fingerprint
    assert same(ours.encode_image(PHOTOS), wanted.encode_image(PHOTOS))
    one, other = ours.classify(PHOTOS), wanted.classify(PHOTOS)
    assert one.labels == other.labels == tuple(VIT["id2label"].values())
    assert same(one.logits, other.logits)
    found = opened(tmp_path / "out")
    assert list(found.builds) == [80, 90]
    assert found.extent == "pooled embeddings and class scores of images of 32x32"
    record = record_of(tmp_path / "out")
    assert (tuple(record.labels), record.scores) == (one.labels, "softmax")
    for _, _, programs, _ in record.builds:
        assert len(programs) == 4
        for kind in ("float", "uint8"):
            assert programs[f"scores.{kind}"][1] == programs[f"image.{kind}"][1], "one table"


@pytest.mark.usefixtures("uncompiled")
def test_without_a_processor_pixels_come_as_floats(tmp_path: Path) -> None:
    save(make("ViTModel", **BLOCK), tmp_path / "vit")
    export_model(tmp_path / "vit", tmp_path / "out", [90], size=(24, 40))
    ours, wanted = both(tmp_path / "vit", tmp_path / "out")
    pixels = torch.randn(3, 3, 24, 40)
    assert same(ours.encode_image(pixels), wanted.encode_image(pixels))
    plan_files = [path.name for path in (tmp_path / "out").rglob("*.plan")]
    assert plan_files == ["image.float.plan"]
    with pytest.raises(CheckpointError, match="preprocessor_config"):
        ours.encode_image(PHOTOS)


@pytest.mark.usefixtures("uncompiled")
def test_the_bundled_model_answers_as_ever(tmp_path: Path) -> None:
    export_model(bundled(), tmp_path / "out", [90])
    ours, wanted = both(bundled(), tmp_path / "out")
    assert ours.fingerprint == wanted.fingerprint
    assert same(ours.encode_image(PHOTOS), wanted.encode_image(PHOTOS))
    texts = ["a red circle", "two blue squares"]
    assert same(ours.encode_text(texts), wanted.encode_text(texts))


# -- what is in it, by a reader of its own ---------------------------------------------------------


class Record:
    """model.vitrail, read by the format's description alone."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 0
        assert self.take(len(MAGIC["export"])) == MAGIC["export"]
        assert self.take(32) == hashlib.sha256(raw[BODY:]).digest()
        self.numbers_of_format = self.numbers("<II")
        self.version, self.summary = self.string(), self.string()
        start = self.at
        self.files = [
            (self.string(), *self.numbers("<Q"), self.take(32)) for _ in range(*self.numbers("<I"))
        ]
        self.listing = raw[start : self.at]
        self.weights, self.offset, self.arena, self.packed = self.numbers("<IQQQ")
        self.vision, self.labels, self.scores = None, [], ""
        if self.take(1) == b"\1":
            self.vision = self.numbers("<5I")
            self.labels = [self.string() for _ in range(*self.numbers("<I"))]
            self.scores = self.string()
        self.text = self.numbers("<IIIi") if self.take(1) == b"\1" else None
        self.builds = [self.build() for _ in range(*self.numbers("<I"))]
        assert self.at == len(raw)

    def build(self) -> tuple[int, str, dict[str, tuple[int, int]], list[int]]:
        (arch,), fingerprint = self.numbers("<I"), self.string()
        plans = {self.string(): self.numbers("<Iq") for _ in range(*self.numbers("<I"))}
        kernels = [self.numbers("<I")[0] for _ in range(*self.numbers("<I"))]
        return arch, fingerprint, plans, kernels

    def take(self, count: int) -> bytes:
        self.at += count
        assert self.at <= len(self.raw)
        return self.raw[self.at - count : self.at]

    def numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def string(self) -> str:
        return self.take(*self.numbers("<Q")).decode()


def sized(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def signed(body: bytes) -> bytes:
    return MAGIC["export"] + hashlib.sha256(body).digest() + body


def record_of(folder: Path) -> Record:
    return Record((folder / RECORD).read_bytes())


def plain_digest(raw: bytes) -> str:
    chunks = [raw[at : at + (4 << 20)] for at in range(0, len(raw), 4 << 20)]
    return hashlib.sha256(b"".join(hashlib.sha256(one).digest() for one in chunks)).hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_the_record_knows_every_other_file(clip: Path, whole: Path) -> None:
    files, record = contents(whole), record_of(whole)
    assert files["vitrail.json"].decode() == record.summary
    assert json.loads(record.summary)["source"] == clip.name
    assert {name: (nbytes, digest.hex()) for name, nbytes, digest in record.files} == {
        name: (len(raw), plain_digest(raw))
        for name, raw in files.items()
        if name not in ("vitrail.json", RECORD)
    }
    import triton

    here = (str(clip.parent), str(Path(vitrail.__file__).parent), str(Path(triton.__file__).parent))
    for name, raw in files.items():
        assert not any(place.encode() in raw for place in here), name
    for name in COPIED:
        if (clip / name).exists():
            assert files[name] == (clip / name).read_bytes()
    assert {"tokenizer.json", "processor_config.json"} <= files.keys()


def test_the_record_says_for_cpp_what_the_summary_says(whole: Path) -> None:
    files, model, record = contents(whole), vitrail.load(whole, device="cpu"), record_of(whole)
    summary = json.loads(record.summary)
    assert record.version == summary["version"] == vitrail.__version__
    assert record.numbers_of_format == (summary["plan_grammar"], summary["kernel_abi"])
    assert record.numbers_of_format == (PLAN_GRAMMAR, KERNEL_ABI)
    names = [name for name, _, _ in record.files]
    spec = model.spec
    assert spec.vision is not None
    assert spec.text is not None
    tokens = spec.vision.tokens_at((32, 32))
    assert record.vision == (32, 32, 3, spec.vision.embedding, tokens)
    assert (record.labels, record.scores) == ([], "")
    eos = spec.text.eos
    assert record.text == (spec.text.vocab, spec.text.context, spec.text.embedding, eos)
    [(arch, fingerprint, plans, kernels)] = record.builds
    assert arch == 90
    assert fingerprint == summary["builds"]["90"]["fingerprint"]
    assert {name: names[number] for name, (number, _) in plans.items()} == {
        name: f"sm_90/{name}.plan" for name in ("image.uint8", "image.float", "text")
    }
    keys = {names[number].removesuffix(".kernel").removeprefix("sm_90/") for number in kernels}
    launched = set()
    for number, _ in plans.values():
        raw = files[names[number]]
        assert raw.startswith(MAGIC["plan"])
        launched |= {key.decode() for key in re.findall(rb"[0-9a-f]{64}", raw)}
    assert keys == launched
    for number in kernels:
        raw = files[names[number]].removeprefix(MAGIC["kernel"])
        assert f"sm_90/{raw[8:72].decode()}.kernel" == names[number]


def test_the_arena_is_the_packed_weights_and_then_the_tables(clip: Path, whole: Path) -> None:
    record, raw = record_of(whole), contents(whole)
    file = raw[record.files[record.weights][0]]
    arena = file[record.offset :]
    assert record.offset % 256 == 0
    assert load_file(whole / "weights.safetensors")["arena"].numpy().tobytes() == arena
    assert len(arena) == record.arena
    found = read_model(clip, torch.float16)
    assert arena[: record.packed] == found.weights.arena.numpy().tobytes()
    vision = found.spec.vision
    assert vision is not None
    reference = TorchRunner(found.weights, torch.float16, torch.device("cpu"))
    [(_, _, programs, _)] = record.builds
    assert programs["text"][1] == -1
    for kind in ("uint8", "float"):
        at = programs[f"image.{kind}"][1]
        table = reference.position_table(vision, vision.grid, kind)
        assert at % 256 == 0
        assert arena[at : at + table.numel() * 4] == table.numpy().tobytes()


@pytest.mark.usefixtures("uncompiled")
def test_tables_are_those_of_the_size(tmp_path: Path) -> None:
    save(make("Dinov2WithRegistersModel", **DINOV2), tmp_path / "dinov2")
    export_model(tmp_path / "dinov2", tmp_path / "out", [90], size=(48, 24))
    found = opened(tmp_path / "out")
    weights, vision = found.load(), found.spec.vision
    assert vision is not None
    reference = TorchRunner(weights, torch.float16, torch.device("cpu"))
    assert found.tables.keys() == {"float"}
    assert same(found.tables["float"], reference.position_table(vision, (6, 3), "float"))


def test_exporting_again_gives_the_same_bytes(clip: Path, whole: Path, tmp_path: Path) -> None:
    export_model(clip, tmp_path / "again", [90])
    assert contents(tmp_path / "again") == contents(whole)


def test_a_plan_is_what_lowering_gives_and_an_image_what_compiling_alone_gives(
    clip: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read_model(clip, torch.float16)
    assert found.spec.vision is not None
    for name, plan in exported_plans(found.spec).items():
        kind = name.partition(".")[2]
        pixels = pixel_batch(found.spec.vision, kind, (32, 32)) if kind else None
        program = lower(plan, Target(90, 132), torch.float16, found.weights, pixels)
        assert (whole / f"sm_90/{name}.plan").read_bytes() == program.record
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")
    for key, call in list(program.calls.items())[:2]:
        assert (whole / f"sm_90/{key}.kernel").read_bytes() == compile_binary(key, call, 90)


# -- it starts without triton ----------------------------------------------------------------------


@pytest.fixture
def driver(libcuda: standin.Standin, monkeypatch: pytest.MonkeyPatch) -> standin.Standin:
    """The stand-in, where the Triton runner could serve."""
    monkeypatch.setattr(runners.TritonRunner, "identity", "triton here")
    return libcuda


def serve(folder: Path, runner: NativeRunner) -> Model:
    found = opened(folder)
    return Model(found.checkpoint(), found.spec, lambda: found.record.weights_hash, runner)


def refuse_to_compile(*_: Any) -> None:
    raise AssertionError("a kernel was compiled")


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = ImportError("triton is not installed")
    monkeypatch.setattr(native, "NO_TRITON", absent)
    monkeypatch.setattr(runners, "MISSING", absent)
    monkeypatch.setattr(native, "kernel_record", refuse_to_compile)
    monkeypatch.setattr(native, "lower", refuse_to_compile)


def launches(driver: standin.Standin, call: Callable[[], object]) -> list[tuple[Any, ...]]:
    """What a call launches: all but addresses, and but position tables, which exports hold."""
    driver.reset()
    driver.record(True)
    call()
    assert driver.complaint() == ""
    launched = [launch for launch in driver.launched() if launch.name != "_position_kernel"]
    driver.reset()
    return [(launch.name, launch.grid, launch.block, launch.shared) for launch in launched]


def natively(driver: standin.Standin, folder: Path) -> Model:
    """The folder, loaded as where the native runner serves."""

    class Standing(NativeRunner):
        def __init__(self, *given: Any, exported: ExportFolder) -> None:
            super().__init__(*given, str(driver.path), exported)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "choose", lambda *_: "native")
        patch.setattr(loading, "NativeRunner", Standing)
        model = vitrail.load(folder, device="cpu")
    assert model.backend == "native"
    return model


CALLS: dict[str, Callable[[Model], object]] = {
    "uint8": lambda model: model._image_encoder("").tower.embeddings(
        torch.zeros(3, 32, 32, 3).byte()
    ),
    "float": lambda model: model._image_encoder("").tower.embeddings(torch.zeros(40, 3, 32, 32)),
    "text": lambda model: model._text_encoder("").tower.embeddings(
        TokenIds.of([[1, 2, 3], [4, 5], [6] * 9])
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_stored_programs_launch_what_new_ones_do(
    driver: standin.Standin,
    clip: Path,
    whole: Path,
    call: Callable[[Model], object],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    found = read_model(clip, torch.float16)
    # what an export is made for, where the machine has another GPU: configurations follow from it
    monkeypatch.setattr(native, "Target", lambda arch, _: Target(arch, 132))
    fresh = NativeRunner(found.weights, torch.float16, torch.device("cpu"), str(driver.path))
    wanted = launches(driver, lambda: call(serve(whole, fresh)))
    request.getfixturevalue("without_triton")
    assert launches(driver, lambda: call(natively(driver, whole))) == wanted
    assert wanted


@pytest.mark.parametrize("architecture", HEADS)
def test_stored_programs_score_as_new_ones_do(
    driver: standin.Standin,
    architecture: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Through `classify`, which is why an export has them."""
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    save_classifier(architecture, checkpoint)
    export_model(checkpoint, out, [90])
    monkeypatch.setattr(native, "Target", lambda arch, _: Target(arch, 132))
    found = read_model(checkpoint, torch.float16)
    fresh = NativeRunner(found.weights, torch.float16, CPU, str(driver.path))

    def call(model: Model) -> None:
        monkeypatch.setattr(torch, "isfinite", lambda x: torch.ones_like(x, dtype=torch.bool))
        model.classify(PHOTOS[:2])
        model.classify(torch.zeros(2, 3, 32, 32))

    wanted = launches(driver, lambda: call(serve(out, fresh)))
    assert wanted
    request.getfixturevalue("without_triton")
    assert launches(driver, lambda: call(natively(driver, out))) == wanted


@pytest.mark.parametrize(
    "pixels", [torch.zeros(2, 40, 24, 3).byte(), torch.zeros(2, 3, 32, 32).half()]
)
def test_other_sizes_and_kinds_of_pixels_are_not_taken_for_the_stored_ones(
    driver: standin.Standin,
    clip: Path,
    whole: Path,
    pixels: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "Target", lambda arch, _: Target(arch, 132))
    fresh = NativeRunner(
        read_model(clip, torch.float16).weights, torch.float16, CPU, str(driver.path)
    )
    wanted = launches(
        driver, lambda: serve(whole, fresh)._image_encoder("").tower.embeddings(pixels)
    )
    ours = natively(driver, whole)
    assert launches(driver, lambda: ours._image_encoder("").tower.embeddings(pixels)) == wanted


@pytest.mark.usefixtures("without_triton")
def test_without_triton_other_plans_and_sizes_say_what_there_is(
    driver: standin.Standin, whole: Path
) -> None:
    model = natively(driver, whole)
    wanted = "wanted what was exported: pooled embeddings of images of 32x32 and texts"
    for call in (
        lambda: model.encode_image(torch.zeros(1, 3, 40, 32)),
        lambda: model.forward(torch.zeros(1, 3, 32, 32)),
        lambda: model.forward(input_ids=torch.tensor([[1, 2]])),
    ):
        with pytest.raises(InputError, match=f"needs triton.*{wanted}"):
            call()


@pytest.mark.usefixtures("without_triton")
def test_without_triton_an_image_that_is_not_finite_costs_no_other(
    driver: standin.Standin, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it went wrong would take another plan; that it did is said all the same."""
    model = natively(driver, whole)
    embedding = torch.zeros(3, 64)
    embedding[1, 5] = float("nan")
    found = {"vision.embedding": embedding}
    monkeypatch.setattr(model._image_encoder("").tower, "embeddings", lambda *_: found)
    result = model.encode_image(torch.zeros(3, 3, 32, 32), on_error="skip")
    assert list(result.errors) == [1]
    assert "image 1: the result holds numbers that are not finite" in result.errors[1]
    assert result.index == (0, 2)


def test_tables_come_from_the_folder(driver: standin.Standin, whole: Path) -> None:
    found = opened(whole)
    weights = found.load()
    found.tables["uint8"] += 1
    runner = NativeRunner(
        weights, found.dtype, torch.device("cpu"), str(driver.path), exported=found
    )
    assert found.spec.vision is not None
    assert runner.position_table(found.spec.vision, (4, 4), "uint8") is found.tables["uint8"]
    assert runner.position_table(found.spec.vision, (4, 5), "uint8").shape == (21, 64)


def test_the_fingerprint_is_of_the_kernels_that_serve(
    driver: standin.Standin, clip: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, found = natively(driver, whole), opened(whole)
    manifest = json.loads((whole / "vitrail.json").read_text())["builds"]["90"]
    stored = found.builds[90]
    monkeypatch.setattr(runners.TritonRunner, "identity", stored)  # with the triton that made it
    runner = NativeRunner(found.load(), found.dtype, CPU, str(driver.path), exported=found)
    assert runner.identity == stored
    assert serve(whole, runner).fingerprint == manifest["fingerprint"] != model.source
    original = read_model(clip, torch.float16)
    fresh = NativeRunner(original.weights, torch.float16, CPU, str(driver.path))
    wanted = Model(original.checkpoint, original.spec, original.hash_weights, fresh).fingerprint
    assert wanted == manifest["fingerprint"]
    monkeypatch.setattr(runners.TritonRunner, "identity", "triton 9")  # another would compile
    assert runner.identity == f"{stored}; plans that are not exported: triton 9"
    monkeypatch.setattr(native, "NO_TRITON", ImportError("triton is not installed"))
    assert runner.identity == stored


@pytest.mark.usefixtures("uncompiled")
def test_each_architecture_has_the_fingerprint_of_its_own_runner(
    libcuda: standin.Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, folder = tmp_path / "vit", tmp_path / "out"
    save(make("ViTModel", **BLOCK), checkpoint)
    export_model(checkpoint, folder, [80, 90])
    builds = json.loads((folder / "vitrail.json").read_text())["builds"]
    record = record_of(folder)
    original = read_model(checkpoint, torch.float16)
    wanted = {}
    for arch in (80, 90):
        path = Path(shutil.copy(libcuda.path, tmp_path / f"sm_{arch}.so"))
        standin.Standin(path).device(*divmod(arch, 10))
        fresh = NativeRunner(original.weights, torch.float16, CPU, str(path))
        assert fresh.target.arch == arch
        model = Model(original.checkpoint, original.spec, original.hash_weights, fresh)
        wanted[arch] = model.fingerprint
    assert {int(arch): build["fingerprint"] for arch, build in builds.items()} == wanted
    assert {arch: fingerprint for arch, fingerprint, _, _ in record.builds} == wanted
    assert len(set(wanted.values())) == 2


@pytest.mark.usefixtures("without_triton")
def test_only_the_architectures_that_were_exported_do_without_triton(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, cuda = opened(whole), torch.device("cuda", 0)
    monkeypatch.setattr(native, "MISSING", None)
    for capability, serves in (((9, 0), True), ((8, 9), False), ((8, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert runners.choose("auto", torch.float16, cuda, found) == (
            "native" if serves else "torch"
        )
        if serves:
            assert runners.choose("native", torch.float16, cuda, found) == "native"
            continue
        wanted = rf"model\.vitrail: got kernels for sm_90, wanted sm_{capability[0]}{capability[1]}"
        with pytest.raises(CheckpointError, match=wanted):
            runners.choose("native", torch.float16, cuda, found)
    with pytest.raises(InputError, match="triton is not installed"):
        runners.choose("native", torch.float16, cuda)


# -- damage ----------------------------------------------------------------------------------------


KINDS_OF_FILES = {
    "vitrail.json": "vitrail.json",
    "model.vitrail": "model.vitrail",
    "weights": "weights.safetensors",
    "plan": "sm_90/image.uint8.plan",
    "kernel": "sm_90/*.kernel",
    "tokenizer": "tokenizer.json",
    "processor": "processor_config.json",
}


def one(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


def refused(folder: Path, pattern: str) -> None:
    with pytest.raises(CheckpointError, match=pattern):
        vitrail.load(folder, device="cpu")


@pytest.mark.parametrize("pattern", KINDS_OF_FILES.values(), ids=KINDS_OF_FILES)
def test_a_changed_byte_is_refused_wherever_it_is(copy: Path, pattern: str) -> None:
    path = one(copy, pattern)
    raw = path.read_bytes()
    places = {0, len(raw) // 3, len(raw) // 2, len(raw) - 1}
    if path.suffix == ".safetensors":  # length, header, its spaces, data, tables
        places |= {7, 9, 20, 200, 255, 256, len(raw) - 4000}
    if path.name == "vitrail.json":
        places |= set(range(0, len(raw), 61))
    for at in places:
        for flip in (1, 32):
            changed = bytearray(raw)
            changed[at] ^= flip
            path.write_bytes(changed)
            refused(copy, re.escape(path.name))
    path.write_bytes(raw)
    vitrail.load(copy, device="cpu")


@pytest.mark.parametrize("pattern", KINDS_OF_FILES.values(), ids=KINDS_OF_FILES)
def test_a_file_that_is_short_long_or_gone_is_refused(copy: Path, pattern: str) -> None:
    path = one(copy, pattern)
    raw = path.read_bytes()
    for other in (b"", raw[:-1], raw[: len(raw) // 2], raw + b"\n"):
        path.write_bytes(other)
        refused(copy, re.escape(path.name))
    path.unlink()
    refused(copy, "config.json" if path.name == "vitrail.json" else "no such file")


def rewrite(folder: Path, files: Listing = list, **changes: Any) -> None:
    """A record that is whole, and vitrail.json with it, and says something else."""
    record = record_of(folder)
    content = json.loads(record.summary)
    for name, value in changes.items():
        content[name] = value(content[name]) if callable(value) else value
    summary = json.dumps(content, indent=1, sort_keys=True) + "\n"
    listed = files(record.files)
    listing = struct.pack("<I", len(listed)) + b"".join(
        sized(name) + struct.pack("<Q", nbytes) + digest for name, nbytes, digest in listed
    )
    body = record.raw[BODY:].replace(sized(record.summary), sized(summary), 1)
    (folder / RECORD).write_bytes(signed(body.replace(record.listing, listing, 1)))
    (folder / "vitrail.json").write_text(summary)


def with_file(name: str) -> dict[str, Listing]:
    return {"files": lambda files: [*files, (name, 0, bytes(32))]}


def test_a_summary_that_says_the_same_in_other_bytes_is_refused(copy: Path) -> None:
    path = copy / "vitrail.json"
    raw = path.read_bytes()
    for other in (raw.replace(b"\n", b"\t", 1), raw.replace(b"1e-", b"1E-", 1)):
        assert json.loads(other) == json.loads(raw)
        assert other != raw
        path.write_bytes(other)
        refused(copy, "vitrail.json: got other bytes than model.vitrail has")
        record = record_of(copy)
        body = record.raw[BODY:].replace(raw, other, 1)
        (copy / RECORD).write_bytes(signed(body))
        refused(copy, "model.vitrail: got parts that contradict each other")
        (copy / RECORD).write_bytes(record.raw)


def test_a_rewritten_record_is_itself_no_damage(copy: Path) -> None:
    rewrite(copy, source="another")
    assert opened(copy).record.source == "another"


@pytest.mark.parametrize(
    ("changes", "said"),
    {
        "version": ({"version": "0.0.1"}, "contradict each other"),
        "grammar": ({"plan_grammar": PLAN_GRAMMAR + 1}, "contradict each other"),
        "ABI": ({"kernel_abi": KERNEL_ABI + 1}, "contradict each other"),
        "no such field": ({"color": 1}, "other fields"),
        "type": ({"logit_scale": "100"}, "logit_scale: got '100'"),
        "dtype": ({"dtype": "float32"}, "dtype: got 'float32', wanted one of"),
        "no build": ({"builds": {}}, "builds: got none"),
        "odd build": ({"builds": {"sm_90": BUILD}}, "builds: got"),
        "another build": ({"builds": {"90": "x"}}, "builds: got"),
        "part of a build": ({"builds": {"90": {"runner": "x"}}}, "builds: got"),
        "a build of numbers": ({"builds": {"90": {**BUILD, "runner": 1}}}, "builds: got"),
        "size": ({"size": [32]}, "size: got"),
        "no size": ({"size": None}, "size: got None"),
        "small size": ({"size": [32, 4]}, "size: got"),
        "spec": ({"spec": {}}, "spec"),
        "spec's fields": ({"spec": lambda spec: {**spec, "color": 1}}, "spec: got"),
        "spec's default": (
            {"spec": lambda spec: {key: value for key, value in spec.items() if key != "head"}},
            "spec: got fields left out, wanted every one",
        ),
        "spec's type": ({"spec": lambda spec: {**spec, "vision": [1]}}, "spec: got"),
        "spec's shape": (
            {"spec": lambda spec: {**spec, "text": None}},
            r"files: got [\d,]+ bytes of weights\.safetensors, wanted",
        ),
        "another architecture": ({"builds": {"80": BUILD}}, "wanted only files of an export"),
        "above": (with_file("../model.safetensors"), "only files of an export"),
        "above, by way": (with_file("sm_90/../../x.kernel"), "only files of an export"),
        "absolute": (with_file("/etc/passwd"), "only files of an export"),
        "another folder": (with_file("sm_80/text.plan"), "only files of an export"),
        "itself": (with_file(RECORD), "only files of an export"),
        "missing": (with_file("merges.txt"), "merges.txt: got no such file"),
        "twice": ({"files": lambda files: [*files, files[0]]}, "contradict each other"),
        "no plan": (
            {"files": lambda files: [file for file in files if "text" not in file[0]]},
            "files: got no sm_90/text.plan",
        ),
        "a shorter file": (
            {"files": lambda files: [(name, nbytes - 1, d) for name, nbytes, d in files]},
            "files: got .* bytes of weights.safetensors",
        ),
    }.values(),
)
def test_a_record_that_claims_something_else_is_refused(
    copy: Path, changes: dict[str, Any], said: str
) -> None:
    rewrite(copy, **changes)
    refused(copy, said)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (MAGIC["export"], b"vitrail expert\n", "first bytes: got b'vitrail expert"),
        (sized(vitrail.__version__), sized("0.0.1"), "contradict"),
        (
            struct.pack("<3I", 32, 32, 3),
            struct.pack("<3I", 32, 24, 3),
            "contradict",
        ),
        (sized("image.uint8"), sized("image.uint9"), "contradict"),
    ],
)
def test_what_only_cpp_uses_is_checked_too(copy: Path, old: bytes, new: bytes, said: str) -> None:
    raw = (copy / RECORD).read_bytes()
    assert raw.count(old) == 1
    changed = raw.replace(old, new)
    digest = hashlib.sha256(changed[BODY:]).digest()
    (copy / RECORD).write_bytes(changed[: BODY - 32] + digest + changed[BODY:])
    refused(copy, rf"model\.vitrail: .*{said}|model\.vitrail: {said}")


def test_a_record_that_ends_early_is_refused_under_its_own_digest(copy: Path) -> None:
    body = (copy / RECORD).read_bytes()[BODY:]
    shorter = [body[:stop] for stop in (0, 5, 8, 20, len(body) - 1)]
    for other in (
        *shorter,
        body[:8] + b"\xff" * 8 + body[16:],
    ):  # and a string longer than any memory
        (copy / RECORD).write_bytes(signed(other))
        refused(copy, r"model\.vitrail: got .*(which end early|contradict each other)")


def test_a_header_that_says_something_else_is_refused_under_its_own_digest(copy: Path) -> None:
    path = copy / "weights.safetensors"
    raw = path.read_bytes().replace(b'"U8"', b'"I8"', 1)
    path.write_bytes(raw)
    digest = bytes.fromhex(plain_digest(raw))
    rewrite(
        copy,
        files=lambda files: [
            (name, nbytes, digest if name == path.name else d) for name, nbytes, d in files
        ],
    )
    refused(copy, "weights.safetensors: got another header")


def test_a_link_out_of_the_folder_is_refused(copy: Path, tmp_path: Path) -> None:
    shutil.move(copy / "tokenizer.json", tmp_path / "tokenizer.json")
    (copy / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    refused(copy, r"tokenizer\.json: got a symlink to .*/tokenizer\.json")


def test_a_folder_is_an_export_or_a_checkpoint(clip: Path, copy: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(clip / name, copy)
        refused(copy, f"got both vitrail.json and {name}")
        (copy / name).unlink()


def test_what_takes_a_checkpoint_says_that_this_is_none(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="got an exported folder, wanted the checkpoint"):
        open_checkpoint(whole)
    with pytest.raises(CheckpointError, match="got an exported folder, wanted the checkpoint"):
        export_model(whole, tmp_path / "out", [90])
    with pytest.raises(InputError, match="verify: got the exported folder"):
        verify.verify(vitrail.load(whole, device="cpu"), [])


def test_arguments_that_a_folder_does_not_take(whole: Path) -> None:
    for dtype in ("float32", torch.bfloat16):
        with pytest.raises(InputError, match=r"dtype: got (float32|bfloat16), wanted float16, in"):
            vitrail.load(whole, device="cpu", dtype=dtype)
    assert vitrail.load(whole, device="cpu", dtype="float16").dtype == torch.float16
    with pytest.raises(InputError, match="revision: got 'main' for the local"):
        vitrail.load(whole, revision="main")
    with pytest.raises(InputError, match="native backend needs a CUDA device"):
        vitrail.load(whole, device="cpu", backend="native")


# -- exporting -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    {
        "architecture": ({"architectures": [75]}, r"arch: got sm_75, wanted one or more of sm_80,"),
        "none": ({"architectures": []}, r"arch: got none, wanted --arch"),
        "no GPU": ({"architectures": None}, r"arch: got no GPU, wanted --arch with .* sm_120"),
        "dtype": ({"dtype": "float32"}, r"dtype: got 'float32'"),
        "size": ({"size": (32, 7)}, r"size: got 32x7, wanted sides from a patch"),
    }.values(),
)
def test_wrong_arguments_are_refused(
    clip: Path,
    tmp_path: Path,
    options: dict[str, Any],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = {"architectures": [90], **options}
    with pytest.raises(InputError, match=said):
        export_model(clip, tmp_path / "out", **given)
    assert list(tmp_path.iterdir()) == []


def test_a_text_tower_has_no_size(tmp_path: Path) -> None:
    save(make("CLIPTextModel", **BLOCK), tmp_path / "text")
    with pytest.raises(InputError, match=r"size: got .* CLIPTextModel has no image tower"):
        export_model(tmp_path / "text", tmp_path / "out", [90], size=(32, 32))


def test_without_its_compiler_triton_is_asked_for(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "interpreted", lambda: True)
    with pytest.raises(InputError, match=r"TRITON_INTERPRET=1 is set.*: unset it"):
        export_model(clip, tmp_path / "out", [90])
    monkeypatch.setattr(export, "MISSING", ImportError("triton is not installed"))
    with pytest.raises(InputError, match="triton is not installed"):
        export_model(clip, tmp_path / "out", [90])


@pytest.mark.usefixtures("uncompiled")
def test_the_gpus_own_architecture_and_size_come_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    h200 = dataclasses.make_dataclass("Properties", ["major", "minor", "multi_processor_count"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: h200(9, 0, 114))
    assert export._targets(None) == [Target(90, 114)]
    assert export._targets([89, 90, 89]) == [Target(89, 142), Target(90, 114)]


@pytest.mark.usefixtures("uncompiled")
def test_only_an_earlier_export_is_replaced_and_only_on_request(clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export_model(clip, out, [90])  # an empty folder is as good as none
    first = contents(out)
    with pytest.raises(InputError, match="got a folder with something in it; wanted --overwrite"):
        export_model(clip, out, [90], dtype="bfloat16")
    assert contents(out) == first
    export_model(clip, out, [90], dtype="bfloat16", overwrite=True)
    assert vitrail.load(out, device="cpu").dtype == torch.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="wanted one that the same command wrote"):
        export_model(clip, tmp_path / "mine", [90], overwrite=True)
    with pytest.raises(InputError, match="wanted one that the same command wrote"):
        export_model(clip, clip, [90], overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="something other than a folder"):
        export_model(clip, tmp_path / "file", [90], overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.usefixtures("uncompiled")
def test_an_export_that_fails_leaves_what_was_there(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export_model(clip, out, [90])
    before = contents(out)

    def stop(path: Path, *chunks: bytes | memoryview) -> None:
        if path.name == "vitrail.json":
            raise KeyboardInterrupt
        write_file(path, *chunks)

    monkeypatch.setattr(export, "write_file", stop)
    with pytest.raises(KeyboardInterrupt):
        export_model(clip, out, [90], dtype="bfloat16", overwrite=True)
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("uncompiled")
def test_an_export_that_cannot_take_its_place_gives_it_back(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export_model(clip, out, [90])
    before, replace = contents(out), os.replace

    def refuse(path: Path, target: Path) -> None:
        if path.suffix == ".partial":
            raise PermissionError("no such luck")
        replace(path, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(InputError, match="out: cannot be written: no such luck"):
        export_model(clip, out, [90], dtype="bfloat16", overwrite=True)
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("uncompiled")
def test_what_a_killed_export_leaves_does_not_load(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, signal, sys; from vitrail.tools import export;"
        "export.kernel_record = lambda key, call, arch: key.encode();"
        "write = export.write_file;"
        "stop = lambda path: os.kill(os.getpid(), signal.SIGKILL);"
        "export.write_file = lambda path, *chunks:"
        " stop(path) if path.name == 'vitrail.json' else write(path, *chunks);"
        "export.export_model(sys.argv[1], sys.argv[2], [90])"
    )
    done = subprocess.run([sys.executable, "-c", code, clip, tmp_path / "out"], timeout=120)
    assert done.returncode == -9
    [left] = tmp_path.iterdir()
    assert left.name != "out"
    assert (left / "model.vitrail").exists()
    refused(left, "no config.json")
    export_model(clip, tmp_path / "out", [90])  # what is left is in nobody's way


def test_a_kernel_that_does_not_compile_is_named(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> bytes:
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr(export, "kernel_record", fail)
    with pytest.raises(VitrailError, match=r"export: sm_90: _\w+: ZeroDivisionError: of all thing"):
        export_model(clip, tmp_path / "out", [90])
    monkeypatch.setattr(export, "kernel_record", lambda *_: os._exit(9))
    with pytest.raises(VitrailError, match="export: a compiler process was killed"):
        export_model(clip, tmp_path / "out", [90])
    assert list(tmp_path.iterdir()) == []


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("uncompiled")
def test_the_command_writes_what_other_commands_take(clip: Path, tmp_path: Path) -> None:
    run, out = CliRunner(), str(tmp_path / "out")
    done = run.invoke(app, ["export", str(clip), out, "--arch", "sm_90", "--arch=80"])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{out}\n"
    assert re.search(r"MB; kernels: \d+ for sm_80, \d+ for sm_90", done.stderr)
    told = run.invoke(app, ["info", out, "--fingerprint"])
    assert told.exit_code == 0, told.output
    assert re.search(r"^backend .* on (CPU|CUDA), float16$", told.stdout, re.MULTILINE)
    assert (
        "from clip for sm_80, sm_90: pooled embeddings of images of 32x32 and texts" in told.stdout
    )
    assert vitrail.load(out).fingerprint in told.stdout
    images = str(PHOTOS[0].parent)
    for model, name in ((out, "a.npy"), (str(clip), "b.npy")):
        made = str(tmp_path / name)
        words = ["embed", images, "--model", model, "--out", made, "--device", "cpu"]
        words += ["--dtype=float16"] * (model != out)
        assert run.invoke(app, words).exit_code == 0
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["out", "--arch", "hopper"], 2, "got 'hopper', wanted such as sm_90"),
        (["out", "--arch", "sm_70"], 1, "got sm_70, wanted one or more of sm_80"),
        (["out", "--arch", "90", "--size", "big"], 2, "got 'big'"),
        ([], 2, "none given; wanted a folder to write"),
    ],
)
def test_wrong_usage_is_told(
    clip: Path, tmp_path: Path, words: list[str], code: int, said: str
) -> None:
    given = [str(tmp_path / word) if word == "out" else word for word in words]
    done = CliRunner().invoke(app, ["export", str(clip), *given])
    assert done.exit_code == code
    assert said in " ".join(done.stderr.replace("│", " ").split())
