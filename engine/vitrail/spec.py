"""The whole model as plain values: what a checkpoint is, before a byte of its weights is read.

A spec holds numbers, strings and tuples only. It is frozen, it checks itself when made, and it
knows the name and shape of every canonical tensor. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from vitrail.errors import CheckpointError

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]
ACTIVATIONS: tuple[Activation, ...] = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")

MAX_LAYERS = 256
MAX_WIDTH = 65_536
MAX_TABLE = 16_777_216
MAX_IMAGE_SIDE = 16_384
MAX_PARAMETERS = 100_000_000_000

Shape = tuple[int, ...]


def _want(condition: bool, where: str, got: object, wanted: str) -> None:
    if not condition:
        raise CheckpointError(f"{where}: got {got!r}, wanted {wanted}")


def _count(where: str, value: object, low: int, high: int) -> None:
    good = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    _want(good, where, value, f"an integer from {low} to {high}")


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """A stack of pre-norm transformer blocks.

    ``mlp`` is the width between the two MLP matrices (after gating, where ``gated``).
    ``activation`` acts on the up projection, or on the gate where ``gated`` (SwiGLU: "silu").
    """

    width: int
    layers: int
    heads: int
    mlp: int
    activation: Activation
    eps: float
    gated: bool = False
    qkv_bias: bool = True
    layer_scale: bool = False
    causal: bool = False

    def __post_init__(self) -> None:
        _count("width", self.width, 1, MAX_WIDTH)
        _count("layers", self.layers, 1, MAX_LAYERS)
        _count("heads", self.heads, 1, self.width)
        _count("mlp", self.mlp, 1, 16 * MAX_WIDTH)
        _want(
            self.width % self.heads == 0,
            "heads",
            self.heads,
            f"a divisor of the width {self.width}",
        )
        _want(
            self.activation in ACTIVATIONS, "activation", self.activation, f"one of {ACTIVATIONS}"
        )
        _want(
            math.isfinite(self.eps) and 0 < self.eps < 1,
            "layer norm eps",
            self.eps,
            "a number in (0, 1)",
        )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def tensor_shapes(self, tower: str) -> dict[str, Shape]:
        """Canonical name, prefixed ``<tower>.blocks.<i>.``, -> shape of every tensor of it."""
        c, f = self.width, self.mlp
        block: dict[str, Shape] = {"norm1.weight": (c,), "norm1.bias": (c,)}
        for name in ("q", "k", "v"):
            block[f"{name}.weight"] = (c, c)
            if self.qkv_bias:
                block[f"{name}.bias"] = (c,)
        block |= {"out.weight": (c, c), "out.bias": (c,)}
        if self.layer_scale:
            block["scale1"] = (c,)
        block |= {"norm2.weight": (c,), "norm2.bias": (c,)}
        for name in ("gate", "up") if self.gated else ("up",):
            block |= {f"{name}.weight": (f, c), f"{name}.bias": (f,)}
        block |= {"down.weight": (c, f), "down.bias": (c,)}
        if self.layer_scale:
            block["scale2"] = (c,)
        return {
            f"{tower}.blocks.{layer}.{name}": shape
            for layer in range(self.layers)
            for name, shape in block.items()
        }


@dataclass(frozen=True, slots=True)
class PoolerSpec:
    """Transformers' ViT pooler: ``activation(W norm(class token) + b)``."""

    width: int
    activation: Literal["tanh"] | Activation

    def __post_init__(self) -> None:
        _count("pooler width", self.width, 1, MAX_WIDTH)
        _want(
            self.activation in (*ACTIVATIONS, "tanh"),
            "pooler activation",
            self.activation,
            f"one of {(*ACTIVATIONS, 'tanh')}",
        )


@dataclass(frozen=True, slots=True)
class VisionSpec:
    """An image tower. Tokens of a sequence: class, then registers, then patches row by row.

    ``image`` and ``patch`` are (height, width) in pixels. ``position_antialias``: how the position
    table is resized to another grid (bicubic, align_corners=False, fp32). ``norm``: the final
    LayerNorm is applied to every token ("tokens": ViT, DINOv2) or the pooled one ("pooled": CLIP).
    """

    blocks: BlockSpec
    image: tuple[int, int]
    patch: tuple[int, int]
    channels: int = 3
    registers: int = 0
    patch_bias: bool = True
    position_antialias: bool = False
    pre_norm: bool = False
    norm: Literal["tokens", "pooled"] = "tokens"
    projection: int | None = None
    pooler: PoolerSpec | None = None

    def __post_init__(self) -> None:
        for where, pair in (("image size", self.image), ("patch size", self.patch)):
            _want(isinstance(pair, tuple) and len(pair) == 2, where, pair, "(height, width)")
            for side in pair:
                _count(where, side, 1, MAX_IMAGE_SIDE)
        _want(
            self.patch[0] <= self.image[0] and self.patch[1] <= self.image[1],
            "patch size",
            self.patch,
            f"at most the image size {self.image}",
        )
        _count("channels", self.channels, 1, 1024)
        _count("registers", self.registers, 0, 1024)
        _count("position rows", self.positions, 2, MAX_TABLE)
        if self.projection is not None:
            _count("projection", self.projection, 1, MAX_WIDTH)
        _want(not self.blocks.causal, "vision attention", "causal", "full")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across at the checkpoint's own image size."""
        return self.grid_at(self.image)

    def grid_at(self, size: tuple[int, int]) -> tuple[int, int]:
        """Patches down and across for an image of ``size``; remainder pixels are dropped."""
        return size[0] // self.patch[0], size[1] // self.patch[1]

    @property
    def prefix(self) -> int:
        """Tokens before the first patch: the class token and the registers."""
        return 1 + self.registers

    def tokens_at(self, size: tuple[int, int]) -> int:
        down, across = self.grid_at(size)
        return self.prefix + down * across

    @property
    def positions(self) -> int:
        """Rows of the position table: one for the class token, one for each patch."""
        return 1 + self.grid[0] * self.grid[1]

    @property
    def patch_values(self) -> int:
        """Numbers in one patch: patch height x patch width x channels."""
        return self.patch[0] * self.patch[1] * self.channels

    @property
    def embedding(self) -> int:
        """Width of what ``encode_image`` returns."""
        return self.projection or self.blocks.width

    def tensor_shapes(self) -> dict[str, Shape]:
        c = self.blocks.width
        shapes: dict[str, Shape] = {
            "vision.class": (c,),
            "vision.position": (self.positions, c),
            "vision.patch.weight": (c, self.channels, *self.patch),
        }
        if self.patch_bias:
            shapes["vision.patch.bias"] = (c,)
        if self.registers:
            shapes["vision.registers"] = (self.registers, c)
        if self.pre_norm:
            shapes |= {"vision.pre_norm.weight": (c,), "vision.pre_norm.bias": (c,)}
        shapes |= self.blocks.tensor_shapes("vision")
        shapes |= {"vision.norm.weight": (c,), "vision.norm.bias": (c,)}
        if self.projection is not None:
            shapes["vision.projection.weight"] = (self.projection, c)
        if self.pooler is not None:
            shapes |= {
                "vision.pooler.weight": (self.pooler.width, c),
                "vision.pooler.bias": (self.pooler.width,),
            }
        return shapes


@dataclass(frozen=True, slots=True)
class TextSpec:
    """A text tower: embedding, causal blocks, final LayerNorm, pooled at one token.

    ``eos`` is the id whose first occurrence is pooled. None means the original CLIP rule (and
    transformers' for configs with ``eos_token_id == 2``): the first occurrence of the highest id.
    """

    blocks: BlockSpec
    vocab: int
    context: int
    eos: int | None
    projection: int | None = None

    def __post_init__(self) -> None:
        _count("vocabulary size", self.vocab, 1, MAX_TABLE)
        _count("context length", self.context, 1, MAX_TABLE)
        if self.eos is not None:
            _count("eos token id", self.eos, 0, self.vocab - 1)
        if self.projection is not None:
            _count("projection", self.projection, 1, MAX_WIDTH)
        _want(self.blocks.causal, "text attention", "full", "causal")

    @property
    def embedding(self) -> int:
        """Width of what ``encode_text`` returns."""
        return self.projection or self.blocks.width

    def tensor_shapes(self) -> dict[str, Shape]:
        c = self.blocks.width
        shapes: dict[str, Shape] = {
            "text.token": (self.vocab, c),
            "text.position": (self.context, c),
        }
        shapes |= self.blocks.tensor_shapes("text")
        shapes |= {"text.norm.weight": (c,), "text.norm.bias": (c,)}
        if self.projection is not None:
            shapes["text.projection.weight"] = (self.projection, c)
        return shapes


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """A linear classifier over the normalised tokens.

    ``features``: "class" (the class token) or "class_mean" (the class token, then the mean of the
    patch tokens, registers left out: DINOv2). ``scores``: what makes probabilities of the logits,
    "softmax", "sigmoid" where labels do not exclude one another, "none" for a regression.
    """

    labels: tuple[str, ...]
    features: Literal["class", "class_mean"]
    scores: Literal["softmax", "sigmoid", "none"] = "softmax"

    def __post_init__(self) -> None:
        _count("labels", len(self.labels), 1, MAX_TABLE)

    def tensor_shapes(self, width: int) -> dict[str, Shape]:
        inputs = width if self.features == "class" else 2 * width
        return {"head.weight": (len(self.labels), inputs), "head.bias": (len(self.labels),)}


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """From a decoded image to pixels, as the model family's processor does it.

    ``resize``: None, ("shortest", edge) or ("exact", height, width). ``resample`` is Pillow's code
    (0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 hamming). ``crop``: None or the centred
    (height, width), zero-padded where the image is smaller. Then ``x * rescale`` and
    ``(x - mean) / std`` a channel; None leaves the step out.
    """

    convert_rgb: bool
    resize: tuple[Literal["shortest"], int] | tuple[Literal["exact"], int, int] | None
    resample: int
    crop: tuple[int, int] | None
    rescale: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    def __post_init__(self) -> None:
        _count("resample", self.resample, 0, 5)
        if self.resize is not None:
            sides = self.resize[1:]
            _want(
                (self.resize[0], len(sides)) in (("shortest", 1), ("exact", 2)),
                "resize",
                self.resize,
                "('shortest', edge) or ('exact', height, width)",
            )
            for side in sides:
                _count("resize", side, 1, MAX_IMAGE_SIDE)
        if self.crop is not None:
            _want(len(self.crop) == 2, "crop size", self.crop, "(height, width)")
            for side in self.crop:
                _count("crop size", side, 1, MAX_IMAGE_SIDE)
        if self.rescale is not None:
            _want(
                math.isfinite(self.rescale) and self.rescale > 0,
                "rescale factor",
                self.rescale,
                "a finite number over 0",
            )
        _want(
            (self.mean is None) == (self.std is None),
            "image mean and std",
            self.mean,
            "both or neither",
        )
        if self.mean is not None and self.std is not None:
            _want(
                len(self.mean) == len(self.std) >= 1,
                "image std",
                self.std,
                "as many values as the mean",
            )
            _want(all(map(math.isfinite, self.mean)), "image mean", self.mean, "finite numbers")
            _want(
                all(math.isfinite(s) and s > 0 for s in self.std),
                "image std",
                self.std,
                "numbers over 0",
            )


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """All a checkpoint says of itself; ``architecture``: the class whose outputs are matched."""

    family: Literal["vit", "clip", "dinov2", "dinov2_with_registers"]
    architecture: str
    vision: VisionSpec | None = None
    text: TextSpec | None = None
    head: HeadSpec | None = None
    image: ImageSpec | None = None

    def __post_init__(self) -> None:
        _want(
            self.vision is not None or self.text is not None,
            "towers",
            None,
            "an image or a text tower",
        )
        if self.head is not None:
            _want(
                self.vision is not None,
                "classification head",
                self.head.features,
                "an image tower under it",
            )
        if self.vision is not None and self.text is not None:
            _want(
                self.vision.projection is not None
                and self.vision.projection == self.text.projection,
                "projections",
                (self.vision.projection, self.text.projection),
                "one width for both towers",
            )
        _want(
            self.parameters <= MAX_PARAMETERS,
            "parameters",
            self.parameters,
            f"at most {MAX_PARAMETERS} in all",
        )

    @property
    def contrastive(self) -> bool:
        """Two towers in one space, compared under a learnt temperature."""
        return self.vision is not None and self.text is not None

    def tensor_shapes(self) -> dict[str, Shape]:
        """Canonical name -> shape of every tensor the checkpoint must hold, once each."""
        shapes: dict[str, Shape] = {}
        if self.vision is not None:
            shapes |= self.vision.tensor_shapes()
        if self.text is not None:
            shapes |= self.text.tensor_shapes()
        if self.head is not None and self.vision is not None:
            shapes |= self.head.tensor_shapes(self.vision.blocks.width)
        if self.contrastive:
            shapes["logit_scale"] = ()
        return shapes

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries, lists and values, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelSpec:
        """The spec whose `to_dict` went through JSON. Raises CheckpointError for anything else."""
        try:
            made = cls(**{name: _part(name, value) for name, value in values.items()})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"spec: got {error}, wanted a spec's own fields") from error
        if _tuples(values) != _tuples(made.to_dict()):
            raise CheckpointError("spec: got fields left out, wanted every one")
        return made


_PARTS = {
    "vision": VisionSpec,
    "text": TextSpec,
    "head": HeadSpec,
    "image": ImageSpec,
    "blocks": BlockSpec,
    "pooler": PoolerSpec,
}


def _part(name: str, value: Any) -> Any:
    """A field's value from JSON's: lists become tuples, objects the part of the spec they are."""
    if isinstance(value, dict):
        return _PARTS[name](**{inner: _part(inner, one) for inner, one in value.items()})
    return _tuples(value)


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tuples(one) for name, one in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
