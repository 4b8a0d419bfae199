"""Helpers of many tests: the rules for numbers, and small models made by transformers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import tokenizers
import torch
import transformers
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    PreTrainedModel,
)

from vitrail.tools.agreement import compare

transformers.utils.logging.disable_progress_bar()

# -- the rules for numbers -------------------------------------------------------------------------

HALVES = (torch.float16, torch.bfloat16)

KERNEL_RTOL = 1e-5
KERNEL_ATOL = 1e-5
"""Relative to max|R|, for an operator in fp32."""


def rounding(reference: Tensor, dtype: torch.dtype) -> float:
    """eps(T) = max|(R + 0.3 - 0.3) - R|, computed in ``dtype``: a step of T at R's magnitude."""
    r = reference.to(dtype)
    return float(((r + 0.3 - 0.3) - r).double().abs().max()) if r.numel() else 0.0


def assert_close(
    ours: Tensor,
    reference: Tensor,
    peer: Tensor | None = None,
    *,
    what: Literal["kernel", "model", "scores"] = "kernel",
    name: str = "result",
) -> None:
    """Assert that ``ours`` is near ``reference`` (fp32 or fp64). No test has other tolerances.

    In fp32, without ``peer``: a kernel within rtol and atol of 1e-5 of max|R|, a model of 1e-4.
    In 16 bits ``peer`` is PyTorch's own result in that dtype. A kernel: at most twice the peer's
    largest error and 1.25 times its root mean square, plus rounding. A model (items along the first
    dimension; also fp32 outputs of a 16-bit model): at most twice the peer's error at mean, 99th
    percentile and maximum over the items, and the worst item's cosine; if there are 512 items, also
    after their mean is subtracted. Scores, which are too few or too alike for a cosine: only the
    errors.
    """
    _check_comparable(ours, reference, peer, what, name)
    r = reference.detach().double()
    y = ours.detach().double().to(r.device)  # on the reference's device: fast for large tensors
    if not r.numel():
        return
    if what != "kernel":
        dtype = torch.float32 if peer is None else peer.dtype
        reasons = compare(y, r, dtype, peer, cosines=what == "model").reasons
        assert not reasons, f"{name}: {'; '.join(reasons)}"
    elif peer is None:
        _assert_fp32(y, r, name)
    else:
        p = peer.detach().double().to(r.device)
        _assert_kernel(y, r, p, rounding(reference, peer.dtype), name)


def assert_codes(ours: Tensor, reference: Tensor, *, name: str = "codes") -> None:
    """Assert that int8 codes differ by at most 1, and in at most 0.1 % of the elements."""
    assert ours.dtype == reference.dtype == torch.int8, f"{name}: {ours.dtype}, {reference.dtype}"
    assert ours.shape == reference.shape, f"{name}: {tuple(ours.shape)}, {tuple(reference.shape)}"
    difference = (ours.int() - reference.to(ours.device).int()).abs()
    if difference.numel():
        largest, count = int(difference.max()), int(difference.count_nonzero())
        assert largest <= 1, f"{name}: codes differ by {largest}"
        assert count <= 1e-3 * difference.numel(), f"{name}: {count} codes differ"


def _check_comparable(
    ours: Tensor, reference: Tensor, peer: Tensor | None, what: str, name: str
) -> None:
    assert what in ("kernel", "model", "scores"), f"what: got {what!r}"
    assert reference.dtype in (torch.float32, torch.float64), (
        f"{name}: the reference is {reference.dtype}, wanted float32 or float64"
    )
    if peer is None:
        assert ours.dtype == torch.float32, f"{name}: {ours.dtype} needs PyTorch's own result"
    else:
        assert peer.dtype in HALVES, f"{name}: PyTorch's own result is {peer.dtype}"
        allowed = (peer.dtype,) if what == "kernel" else (peer.dtype, torch.float32)
        assert ours.dtype in allowed, f"{name}: got {ours.dtype}, wanted {peer.dtype}"
    for label, tensor in (("got", ours), ("reference", reference), ("PyTorch", peer)):
        if tensor is None:
            continue
        assert tensor.shape == reference.shape, (
            f"{name}: got {tuple(ours.shape)}, {label} {tuple(tensor.shape)}, "
            f"reference {tuple(reference.shape)}"
        )
        count = int((~torch.isfinite(tensor)).sum())
        assert count == 0, f"{name}: {label} holds {count} numbers that are not finite"


def _assert_fp32(y: Tensor, r: Tensor, name: str) -> None:
    top = float(r.abs().max())
    bound = KERNEL_RTOL * r.abs() + KERNEL_ATOL * top
    error = (y - r).abs()
    worst = int((error - bound).argmax())
    assert bool((error <= bound).all()), (
        f"{name}: {y.flatten()[worst]} for {r.flatten()[worst]} at {worst}: error "
        f"{error.flatten()[worst]:.3e}, wanted {bound.flatten()[worst]:.3e} of {top:.3g}"
    )


def _assert_kernel(y: Tensor, r: Tensor, p: Tensor, eps: float, name: str) -> None:
    worst, bound = float((y - r).abs().max()), 2 * float((p - r).abs().max()) + 2 * eps
    assert worst <= bound, f"{name}: largest error {worst:.3e}, wanted at most {bound:.3e}"
    rmse, bound = _rms(y - r), 1.25 * _rms(p - r) + eps / 10
    assert rmse <= bound, f"{name}: rms error {rmse:.3e}, wanted at most {bound:.3e}"


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


# -- small models ----------------------------------------------------------------------------------

VIT: Mapping[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "image_size": 32,
    "patch_size": 8,
}
DINOV2: Mapping[str, Any] = {
    **{key: value for key, value in VIT.items() if key != "intermediate_size"},
    "mlp_ratio": 2,
}
CLIP_VISION: Mapping[str, Any] = {**VIT, "projection_dim": 24}
CLIP_TEXT: Mapping[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 36,
    "projection_dim": 24,
    "vocab_size": 60,
    "max_position_embeddings": 12,
    "eos_token_id": 59,
    "bos_token_id": 58,
    "pad_token_id": 59,
}
REGISTERS: Mapping[str, Any] = {**DINOV2, "num_register_tokens": 3}
LABELS: Mapping[str, Any] = {"id2label": {i: f"label {i}" for i in range(7)}}

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "ViTModel": VIT,
    "ViTForImageClassification": {**VIT, **LABELS},
    "DeiTModel": VIT,
    "DeiTForImageClassification": {**VIT, **LABELS},
    "DeiTForImageClassificationWithTeacher": {**VIT, **LABELS},
    "CLIPModel": {"vision_config": CLIP_VISION, "text_config": CLIP_TEXT, "projection_dim": 20},
    "CLIPVisionModel": CLIP_VISION,
    "CLIPVisionModelWithProjection": CLIP_VISION,
    "CLIPTextModel": CLIP_TEXT,
    "CLIPTextModelWithProjection": CLIP_TEXT,
    "Dinov2Model": DINOV2,
    "Dinov2ForImageClassification": {**DINOV2, **LABELS},
    "Dinov2WithRegistersModel": REGISTERS,
    "Dinov2WithRegistersForImageClassification": {**REGISTERS, **LABELS},
}
"""A small config of every architecture; `make` merges its arguments into them."""

IMAGE_ARCHITECTURES = tuple(name for name in CONFIGS if "Text" not in name)
TEXT_ARCHITECTURES = ("CLIPModel", "CLIPTextModel", "CLIPTextModelWithProjection")


def make(architecture: str, *, seed: int = 0, **config: Any) -> Any:
    """A perturbed model of a transformers class: `CONFIGS` with ``config`` over it.

    ``vision`` and ``text`` are merged into the towers of a CLIPModel; ``add_pooling_layer`` goes to
    the constructor of ViTModel or DeiTModel. Attention is eager: plain softmax, not the fused
    function that the engine calls too.
    """
    cls = getattr(transformers, architecture)
    build = {key: config.pop(key) for key in ("add_pooling_layer",) if key in config}
    values = {**CONFIGS[architecture]}
    for tower in ("vision", "text"):
        if tower in config:
            values[f"{tower}_config"] = {**values[f"{tower}_config"], **config.pop(tower)}
    merged = cls.config_class(**(values | config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls._from_config(merged, attn_implementation="eager", **build)
    return perturb(model, seed=seed).eval()


def perturb(model: nn.Module, *, seed: int = 0) -> Any:
    """Make all parameters of ``model`` differ from their initial values. Returns ``model``.

    Transformers starts biases at 0, gammas and LayerScale at 1, matrices so small that attention is
    nearly uniform: a test would not notice if they were swapped or dropped. Vectors, positions,
    class token, registers and token tables gain noise of sd 0.2; a matrix becomes noise of sd
    1/sqrt(inputs), which keeps the scale of activations.
    """
    dice = torch.Generator().manual_seed(seed)
    matrices = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) in matrices:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=dice)
            else:
                noise = torch.empty_like(parameter).normal_(0, 0.2, generator=dice)
                parameter.add_(noise)
    return model


_NORMS = ("layernorm_before", "layer_norm1", "norm1"), ("layernorm_after", "layer_norm2", "norm2")
OUTLIERS = (32.0, 64.0, 256.0)


def with_outliers(model: nn.Module, *, seed: int = 0) -> Any:
    """Scale a few channels 32 to 256 fold and undo it in the next weight. Returns ``model``.

    The function stays the same, because the factors are powers of two. The activations between
    LayerNorm and the next matrix, and between values and the output projection, get the massive
    channels of trained vision transformers.
    """
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.modules():
            norms_before, norms_after = (
                [getattr(block, name) for name in names if hasattr(block, name)] for names in _NORMS
            )
            if not norms_before:
                continue
            *inputs, out = _projections(getattr(block, "self_attn", None) or block.attention)
            _scale(norms_before[0], inputs, dice)
            _scale(inputs[2], [out], dice)
            names = ("fc1", "gate_proj", "up_proj", "weights_in")
            ups = [getattr(block.mlp, name) for name in names if hasattr(block.mlp, name)]
            _scale(norms_after[0], ups, dice)
    return model


def _projections(attention: Any) -> list[nn.Linear]:
    """The projections to queries, keys and values, and the output projection."""
    if hasattr(attention, "q_proj"):
        out = getattr(attention, "out_proj", None) or attention.o_proj
        return [attention.q_proj, attention.k_proj, attention.v_proj, out]
    inner = attention.attention
    return [inner.query, inner.key, inner.value, attention.output.dense]


def _scale(writer: nn.Module, readers: list[Any], dice: torch.Generator) -> None:
    """Multiply a few output channels of ``writer``, and divide the readers' columns likewise."""
    channels = torch.randperm(writer.weight.shape[0], generator=dice)[: len(OUTLIERS)]
    for channel, factor in zip(channels.tolist(), OUTLIERS, strict=False):
        for parameter in (writer.weight, getattr(writer, "bias", None)):
            if parameter is not None:
                parameter[channel] *= factor
        for reader in readers:
            reader.weight[:, channel] /= factor


def save(
    model: PreTrainedModel,
    folder: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    shards: str = "50GB",
    dialect: Literal[4, 5] = 4,
) -> Any:
    """Write a checkpoint in ``dtype``, in files of ``shards``. Returns ``model``, in fp32 again.

    The model's weights stay rounded to ``dtype``. ``dialect``: 4 for the tensor names of
    transformers 4, which transformers 5 writes by default, or 5 for the names of its modules.
    """
    model.to(dtype).save_pretrained(
        folder, max_shard_size=shards, save_original_format=dialect == 4
    )
    return model.float()


@contextlib.contextmanager
def reference_numbers() -> Iterator[None]:
    """No gradients, and on a GPU no TF32 or reduced-precision sums."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    names = "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"
    before = [getattr(matmul, name) for name in (*names, "allow_tf32")], cudnn.allow_tf32
    try:
        for name in (*names, "allow_tf32"):
            setattr(matmul, name, False)
        cudnn.allow_tf32 = False
        with torch.no_grad():
            yield
    finally:
        for name, value in zip((*names, "allow_tf32"), before[0], strict=True):
            setattr(matmul, name, value)
        cudnn.allow_tf32 = before[1]


def texts_with_end(
    batch: int, length: int, *, vocab: int, eos: int, seed: int = 0, first: int = 0
) -> Tensor:
    """Ids (batch, length) int64: an end token at a random index of every row, junk after it.

    ``first``: the least index of the end token. The ids before it are below ``eos``; the ids after
    it are arbitrary and may be the end token.
    """
    dice = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (batch, length), generator=dice)
    ends = torch.randint(min(first, length - 1), length, (batch,), generator=dice)
    for row, end in zip(ids, ends.tolist(), strict=True):
        row[:end] = torch.randint(max(eos, 1), (end,), generator=dice)
        row[end] = eos
    return ids


# -- running both models ---------------------------------------------------------------------------


def outputs(model: Any, inputs: Mapping[str, Any]) -> Any:
    """The output of the transformers class, with hidden states."""
    options: dict[str, Any] = {"output_hidden_states": True}
    if "pixel_values" in inputs and "Dinov2" not in type(model).__name__:
        options["interpolate_pos_encoding"] = _another_size(model, inputs["pixel_values"])
    with reference_numbers():
        return model(**inputs, **options)


def _another_size(model: Any, pixels: Tensor) -> bool:
    size = getattr(model.config, "vision_config", model.config).image_size
    native = tuple(size) if isinstance(size, list | tuple) else (size, size)
    return tuple(pixels.shape[2:]) != native


def assert_same(ours: Any, theirs: Any, peer: Any = None, where: str = "") -> None:
    """Assert that ``ours`` has the fields of ``theirs``, within N2 (or N5 with ``peer``)."""
    named = {field.name: getattr(ours, field.name) for field in dataclasses.fields(ours)}
    fields = {key: value for key, value in named.items() if value is not None and key != "status"}
    wanted = sorted(theirs.keys())
    assert sorted(fields) == wanted, f"{where}: {sorted(fields)}, not {wanted}"
    for key, value in theirs.items():
        name, peer_value = f"{where}{key}", None if peer is None else peer[key]
        if isinstance(value, Tensor):
            what = "scores" if key.startswith("logits") else "model"
            assert_close(fields[key], value, peer_value, what=what, name=name)
        elif isinstance(value, tuple):
            assert isinstance(fields[key], tuple), name
            assert len(fields[key]) == len(value), name
            for i, (a, b) in enumerate(zip(fields[key], value, strict=True)):
                peer_state = None if peer_value is None else peer_value[i]
                assert_close(a, b, peer_state, what="model", name=f"{name}[{i}]")
        else:
            assert_same(fields[key], value, peer_value, f"{name}.")


def arguments(
    architecture: str,
    config: Any,
    *,
    batch: int = 3,
    size: tuple[int, int] | None = None,
    length: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Pixels and ids for an architecture. The ids are those of `texts_with_end`."""
    inputs: dict[str, Any] = {}
    dice = torch.Generator().manual_seed(seed)
    if architecture in IMAGE_ARCHITECTURES:
        vision = getattr(config, "vision_config", config)
        side = vision.image_size
        height, width = size or (side if isinstance(side, list | tuple) else (side, side))
        shape = (batch, vision.num_channels, height, width)
        inputs["pixel_values"] = torch.randn(shape, generator=dice)
    if architecture in TEXT_ARCHITECTURES:
        text = getattr(config, "text_config", config)
        legacy = text.eos_token_id == 2
        inputs["input_ids"] = texts_with_end(
            batch + 1 if architecture == "CLIPModel" else batch,
            length or text.max_position_embeddings,
            vocab=text.vocab_size,
            eos=text.vocab_size - 1 if legacy else text.eos_token_id,
            seed=seed,
        )
    return inputs


def image_embedding(model: Any, pixels: Tensor) -> Tensor:
    """The tensor of each transformers class that `encode_image` returns."""
    name, inputs = type(model).__name__, {"pixel_values": pixels}
    if name == "CLIPModel":
        with reference_numbers():
            resized = _another_size(model, pixels)
            return model.get_image_features(pixels, interpolate_pos_encoding=resized).pooler_output
    if name.startswith("CLIP"):
        out = outputs(model, inputs)
        return out.image_embeds if "WithProjection" in name else out.pooler_output
    return outputs(model.base_model, inputs).last_hidden_state[:, 0]


def text_embedding(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The tensor of each transformers class that `encode_text` returns."""
    name = type(model).__name__
    with reference_numbers():
        if name == "CLIPModel":
            return model.get_text_features(ids, attention_mask=mask).pooler_output
        out = model(ids, attention_mask=mask)
        return out.text_embeds if "WithProjection" in name else out.pooler_output


# -- a complete CLIP folder ------------------------------------------------------------------------

_CORPUS = """
A photo of a cat and a dog on the red mat near the window, and a picture of the sea at night.
Stained glass windows of a church: blue, green, yellow and white panes; don't they look old?
"""
_SPLIT = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


@functools.cache
def small_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A trained byte-level BPE in CLIP's order: bytes, bytes ending a word, merges, BOS, EOS."""
    backend = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=640, end_of_word_suffix="</w>", min_frequency=1, show_progress=False
    )
    backend.train_from_iterator([_CORPUS], trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), BOS, EOS]
    return {name: number for number, name in enumerate(dict.fromkeys(names))}, merges


def clip_folder(
    folder: Path, *, eos_token_id: int | None = None, size: int = 32, seed: int = 0, **config: Any
) -> tuple[CLIPModel, CLIPProcessor]:
    """A complete CLIPModel checkpoint in ``folder``, with tokenizer and image processor, by
    transformers. ``config`` as in `make`; ``size``: shortest edge and crop of the processor;
    ``eos_token_id``: 2 for the legacy rule.
    """
    vocab, merges = small_vocabulary()
    eos = vocab[EOS]
    text = {
        "vocab_size": len(vocab),
        "max_position_embeddings": 40,
        "eos_token_id": eos if eos_token_id is None else eos_token_id,
        "bos_token_id": vocab[BOS],
        "pad_token_id": eos,
    }
    model = make("CLIPModel", seed=seed, **({"text": text} | config))
    save(model, folder)
    processor = CLIPProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        ),
        tokenizer=CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=40),
    )
    processor.save_pretrained(folder)
    return model, processor
