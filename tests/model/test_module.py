"""Towers as modules: the numbers of the model, inside torch.compile without a break."""

from __future__ import annotations

import gc
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vitrail
from helpers import assert_close, make, save
from vitrail import tower_operators
from vitrail.demo import demo
from vitrail.errors import CheckpointError, InputError
from vitrail.model.model import Model


@pytest.fixture(scope="module")
def model() -> Model:
    return vitrail.load(demo.bundled(), device="cpu")


@pytest.fixture
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pixels(model: Model, batch: int) -> Tensor:
    assert model.spec.vision is not None
    return torch.randn(batch, model.spec.vision.channels, *model.spec.vision.image)


def padded(model: Model, texts: list[str]) -> Tensor:
    return model.tokenize(texts)


def test_an_image_module_gives_what_encode_image_gives(model: Model) -> None:
    values = pixels(model, 3)
    assert torch.equal(model.as_module("image")(values), model.encode_image(values))
    assert model.spec.vision is not None
    raw = torch.randint(256, (2, *model.spec.vision.image, 3), dtype=torch.uint8)
    wanted = model.encode_image(list(raw.numpy()))
    assert torch.equal(model.as_module("image")(raw), wanted)


def test_a_text_module_gives_what_encode_text_gives(model: Model) -> None:
    texts = ["a red square", "two green circles on blue", "a"]
    wanted = model.encode_text(texts)
    assert_close(model.as_module("text")(padded(model, texts)), wanted.double(), name="text")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_text_tower_without_a_projection_gives_its_pooled_token(
    dtype: str, tmp_path: Path
) -> None:
    save(make("CLIPTextModel"), tmp_path)
    model = vitrail.load(tmp_path, dtype=dtype)
    assert model.spec.text is not None
    assert model.spec.text.projection is None
    text = model.as_module("text")
    ids = torch.tensor([[1, 5, 9, model.spec.text.vocab - 1], [1, model.spec.text.vocab - 1, 3, 3]])
    out = text(ids)
    assert (out.dtype, out.shape) == (torch.float32, (2, model.spec.text.blocks.width))
    pooled = model.forward(input_ids=ids).pooler_output
    assert pooled is not None
    assert torch.equal(out, pooled.float())
    torch.library.opcheck(
        tower_operators.embed_text, (ids, text.fingerprint, text.source, out.shape[1])
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.usefixtures("fresh")
def test_it_compiles_as_one_graph_at_any_batch(model: Model, dynamic: bool) -> None:
    image, text = model.as_module("image"), model.as_module("text")
    head = nn.Linear(model.encode_text("a").shape[1], 5)

    def scores(values: Tensor, ids: Tensor) -> Tensor:
        return torch.relu(head(image(values * 2.0))) + head(text(ids)).sum(0)

    ids = padded(model, ["a red square", "a"])
    compiled = torch.compile(scores, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for batch in (2, 3, 5):
            values = pixels(model, batch)
            torch.testing.assert_close(compiled(values, ids), scores(values, ids))


@pytest.mark.parametrize("tower", ["image", "text"])
def test_the_operators_keep_pytorchs_rules_for_custom_ones(model: Model, tower: str) -> None:
    made = model.as_module("image" if tower == "image" else "text")
    given = pixels(model, 2) if tower == "image" else padded(model, ["a", "two red circles"])
    operator = tower_operators.embed_image if tower == "image" else tower_operators.embed_text
    width = made.spec.embedding
    torch.library.opcheck(operator, (given, made.fingerprint, made.source, width))


def test_it_exports_with_its_shapes(model: Model) -> None:
    image = model.as_module("image")
    program = torch.export.export(
        image, (pixels(model, 2),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    values = pixels(model, 4)
    assert torch.equal(program.module()(values), image(values))


def test_an_item_that_is_not_finite_is_nan_and_costs_no_other(model: Model) -> None:
    values = pixels(model, 3)
    values[1, 0, 0, 0] = float("inf")
    image = model.as_module("image")
    out = image(values)
    assert torch.isnan(out[1]).all()
    assert torch.isfinite(out[[0, 2]]).all()


def test_no_gradient_flows(model: Model) -> None:
    values = pixels(model, 1).requires_grad_()
    assert not model.as_module("image")(values).requires_grad


def test_what_a_module_does_not_take_is_said(model: Model) -> None:
    image, text = model.as_module("image"), model.as_module("text")
    for bad in (
        torch.zeros(2, 4, 64, 64),
        torch.zeros(3, 64, 64),
        torch.zeros(1, 3, 2, 64),
        torch.zeros(1, 3, 64, 64, dtype=torch.uint8),
        torch.zeros(1, 3, 64, 64, dtype=torch.int64),
        torch.zeros(1, 3, 64, 64, device="meta"),
    ):
        with pytest.raises(InputError, match="pixels: got"):
            image(bad)
    for bad in (
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(2, 5),
        torch.zeros(2, 0, dtype=torch.int64),
        torch.zeros(2, 999, dtype=torch.int64),
        torch.zeros(2, 5, dtype=torch.int64, device="meta"),
    ):
        with pytest.raises(InputError, match="ids: got"):
            text(bad)
    with pytest.raises(InputError, match="tower: got 'both'"):
        model.as_module("both")  # type: ignore[arg-type]


def test_a_module_keeps_its_tower_and_no_more() -> None:
    model = vitrail.load(demo.bundled(), device="cpu", dtype="bfloat16")
    image, values = model.as_module("image"), pixels(model, 1)
    wanted = model.encode_image(values)
    fingerprint, device = image.fingerprint, image.device
    del model
    gc.collect()
    assert torch.equal(image(values), wanted)
    del image
    gc.collect()
    assert tower_operators.live_towers(fingerprint, device) == []


def test_a_tower_is_found_while_any_of_two_equal_models_lives() -> None:
    models = [vitrail.load(demo.bundled(), device="cpu", dtype="bfloat16") for _ in range(2)]
    values = pixels(models[0], 2)
    modules = [model.as_module("image") for model in models]
    program = torch.export.export(modules[0], (values,)).module()
    wanted = modules[0](values)
    for dropped in (0, 1):
        del models[0], modules[0]
        gc.collect()
        if dropped == 0:
            assert torch.equal(program(values), wanted)
    with pytest.raises(CheckpointError, match="image tower of the model"):
        program(values)


def test_an_operator_says_what_is_loaded_and_what_loads_its_model(tmp_path: Path) -> None:
    shutil.copytree(demo.bundled(), tmp_path / "clip")
    changed = vitrail.load(tmp_path / "clip", device="cpu")
    (tmp_path / "clip/model.safetensors").write_bytes(b"")
    model = vitrail.load(demo.bundled(), device="cpu", sixteen_bit="clip")
    source = "vitrail.load('x{0}', device='{device}')"
    with pytest.raises(CheckpointError) as caught:
        tower_operators.embed_text(padded(model, ["a"]), "0" * 64, source, 128)
    said = str(caught.value)
    assert said.startswith(f"text tower of the model {'0' * 64}: this model is not loaded on cpu")
    assert (
        f"{model.fingerprint}, by vitrail.load('clip', device='cpu', dtype='float32', "
        "sixteen_bit='clip') of Vitrail"
    ) in said
    assert "a model whose fingerprint cannot be computed: " in said
    assert f"{changed.folder}/model.safetensors: was truncated" in said
    assert said.endswith("load it first, and keep it: model = vitrail.load('x{0}', device='cpu')")
    with pytest.raises(CheckpointError, match=r"image tower .*: this model is not loaded on meta"):
        tower_operators._find("image", torch.empty(1, device="meta"), model.fingerprint, source)


def test_a_module_computes_by_its_own_model_whatever_else_is_loaded() -> None:
    """PyTorch's bits on a CPU depend on the batch, which a memory limit cuts."""
    models = [
        vitrail.load(demo.bundled(), device="cpu", dtype="float16", memory_limit=limit)
        for limit in (None, "16M", "64M")
    ]
    modules = [model.as_module("image") for model in models]
    assert modules[0].fingerprint == modules[1].fingerprint == modules[2].fingerprint
    assert "memory_limit=16777216" in modules[1].source
    for model, image in zip(models, modules, strict=True):
        towers = tower_operators._choose(image.fingerprint, image.device, image.source)
        assert towers is image.towers is model.towers
        again = pickle.loads(pickle.dumps(image))
        assert again.towers is image.towers
    moved = "vitrail.load('elsewhere', device='{device}', dtype='float16')"
    smallest = tower_operators._choose(modules[0].fingerprint, modules[0].device, moved)
    assert smallest is models[1].towers
