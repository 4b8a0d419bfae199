"""In fp32 the engine equals transformers field by field; in 16 bits it errs at most twice as it."""

from __future__ import annotations

import inspect
import itertools
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ImageClassificationPipeline

import vitrail
from helpers import (
    CONFIGS,
    IMAGE_ARCHITECTURES,
    TEXT_ARCHITECTURES,
    arguments,
    assert_close,
    assert_same,
    clip_folder,
    image_embedding,
    make,
    outputs,
    reference_numbers,
    save,
    text_embedding,
    with_outliers,
)
from vitrail.errors import InputError
from vitrail.tools import agreement

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.too_slow],
}


# -- the rules themselves --------------------------------------------------------------------------


def noisy(reference: Tensor, size: float) -> Tensor:
    """The reference with every number off by ``size``, up or down in turn."""
    signs = torch.ones(reference.numel()).view_as(reference)
    signs.view(-1)[::2] = -1
    return reference + size * signs


def test_fp32_results_pass_up_to_the_bound_and_fail_at_twice_it() -> None:
    reference = torch.rand(50, 8) + 1
    top = float(reference.max())
    for what, bound in (("kernel", 1e-5 * top + 1e-5), ("model", 1e-4 * top)):
        assert_close(noisy(reference, 0.9 * bound), reference, what=what)
        with pytest.raises(AssertionError, match="wanted"):
            assert_close(noisy(reference, 2 * (bound + 1e-5 * top)), reference, what=what)


def test_a_single_wrong_number_among_many_fails() -> None:
    reference = torch.rand(1000, 100)
    ours = reference.clone()
    ours[617, 33] += 1e-3
    for what in ("kernel", "model"):
        with pytest.raises(AssertionError, match="at 61733"):
            assert_close(ours, reference, what=what)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("what", ["kernel", "model"])
def test_16_bit_results_may_err_as_pytorch_does_and_not_thrice_as_much(
    dtype: torch.dtype, what: str
) -> None:
    reference = torch.randn(64, 100, dtype=torch.float64)
    step = 0.01 if dtype == torch.float16 else 0.05
    if what == "model":
        step /= 5
    peer = noisy(reference, step).to(dtype)
    assert_close(peer.clone(), reference, peer, what=what)
    with pytest.raises(AssertionError, match="error"):
        assert_close(noisy(reference, 3 * step).to(dtype), reference, peer, what=what)


def test_a_small_bias_everywhere_fails_though_the_largest_error_does_not_show_it() -> None:
    reference = torch.randn(4096, dtype=torch.float64)
    off = 0.01 * torch.randn(4096, dtype=torch.float64)
    peer = (reference + off).half()
    ours = (reference + off.abs().clamp(max=0.02) + 0.012).half()
    assert (ours - reference).abs().max() < 2 * (peer - reference).abs().max()
    with pytest.raises(AssertionError, match="rms"):
        assert_close(ours, reference, peer)


def test_one_bad_item_of_a_corpus_fails() -> None:
    reference = torch.randn(600, 64)
    peer = noisy(reference, 1e-3).half()
    for position in (0, 311, 599):
        ours = peer.clone()
        ours[position] = noisy(reference[position], 1e-2).half()
        with pytest.raises(AssertionError, match="largest error"):
            assert_close(ours, reference, peer, what="model")


def test_a_massive_channel_hides_nothing() -> None:
    reference = torch.randn(600, 64)
    reference[:, 3] += 1000
    off = noisy(reference, 0.05)
    assert nn.functional.cosine_similarity(off, reference).min() > agreement.COSINE[torch.float16]
    with pytest.raises(AssertionError, match="centered cosine"):
        assert_close(off, reference, off.half(), what="model")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_fails_wherever_it_is(value: float) -> None:
    good, bad = torch.ones(4, 4), torch.ones(4, 4)
    bad[2, 1] = value
    for what in ("kernel", "model", "scores"):
        for ours, reference in ((bad, good), (good, bad), (bad, bad)):
            with pytest.raises(AssertionError, match="not finite"):
                assert_close(ours, reference, what=what)
        with pytest.raises(AssertionError, match="not finite"):
            assert_close(good.half(), good, bad.half(), what=what)


def test_other_shapes_and_dtypes_fail() -> None:
    four, row = torch.ones(4, 4), torch.ones(4)
    for what in ("kernel", "model"):
        for ours, reference, peer in (
            (row, four, None),
            (four, four[:, :1], None),
            (four.half(), four, four[:1].half()),
            (four.half(), four, None),
            (four.double(), four, None),
            (four, four.half(), None),
            (four.half(), four, four.bfloat16()),
            (four.half(), four, four),
        ):
            with pytest.raises(AssertionError):
                assert_close(ours, reference, peer, what=what)
    with pytest.raises(AssertionError):
        assert_close(four, four, four.half(), what="kernel")


def test_outliers_are_large_and_leave_the_function_as_it_was() -> None:
    for architecture in ("ViTModel", "CLIPModel", "Dinov2WithRegistersModel"):
        plain = make(architecture)
        scaled = with_outliers(make(architecture))
        before, after = dict(plain.named_parameters()), dict(scaled.named_parameters())
        grown = [name for name, p in after.items() if p.abs().max() > 20 * before[name].abs().max()]
        assert any("norm" in name for name in grown)
        assert any("v_proj" in name or "value" in name for name in grown)
        inputs = arguments(architecture, plain.config)
        assert_same(outputs(scaled, inputs), outputs(plain, inputs))


def test_perturbed_parameters_differ_from_their_initial_values_and_from_each_other() -> None:
    model = make("Dinov2WithRegistersForImageClassification")
    fresh = type(model)(model.config)
    for (name, ours), theirs in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert (ours - theirs).abs().mean() > 0.05, name
        assert ours.std() > 0.05, name


# -- random configs --------------------------------------------------------------------------------

ACTIVATIONS = (
    "gelu",
    "gelu_new",
    "gelu_fast",
    "gelu_pytorch_tanh",
    "gelu_python",
    "quick_gelu",
    "relu",
    "silu",
)
HEAD_DIMS = (8, 12, 16, 20, 32, 64, 72, 80, 88, 104)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@st.composite
def blocks(draw: st.DrawFn) -> dict[str, Any]:
    """Width, heads, layers, activation and eps, under the keys all families share."""
    head_dim = draw(st.sampled_from(HEAD_DIMS))
    heads = draw(st.integers(1, max(1, 128 // head_dim)))
    return {
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 4)),
        "hidden_act": draw(st.sampled_from(ACTIVATIONS)),
        "layer_norm_eps": draw(st.sampled_from((1e-12, 1e-6, 1e-5, 1e-2))),
    }


@st.composite
def squares(draw: st.DrawFn) -> dict[str, Any]:
    """A square image of square patches."""
    patch = draw(st.sampled_from((1, 2, 4, 7, 8, 14)))
    return {
        "patch_size": patch,
        "image_size": patch * draw(st.integers(1, 5)),
        "num_channels": draw(st.sampled_from((1, 3, 4))),
    }


@st.composite
def vit_configs(draw: st.DrawFn) -> dict[str, Any]:
    config = draw(blocks()) | draw(squares())
    config["intermediate_size"] = draw(st.integers(1, 150))
    config["qkv_bias"] = draw(st.booleans())
    if draw(st.integers(0, 3)) == 0:
        # transformers interpolates positions of squares alone: such a config has its one size
        patch, grid = (draw(st.tuples(st.integers(1, 9), st.integers(1, 6))) for _ in range(2))
        config["patch_size"] = list(patch)
        config["image_size"] = [p * g for p, g in zip(patch, grid, strict=True)]
    return config


@st.composite
def dinov2_configs(draw: st.DrawFn, registers: bool) -> dict[str, Any]:
    config = draw(blocks()) | draw(squares())
    config["mlp_ratio"] = draw(st.integers(1, 4))
    config["use_swiglu_ffn"] = draw(st.booleans())
    config["qkv_bias"] = draw(st.booleans())
    if registers:
        config["num_register_tokens"] = draw(st.integers(1, 5))
    return config


@st.composite
def clip_vision_configs(draw: st.DrawFn) -> dict[str, Any]:
    config = draw(blocks()) | draw(squares())
    config["intermediate_size"] = draw(st.integers(1, 150))
    config["projection_dim"] = draw(st.integers(1, 70))
    return config


@st.composite
def clip_text_configs(draw: st.DrawFn) -> dict[str, Any]:
    vocab = draw(st.integers(4, 200))
    eos = draw(st.one_of(st.just(2), st.integers(0, vocab - 1)))
    config = draw(blocks()) | {
        "vocab_size": vocab,
        "max_position_embeddings": draw(st.integers(1, 20)),
        "eos_token_id": eos,
        "bos_token_id": 0,
        "pad_token_id": draw(st.integers(0, vocab - 1)),
    }
    config["intermediate_size"] = draw(st.integers(1, 150))
    config["projection_dim"] = draw(st.integers(1, 70))
    return config


@st.composite
def clip_configs(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "vision": draw(clip_vision_configs()),
        "text": draw(clip_text_configs()),
        "projection_dim": draw(st.integers(1, 70)),
    }


STRATEGIES: Mapping[str, st.SearchStrategy[dict[str, Any]]] = {
    "ViT": vit_configs(),
    "DeiT": vit_configs(),
    "CLIPModel": clip_configs(),
    "CLIPVision": clip_vision_configs(),
    "CLIPText": clip_text_configs(),
    "Dinov2WithRegisters": dinov2_configs(registers=True),
    "Dinov2": dinov2_configs(registers=False),
}


@st.composite
def cases(draw: st.DrawFn, architecture: str) -> dict[str, Any]:
    """A config with how it is stored and what goes in."""
    name = max((name for name in STRATEGIES if architecture.startswith(name)), key=len)
    config = draw(STRATEGIES[name])
    vision = config.get("vision", config)
    size = None
    if not isinstance(vision.get("patch_size"), list) and "patch_size" in vision:
        sides = st.integers(vision["patch_size"], 3 * vision["image_size"])
        size = draw(st.one_of(st.none(), st.tuples(sides, sides)))
    if "add_pooling_layer" in inspect.signature(getattr(transformers, architecture)).parameters:
        config["add_pooling_layer"] = draw(st.booleans())
        config["pooler_output_size"] = draw(st.sampled_from((None, 11)))
        config["pooler_act"] = draw(st.sampled_from(("tanh", "gelu")))
    if "Classification" in architecture:
        config["id2label"] = {i: f"class {i}" for i in range(draw(st.integers(1, 9)))}
        kinds = [None, "multi_label_classification", "single_label_classification"]
        config["problem_type"] = draw(st.sampled_from(kinds[: 1 + len(config["id2label"])]))
    context = config.get("text", config).get("max_position_embeddings")
    return {
        "config": config,
        "seed": draw(st.integers(0, 1000)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "shards": draw(st.sampled_from(("50GB", "20KB"))),
        "dialect": draw(st.sampled_from((4, 5))),
        "batch": draw(st.sampled_from((1, 3))),
        "size": size,
        "length": None if context is None else draw(st.integers(1, context)),
    }


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_field_and_embedding_equals_transformers(architecture: str) -> None:
    @given(case=cases(architecture))
    @settings(max_examples=40, **QUICK)
    def check(case: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            model = make(architecture, seed=case["seed"], **case["config"])
            how = {key: case[key] for key in ("dtype", "shards", "dialect")}
            save(model, folder, **how)
            ours = vitrail.load(folder)
        shape = {key: case[key] for key in ("batch", "size", "length", "seed")}
        inputs = arguments(architecture, model.config, **shape)
        theirs = outputs(model, inputs)
        assert_same(ours.forward(**inputs, output_hidden_states=True), theirs)
        plain = ours.forward(**inputs)
        assert plain.hidden_states is None
        assert_close(first(plain), first(theirs), what="model", name="without hidden states")
        assert plain.status is not None
        assert not plain.status.any()
        if "pixel_values" in inputs:
            pixels = inputs["pixel_values"]
            embedding = image_embedding(model, pixels)
            assert_close(ours.encode_image(pixels), embedding, what="model", name="encode_image")
            if "Classification" in architecture:
                found = ours.classify(pixels)
                assert list(found.labels) == [*case["config"]["id2label"].values()]
                assert_close(found.logits, theirs.logits, what="model", name="classify")
                scores = pipeline_scores(model, theirs.logits)
                assert_close(found.probs, scores, what="model", name="classify")
        if "input_ids" in inputs:
            embedding = text_embedding(model, inputs["input_ids"])
            got = ours.encode_text(inputs["input_ids"])
            assert_close(got, embedding, what="model", name="encode_text")

    check()


def pipeline_scores(model: Any, logits: Tensor) -> Tensor:
    """What transformers' image classification pipeline makes of ``logits`` (N, L)."""
    scores = ImageClassificationPipeline.postprocess
    labels, rows = model.config.id2label, []
    for row in logits:
        ranked = scores(SimpleNamespace(model=model), {"logits": row[None]}, top_k=len(labels))
        by_label = {entry["label"]: entry["score"] for entry in ranked}
        rows.append([by_label[labels[i]] for i in range(len(labels))])
    return torch.tensor(rows)


def first(output: Any) -> Tensor:
    """The first field that is a tensor of every architecture's output."""
    for name in ("logits", "logits_per_text", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)  # type: ignore[no-any-return]
    raise AssertionError("an output without any of its fields")


def loaded(model: Any, folder: Path, dtype: str = "float32", **how: Any) -> vitrail.Model:
    save(model, folder, **how)
    return vitrail.load(folder, dtype=dtype)


def test_sizes_in_turn_do_not_disturb_each_other(tmp_path: Path) -> None:
    for architecture in ("ViTModel", "CLIPVisionModelWithProjection", "Dinov2WithRegistersModel"):
        model = make(architecture)
        ours = loaded(model, tmp_path / architecture)
        for size in ((32, 32), (64, 16), (16, 64), (35, 39), (32, 32), (8, 8), (8, 71), (64, 16)):
            inputs = arguments(architecture, model.config, size=size, seed=size[0])
            theirs = outputs(model, inputs)
            assert_same(ours.forward(**inputs, output_hidden_states=True), theirs)
            embedding = image_embedding(model, inputs["pixel_values"])
            got = ours.encode_image(inputs["pixel_values"])
            assert_close(got, embedding, what="model", name=f"encode_image at {size}")


@pytest.mark.parametrize("architecture", IMAGE_ARCHITECTURES)
def test_a_residual_channel_a_thousand_times_the_others_changes_nothing(
    architecture: str, tmp_path: Path
) -> None:
    model = make(architecture)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("class_embedding", "cls_token", "register_tokens")):
                parameter[..., 5] += 300
            if "position_embedding" in name and "text" not in name:
                parameter[..., 7] -= 200
    ours = loaded(model, tmp_path)
    inputs = arguments(architecture, model.config)
    assert_same(ours.forward(**inputs, output_hidden_states=True), outputs(model, inputs))
    with_outliers(model)
    ours = loaded(model, tmp_path / "outliers")
    assert_same(ours.forward(**inputs, output_hidden_states=True), outputs(model, inputs))


def test_a_classifier_of_no_labels_gives_its_features(tmp_path: Path) -> None:
    for family in ("ViT", "Dinov2", "Dinov2WithRegisters"):
        architecture = f"{family}ForImageClassification"
        model = make(architecture, id2label={})
        ours = loaded(model, tmp_path / family)
        inputs = arguments(architecture, model.config)
        assert_same(ours.forward(**inputs, output_hidden_states=True), outputs(model, inputs))


# -- texts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", TEXT_ARCHITECTURES)
def test_right_padded_masks_equal_transformers(architecture: str, tmp_path: Path) -> None:
    model = make(architecture)
    ours = loaded(model, tmp_path)
    inputs = arguments(architecture, model.config, batch=5)
    rows, length = inputs["input_ids"].shape

    @given(
        lengths=st.lists(st.integers(1, length), min_size=rows, max_size=rows),
        kind=st.sampled_from((torch.int64, torch.int32, torch.bool, torch.float32)),
    )
    @settings(max_examples=25, **QUICK)
    def check(lengths: list[int], kind: torch.dtype) -> None:
        mask = torch.arange(length) < torch.tensor(lengths)[:, None]
        theirs = outputs(model, {**inputs, "attention_mask": mask.long()})
        got = ours.forward(**inputs, attention_mask=mask.to(kind), output_hidden_states=True)
        assert_same(got, theirs)

    check()


@pytest.mark.parametrize(
    "mask",
    [[0, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 2], [1, 1, 0.5, 0], [-1, 1, 1, 1]],
    ids=str,
)
def test_other_masks_are_refused(mask: list[float], tmp_path: Path) -> None:
    ours = loaded(make("CLIPTextModel"), tmp_path)
    ids = torch.full((2, 4), 59)
    rows = torch.tensor([[1, 1, 1, 1], mask])
    with pytest.raises(InputError, match="attention_mask"):
        ours.forward(input_ids=ids, attention_mask=rows)
    with pytest.raises(InputError, match=r"attention_mask: got \(2, 3\)"):
        ours.forward(input_ids=ids, attention_mask=torch.ones(2, 3))


def test_a_mask_without_data_is_refused(tmp_path: Path) -> None:
    ours = loaded(make("CLIPTextModel"), tmp_path)
    ids = torch.full((2, 4), 59)
    with pytest.raises(InputError, match="attention_mask"):
        ours.forward(input_ids=ids, attention_mask=torch.ones(2, 4, device="meta"))


def test_the_first_end_token_is_pooled_and_without_one_the_first_token(tmp_path: Path) -> None:
    ids = torch.tensor(
        [[58, 7, 59, 3, 59, 59], [59, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 59], [7, 6, 5, 4, 3, 2]]
    )
    for architecture in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        model = make(architecture)
        ours = loaded(model, tmp_path / architecture)
        assert_same(
            ours.forward(input_ids=ids, output_hidden_states=True),
            outputs(model, {"input_ids": ids}),
        )
        whole = text_embedding(model, ids)
        assert_close(ours.encode_text(ids[:3]), whole[:3], what="model")
        for row, length in ((0, 3), (1, 1)):  # nothing after the end token reaches it
            cut = text_embedding(model, ids[row : row + 1, :length])
            assert_close(ours.encode_text(ids[row : row + 1]), cut, what="model")
        with pytest.raises(InputError, match=r"text 3: got no end token \(59\)"):
            ours.encode_text(ids)


def test_legacy_configs_pool_the_first_of_the_highest_id(tmp_path: Path) -> None:
    model = make("CLIPTextModelWithProjection", eos_token_id=2)
    ours = loaded(model, tmp_path)
    # the highest is not the last, comes twice, is the only one, and is not 59; 2 is no end token
    ids = torch.tensor([[58, 7, 59, 3, 59], [2, 30, 30, 2, 1], [4, 4, 4, 4, 4], [0, 2, 57, 5, 9]])
    assert_same(
        ours.forward(input_ids=ids, output_hidden_states=True), outputs(model, {"input_ids": ids})
    )
    assert_close(ours.encode_text(ids), text_embedding(model, ids), what="model")
    listed = [[58, 7, 59], [2, 30], [4], [0, 2, 57]]
    assert_close(ours.encode_text(listed), text_embedding(model, ids), what="model")


def test_either_tower_of_a_pair_alone_gives_its_own_fields(tmp_path: Path) -> None:
    model = make("CLIPModel")
    ours = loaded(model, tmp_path)
    inputs = arguments("CLIPModel", model.config)
    theirs = outputs(model, inputs)
    image = ours.forward(pixel_values=inputs["pixel_values"], output_hidden_states=True)
    text = ours.forward(input_ids=inputs["input_ids"], output_hidden_states=True)
    for got, mine, other in ((image, "image", "text"), (text, "text", "image")):
        tower = {"image": "vision", "text": "text"}
        for field in (f"{mine}_embeds",):
            assert_close(getattr(got, field), theirs[field], what="model", name=field)
        field = f"{tower[mine]}_model_output"
        assert_same(getattr(got, field), theirs[field])
        assert getattr(got, f"{other}_embeds") is None
        assert getattr(got, f"{tower[other]}_model_output") is None
        assert got.logits_per_image is None
        assert got.logits_per_text is None


# -- zero-shot -------------------------------------------------------------------------------------


@pytest.mark.parametrize("eos", [None, 2], ids=["end token", "legacy"])
def test_zero_shot_probabilities_equal_transformers(eos: int | None, tmp_path: Path) -> None:
    model, processor = clip_folder(tmp_path, eos_token_id=eos)
    ours = vitrail.load(tmp_path)
    pixels = arguments("CLIPModel", model.config, batch=5)["pixel_values"]
    labels = ["cat", "a dog on the mat", "stained glass windows of a church"]
    texts = [f"a photo of a {label}" for label in labels]
    tokens = processor.tokenizer(texts, padding=True, return_tensors="pt")
    theirs = outputs(model, {**tokens, "pixel_values": pixels})
    found = ours.classify(pixels, labels)
    assert found.labels == tuple(labels)
    assert_close(found.logits, theirs.logits_per_image, what="model", name="logits")
    probabilities = theirs.logits_per_image.softmax(dim=1)
    assert_close(found.probs, probabilities, what="model", name="probabilities")


# -- intermediate layers ---------------------------------------------------------------------------

FINAL_NORM = {
    "ViTModel": "layernorm",
    "DeiTModel": "layernorm",
    "CLIPVisionModel": "post_layernorm",
    "Dinov2Model": "layernorm",
    "Dinov2WithRegistersModel": "layernorm",
}


def intermediate_layers(
    model: Any,
    norm_name: str,
    pixels: Tensor,
    n: int | Sequence[int],
    reshape: bool,
    return_class_token: bool,
    norm: bool,
) -> tuple[Any, ...]:
    """DINOv2's `get_intermediate_layers`, from the residual stream that transformers gives."""
    stream = outputs(model, {"pixel_values": pixels}).hidden_states
    layers = len(stream) - 1
    blocks = range(layers - n, layers) if isinstance(n, int) else n
    taken = [stream[block + 1] for block in blocks]
    if norm:
        with reference_numbers():
            taken = [getattr(model, norm_name)(tokens) for tokens in taken]
    prefix = 1 + getattr(model.config, "num_register_tokens", 0)
    prefix += model.config.model_type == "deit"  # the distillation token
    class_tokens = [tokens[:, 0] for tokens in taken]
    patches = [tokens[:, prefix:] for tokens in taken]
    if reshape:
        size, (batch, _, height, width) = model.config.patch_size, pixels.shape
        patches = [
            p.reshape(batch, height // size, width // size, -1).permute(0, 3, 1, 2) for p in patches
        ]
    return tuple(zip(patches, class_tokens, strict=True)) if return_class_token else tuple(patches)


@pytest.mark.parametrize("architecture", FINAL_NORM)
def test_intermediate_layers_equal_the_formula_of_dinov2(architecture: str, tmp_path: Path) -> None:
    model = make(architecture, num_hidden_layers=4)
    ours = loaded(model, tmp_path)
    pixels = arguments(architecture, model.config, size=(43, 25))["pixel_values"]
    switches = itertools.product((1, 2, 4, [0], [1, 3], [0, 1, 2, 3], (2,)), *[(False, True)] * 3)
    for n, reshape, return_class_token, norm in switches:
        theirs = intermediate_layers(
            model, FINAL_NORM[architecture], pixels, n, reshape, return_class_token, norm
        )
        got = ours.get_intermediate_layers(pixels, n, reshape, return_class_token, norm)
        assert isinstance(got, tuple)
        assert len(got) == len(theirs)
        name = f"n={n} reshape={reshape} class={return_class_token} norm={norm}"
        for a, b in zip(got, theirs, strict=True):
            if not return_class_token:
                assert isinstance(a, Tensor)
            pairs = zip(a, b, strict=True) if return_class_token else [(a, b)]
            for one, other in pairs:
                assert one.is_contiguous() or one.dim() < 4
                assert_close(one, other, what="model", name=name)


def test_by_default_the_last_block_normalized_without_class_token_is_given(tmp_path: Path) -> None:
    model = make("Dinov2WithRegistersModel")
    ours = loaded(model, tmp_path)
    pixels = arguments("Dinov2WithRegistersModel", model.config)["pixel_values"]
    (got,) = ours.get_intermediate_layers(pixels)
    theirs = outputs(model, {"pixel_values": pixels}).last_hidden_state[:, 4:]
    assert_close(got, theirs, what="model")


@pytest.mark.parametrize("n", [0, 3, -1, [], [2], [-1], [1, 0], [0, 0], 1.0, "1", None])
def test_block_numbers_that_do_not_exist_are_refused(n: Any, tmp_path: Path) -> None:
    ours = loaded(make("Dinov2Model"), tmp_path)
    with pytest.raises(InputError, match="n: got"):
        ours.get_intermediate_layers(torch.zeros(1, 3, 32, 32), n)


# -- nothing in ------------------------------------------------------------------------------------


def emptied(output: Mapping[str, Any]) -> dict[str, Any]:
    """The same fields without a row; transformers itself fails on a batch of none."""
    empty: dict[str, Any] = {}
    for key, value in output.items():
        if isinstance(value, Tensor):
            empty[key] = value[:0, :0] if key.startswith("logits_per") else value[:0]
        elif isinstance(value, tuple):
            empty[key] = tuple(tensor[:0] for tensor in value)
        else:
            empty[key] = emptied(value)
    return empty


@pytest.mark.parametrize("architecture", CONFIGS)
def test_no_items_give_all_fields_without_rows(architecture: str, tmp_path: Path) -> None:
    model = make(architecture)
    ours = loaded(model, tmp_path)
    inputs = arguments(architecture, model.config)
    theirs = emptied(outputs(model, inputs))
    nothing = {key: value[:0] for key, value in inputs.items()}
    assert_same(ours.forward(**nothing, output_hidden_states=True), theirs)
    for call, kind, embedding in (
        (ours.encode_image, "pixel_values", image_embedding),
        (ours.encode_text, "input_ids", text_embedding),
    ):
        if kind in inputs:
            width = embedding(model, inputs[kind]).shape[1]
            for none in (nothing[kind], []):
                got = call(none)
                assert (got.shape, got.dtype) == ((0, width), torch.float32)
    if "pixel_values" in inputs:
        (patches,) = ours.get_intermediate_layers(nothing["pixel_values"], reshape=True)
        assert patches.shape == (0, 32, 4, 4)
    if "Classification" in architecture:
        found = ours.classify(nothing["pixel_values"])
        assert found.logits.shape == found.probs.shape == (0, 7)


# -- 16 bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "outliers"),
    [
        pytest.param("float16", True, id="float16-outliers"),
        pytest.param("bfloat16", False, id="bfloat16-plain"),
        pytest.param("float16", False, id="float16-plain", marks=pytest.mark.slow),
        pytest.param("bfloat16", True, id="bfloat16-outliers", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_16_bits_err_at_most_twice_as_much_as_pytorch(
    architecture: str, dtype: str, outliers: bool, tmp_path: Path
) -> None:
    model = make(architecture)
    if outliers:
        with_outliers(model)
    ours = loaded(model, tmp_path, dtype)
    inputs = arguments(architecture, model.config, batch=agreement.CORPUS)
    theirs = outputs(model, inputs)
    images = image_embedding(model, inputs["pixel_values"]) if "pixel_values" in inputs else None
    texts = text_embedding(model, inputs["input_ids"]) if "input_ids" in inputs else None
    model.to(getattr(torch, dtype))
    if "pixel_values" in inputs:
        halves = {**inputs, "pixel_values": inputs["pixel_values"].to(getattr(torch, dtype))}
    else:
        halves = inputs
    peer = outputs(model, halves)
    assert_same(ours.forward(**inputs, output_hidden_states=True), theirs, peer)
    if images is not None:
        near = image_embedding(model, halves["pixel_values"])
        got = ours.encode_image(inputs["pixel_values"])
        assert_close(got, images, near, what="model", name="encode_image")
    if texts is not None:
        near = text_embedding(model, inputs["input_ids"])
        got = ours.encode_text(inputs["input_ids"])
        assert_close(got, texts, near, what="model", name="encode_text")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_images_in_16_bits_err_at_most_twice_as_much_as_pytorch(dtype: str, tmp_path: Path) -> None:
    model, processor = clip_folder(tmp_path)
    dice = torch.Generator().manual_seed(0)
    # near the processor's mean, where the folded normalization has the most to take away again
    images = torch.randint(80, 160, (agreement.CORPUS, 32, 32, 3), generator=dice).to(torch.uint8)
    pixels = processor.image_processor(list(images.numpy()), return_tensors="pt").pixel_values
    theirs = image_embedding(model, pixels)
    model.to(getattr(torch, dtype))
    peer = image_embedding(model, pixels.to(getattr(torch, dtype)))
    ours = vitrail.load(tmp_path, dtype=dtype).encode_image(images)
    assert_close(ours, theirs, peer, what="model", name="encode_image")


# -- nothing can be left out -----------------------------------------------------------------------


def tensor_classes(architecture: str, **config: Any) -> list[str]:
    """Names of the stored tensors with ``{i}`` for the layer, those without effect left out."""
    with tempfile.TemporaryDirectory() as folder:
        save(make(architecture, **config), folder)
        names = load_file(Path(folder) / "model.safetensors")
    return sorted({layered(name) for name in names if "mask_token" not in name})


def layered(name: str) -> str:
    return re.sub(r"\.\d+\.", ".{i}.", name)


def initial(name: str, tensor: Tensor) -> Tensor:
    """What a class of tensor starts training as, or nothing at all."""
    if re.search(r"norm[^.]*\.weight$|lambda1$", name):
        return torch.ones_like(tensor)
    return torch.full_like(tensor, 2.6592) if name == "logit_scale" else torch.zeros_like(tensor)


def parity_with(tensors: Mapping[str, Tensor], model: Any, folder: Path) -> None:
    """Ours with ``tensors`` in the place of the stored ones, against ``model``."""
    save(model, folder)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    inputs = arguments(type(model).__name__, model.config)
    ours = vitrail.load(folder).forward(**inputs, output_hidden_states=True)
    assert_same(ours, outputs(model, inputs))


VARIANTS = [(architecture, {}) for architecture in CONFIGS] + [
    ("Dinov2WithRegistersModel", {"use_swiglu_ffn": True})
]


@pytest.mark.parametrize(
    ("architecture", "config", "name"),
    [(a, config, name) for a, config in VARIANTS for name in tensor_classes(a, **config)],
    ids=lambda value: value if isinstance(value, str) else "swiglu" if value else "",
)
def test_dropping_a_class_of_tensor_is_noticed(
    architecture: str, config: dict[str, Any], name: str, tmp_path: Path
) -> None:
    model = make(architecture, **config)
    save(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    parity_with(stored, model, tmp_path / "whole")
    dropped = {
        key: initial(key, tensor) if layered(key) == name else tensor
        for key, tensor in stored.items()
    }
    if re.search(r"\.(key|k_proj)\.bias$", name):
        # it shifts all scores of a query alike, which softmax does not see
        parity_with(dropped, model, tmp_path / "dropped")
        return
    with pytest.raises(AssertionError, match="wanted"):
        parity_with(dropped, model, tmp_path / "dropped")


SWAPS = (
    ("Dinov2WithRegistersModel", "norm1.", "norm2."),
    ("Dinov2WithRegistersModel", "layer_scale1.", "layer_scale2."),
    ("Dinov2WithRegistersModel", "attention.query.", "attention.key."),
    ("Dinov2WithRegistersModel", "attention.query.", "attention.value."),
    ("Dinov2WithRegistersModel", "layer.0.", "layer.1."),
    ("CLIPVisionModel", "q_proj.", "k_proj."),
    ("CLIPVisionModel", "v_proj.", "out_proj."),
    ("CLIPVisionModel", "pre_layrnorm.", "post_layernorm."),
    ("CLIPTextModel", "layer_norm1.", "layer_norm2."),
    ("ViTModel", "layernorm_before.", "layernorm_after."),
)


@pytest.mark.parametrize(("architecture", "one", "other"), SWAPS)
def test_swapping_two_classes_of_tensor_is_noticed(
    architecture: str, one: str, other: str, tmp_path: Path
) -> None:
    model = make(architecture)
    save(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    pairs = [(name, name.replace(one, other)) for name in stored if one in name]
    assert pairs
    swapped = dict(stored)
    for name, partner in pairs:
        swapped[name], swapped[partner] = stored[partner], stored[name]
    with pytest.raises(AssertionError, match="wanted"):
        parity_with(swapped, model, tmp_path / "swapped")


def test_swapping_gate_and_up_is_noticed(tmp_path: Path) -> None:
    model = make("Dinov2Model", use_swiglu_ffn=True)
    save(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    swapped = {
        name: torch.cat(tensor.chunk(2)[::-1]) if "weights_in" in name else tensor
        for name, tensor in stored.items()
    }
    with pytest.raises(AssertionError, match="wanted"):
        parity_with(swapped, model, tmp_path / "swapped")
