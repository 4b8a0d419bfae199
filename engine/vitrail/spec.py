"""The whole model as plain values, before a byte of its weights is read.

A spec holds numbers, strings and tuples only. It is frozen, it checks itself when it is made, and
it knows the name and shape of every canonical tensor. Nothing here imports torch.
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

Features = Literal["class", "class_mean", "class_distillation"]
"""The input of a classifier: the class token; the class token and the mean of the patch tokens; the
class token and the distillation token, each with a classifier of its own."""

OutputField = Literal["last_hidden_state", "pooler_output", "image_embeds", "text_embeds", "logits"]


def _check(*rows: tuple[bool, str, object, str]) -> None:
    """Raise CheckpointError for the first row (condition, name, ...) with a false condition."""
    for holds, name, value, wanted in rows:
        if not holds:
            raise CheckpointError(f"{name}: got {value!r}, wanted {wanted}")


def _check_counts(*rows: tuple[str, object, int, int]) -> None:
    """Raise CheckpointError for the first value that is no integer from its low to its high."""
    for name, value, low, high in rows:
        holds = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        _check((holds, name, value, f"an integer from {low} to {high}"))


def _shapes(name: str, rows: int, *columns: int, bias: bool = True) -> dict[str, Shape]:
    """The weight (rows, columns) and the bias (rows,) of a linear or a LayerNorm."""
    shapes: dict[str, Shape] = {f"{name}.weight": (rows, *columns)}
    return shapes | ({f"{name}.bias": (rows,)} if bias else {})


def _int8_shapes(name: str, rows: int, columns: int, *, smooth: bool) -> dict[str, Shape]:
    """The tensors of an int8 linear."""
    shapes: dict[str, Shape] = {f"{name}.codes": (rows, columns), f"{name}.scale": (rows,)}
    if not smooth:
        return shapes | {f"{name}.bias": (rows,)}
    return shapes | {f"{name}.smooth": (columns,), f"{name}.folded_bias": (rows,)}


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """A stack of pre-norm transformer blocks.

    ``mlp`` is the width between the two MLP matrices (after gating, if ``gated``).
    ``activation`` acts on the up projection, or on the gate if ``gated`` (SwiGLU: "silu").
    ``int8``: the linears whose weights are int8 codes, in order, for example ("0.qkv", "0.up",
    "0.down") for those of block 0. The up projection of an int8 down projection is int8 too. Of the
    last block only qkv may be: its other linears act on few tokens.
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
    int8: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_counts(
            ("width", self.width, 1, MAX_WIDTH),
            ("layers", self.layers, 1, MAX_LAYERS),
            ("heads", self.heads, 1, self.width),
            ("mlp", self.mlp, 1, 16 * MAX_WIDTH),
        )
        divides, eps = self.width % self.heads == 0, self.eps
        activation = self.activation
        _check(
            (divides, "heads", self.heads, f"a divisor of the width {self.width}"),
            (activation in ACTIVATIONS, "activation", activation, f"one of {ACTIVATIONS}"),
            (math.isfinite(eps) and 0 < eps < 1, "layer norm eps", eps, "a number in (0, 1)"),
        )
        self._check_int8()

    def _check_int8(self) -> None:
        order = [name for name in self.int8_candidates if name in self.int8]
        alone = [name for name in self.int8 if name.endswith(".down")]
        alone = [name for name in alone if name.replace("down", "up") not in self.int8]
        _check(
            (list(self.int8) == order, "int8 linears", self.int8, "names of linears, in order"),
            (not alone, "int8 linears", alone, "the up projection of each down projection too"),
        )

    @property
    def int8_candidates(self) -> tuple[str, ...]:
        """Every linear that may be int8, in order. A causal tower has none."""
        if self.causal:
            return ()
        *full_blocks, last_block = range(self.layers)
        names = [f"{block}.{name}" for block in full_blocks for name in ("qkv", "up", "down")]
        return (*names, f"{last_block}.qkv")

    def is_int8(self, layer: int, linear: str) -> bool:
        """Whether ``linear`` ("qkv", "up" or "down") of block ``layer`` is int8."""
        return f"{layer}.{linear}" in self.int8

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def tensor_shapes(self, tower: str) -> dict[str, Shape]:
        """Canonical name, such as ``vision.blocks.0.q.weight``, -> shape of every tensor.

        An int8 linear has ``codes`` (N, K) and a ``scale`` (N,) for each row. After a LayerNorm,
        whose gamma the codes contain, it has the factor ``smooth`` (K,) of each column of the
        normalized input, and ``folded_bias`` (N,), which contains beta, in place of a ``bias``.
        """
        return {
            f"{tower}.blocks.{layer}.{name}": shape
            for layer in range(self.layers)
            for name, shape in self._block_shapes(layer).items()
        }

    def _block_shapes(self, layer: int) -> dict[str, Shape]:
        c, f = self.width, self.mlp
        up_rows = 2 * f if self.gated else f
        int8 = {name: self.is_int8(layer, name) for name in ("qkv", "up", "down")}
        separate_q = layer == self.layers - 1  # a pooled plan computes it apart from keys, values
        block: dict[str, Shape] = {}
        if not int8["qkv"] or separate_q:
            block |= _shapes("norm1", c)
        for name in ("q", "k", "v"):
            if not int8["qkv"] or (separate_q and name == "q"):
                block |= _shapes(name, c, c, bias=self.qkv_bias)
        if int8["qkv"]:
            block |= _int8_shapes("qkv", 3 * c, c, smooth=True)
        block |= _shapes("out", c, c)
        if self.layer_scale:
            block["scale1"] = (c,)
        if int8["up"]:
            block |= _int8_shapes("up", up_rows, c, smooth=True)
        else:
            block |= _shapes("norm2", c)
            for name in ("gate", "up") if self.gated else ("up",):
                block |= _shapes(name, f, c)
        block |= _int8_shapes("down", c, f, smooth=False) if int8["down"] else _shapes("down", c, f)
        if self.layer_scale:
            block["scale2"] = (c,)
        return block


@dataclass(frozen=True, slots=True)
class PoolerSpec:
    """The dense pooler of transformers' ViT: ``activation(W norm(class token) + b)``."""

    width: int
    activation: Literal["tanh"] | Activation

    def __post_init__(self) -> None:
        _check_counts(("pooler width", self.width, 1, MAX_WIDTH))
        allowed, activation = (*ACTIVATIONS, "tanh"), self.activation
        _check((activation in allowed, "pooler activation", activation, f"one of {allowed}"))


@dataclass(frozen=True, slots=True)
class VisionSpec:
    """An image tower. Tokens of a sequence: class, distillation, registers, patches row by row.

    ``image`` and ``patch`` are (height, width) in pixels. ``position_antialias``: whether the
    resizing of the position table to another patch grid antialiases (it is bicubic, in fp32, with
    align_corners=False). ``norm``: the final LayerNorm is applied to every token ("tokens") or to
    the pooled token alone ("pooled": CLIP).
    ``distillation``: there is a distillation token. Unlike registers, it has a position.
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
    distillation: bool = False

    def __post_init__(self) -> None:
        for name, pair in (("image size", self.image), ("patch size", self.patch)):
            is_pair = isinstance(pair, tuple) and len(pair) == 2
            _check((is_pair, name, pair, "(height, width)"))
            _check_counts(*((name, side, 1, MAX_IMAGE_SIDE) for side in pair))
        fits = self.patch[0] <= self.image[0] and self.patch[1] <= self.image[1]
        _check((fits, "patch size", self.patch, f"at most the image size {self.image}"))
        _check_counts(
            ("channels", self.channels, 1, 1024),
            ("registers", self.registers, 0, 1024),
            ("position rows", self.positions, 2, MAX_TABLE),
            ("projection", self.embedding, 1, MAX_WIDTH),
        )
        _check((not self.blocks.causal, "vision attention", "causal", "full"))

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across at the checkpoint's own image size."""
        return self.grid_at(self.image)

    def grid_at(self, size: tuple[int, int]) -> tuple[int, int]:
        """Patches down and across an image of ``size``; remainder pixels are dropped."""
        return size[0] // self.patch[0], size[1] // self.patch[1]

    @property
    def prefix(self) -> int:
        """Tokens before the first patch: class token, distillation token and registers."""
        return self.positioned + self.registers

    @property
    def positioned(self) -> int:
        """Tokens before the first patch that have a position: all but the registers."""
        return 1 + self.distillation

    def tokens_at(self, size: tuple[int, int]) -> int:
        down, across = self.grid_at(size)
        return self.prefix + down * across

    @property
    def positions(self) -> int:
        """Rows of the position table: every token but the registers."""
        return self.positioned + self.grid[0] * self.grid[1]

    @property
    def patch_values(self) -> int:
        """Numbers in a patch: patch height x patch width x channels."""
        return self.patch[0] * self.patch[1] * self.channels

    @property
    def embedding(self) -> int:
        """Width of the embeddings that ``encode_image`` returns."""
        return self.blocks.width if self.projection is None else self.projection

    def tensor_shapes(self) -> dict[str, Shape]:
        c = self.blocks.width
        shapes: dict[str, Shape] = {"vision.class": (c,), "vision.position": (self.positions, c)}
        shapes |= _shapes("vision.patch", c, self.channels, *self.patch, bias=self.patch_bias)
        if self.distillation:
            shapes["vision.distillation"] = (c,)
        if self.registers:
            shapes["vision.registers"] = (self.registers, c)
        if self.pre_norm:
            shapes |= _shapes("vision.pre_norm", c)
        shapes |= self.blocks.tensor_shapes("vision") | _shapes("vision.norm", c)
        if self.projection is not None:
            shapes |= _shapes("vision.projection", self.projection, c, bias=False)
        if self.pooler is not None:
            shapes |= _shapes("vision.pooler", self.pooler.width, c)
        return shapes


@dataclass(frozen=True, slots=True)
class TextSpec:
    """A text tower: embedding, causal blocks, final LayerNorm, pooled at a single token.

    ``eos`` is the id whose first occurrence is pooled. If it is None, the first occurrence of the
    highest id is pooled: the rule of OpenAI's CLIP, and of transformers if ``eos_token_id`` is 2.
    """

    blocks: BlockSpec
    vocab: int
    context: int
    eos: int | None
    projection: int | None = None

    def __post_init__(self) -> None:
        _check_counts(
            ("vocabulary size", self.vocab, 1, MAX_TABLE),
            ("context length", self.context, 1, MAX_TABLE),
            ("eos token id", 0 if self.eos is None else self.eos, 0, self.vocab - 1),
            ("projection", self.embedding, 1, MAX_WIDTH),
        )
        _check((self.blocks.causal, "text attention", "full", "causal"))

    @property
    def embedding(self) -> int:
        """Width of the embeddings that ``encode_text`` returns."""
        return self.blocks.width if self.projection is None else self.projection

    def tensor_shapes(self) -> dict[str, Shape]:
        c = self.blocks.width
        shapes: dict[str, Shape] = {
            "text.token": (self.vocab, c),
            "text.position": (self.context, c),
        }
        shapes |= self.blocks.tensor_shapes("text") | _shapes("text.norm", c)
        if self.projection is not None:
            shapes |= _shapes("text.projection", self.projection, c, bias=False)
        return shapes


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """A linear classifier over the normalized tokens, or the mean of two classifiers.

    ``scores`` turns logits into probabilities: "softmax"; "sigmoid" if labels do not exclude each
    other; "none" for a regression.
    """

    labels: tuple[str, ...]
    features: Features
    scores: Literal["softmax", "sigmoid", "none"] = "softmax"

    def __post_init__(self) -> None:
        _check_counts(("labels", len(self.labels), 1, MAX_TABLE))

    @property
    def folded(self) -> bool:
        """Whether each classifier reads a single token, so that LayerNorm folds into it."""
        return self.features != "class_mean"

    @property
    def linears(self) -> tuple[str, ...]:
        """The canonical names of the classifiers."""
        two = self.features == "class_distillation"
        return ("head.class", "head.distillation") if two else ("head",)

    def tensor_shapes(self, width: int) -> dict[str, Shape]:
        inputs = width if self.folded else 2 * width
        shapes: dict[str, Shape] = {}
        for name in self.linears:
            shapes |= _shapes(name, len(self.labels), inputs)
        return shapes


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """The steps by which the family's image processor turns a decoded image into pixels.

    ``resize``: None, ("shortest", edge) or ("exact", height, width). ``resample`` is Pillow's code
    (0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 hamming). ``crop``: None or the central
    (height, width), padded with zeros if the image is smaller. The last steps are ``x * rescale``
    and ``(x - mean) / std`` per channel; None skips the step.
    """

    convert_rgb: bool
    resize: tuple[Literal["shortest"], int] | tuple[Literal["exact"], int, int] | None
    resample: int
    crop: tuple[int, int] | None
    rescale: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    def __post_init__(self) -> None:
        _check_counts(("resample", self.resample, 0, 5))
        if self.resize is not None:
            mode, *sides = self.resize
            valid = (mode, len(sides)) in (("shortest", 1), ("exact", 2))
            _check((valid, "resize", self.resize, "('shortest', edge) or ('exact', height, width)"))
            _check_counts(*(("resize", side, 1, MAX_IMAGE_SIDE) for side in sides))
        if self.crop is not None:
            _check((len(self.crop) == 2, "crop size", self.crop, "(height, width)"))
            _check_counts(*(("crop size", side, 1, MAX_IMAGE_SIDE) for side in self.crop))
        if (rescale := self.rescale) is not None:
            positive = math.isfinite(rescale) and rescale > 0
            _check((positive, "rescale factor", rescale, "a finite number over 0"))
        mean, std = self.mean, self.std
        _check(((mean is None) == (std is None), "image mean and std", mean, "both or neither"))
        if mean is not None and std is not None:
            positive = all(math.isfinite(value) and value > 0 for value in std)
            _check(
                (len(mean) == len(std) >= 1, "image std", std, "as many values as the mean"),
                (all(map(math.isfinite, mean)), "image mean", mean, "finite numbers"),
                (positive, "image std", std, "numbers over 0"),
            )


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The complete description of a checkpoint's model.

    ``architecture``: the transformers class whose outputs Vitrail matches. ``outputs``: the fields
    of that class's output; for a CLIPModel, the fields of both towers' outputs. ``features``: the
    input of the class's classifier, which `forward` returns as logits if the checkpoint has no
    labels; None for a class without a classifier.
    """

    family: str
    architecture: str
    vision: VisionSpec | None = None
    text: TextSpec | None = None
    head: HeadSpec | None = None
    image: ImageSpec | None = None
    outputs: tuple[OutputField, ...] = ()
    features: Features | None = None

    def __post_init__(self) -> None:
        vision, text, head = self.vision, self.text, self.head
        _check((bool(vision or text), "towers", None, "an image or a text tower"))
        if head is not None:
            fits = vision is not None and len(head.linears) <= vision.positioned
            _check(
                (
                    vision is not None,
                    "classification head",
                    head.features,
                    "an image tower under it",
                ),
                (fits, "classification head", head.features, "a distillation token under it"),
            )
        if vision is not None and text is not None:
            widths = vision.projection, text.projection
            shared = widths[0] is not None and widths[0] == widths[1]
            _check((shared, "projections", widths, "one width for both towers"))
        total, limit = self.parameters, f"at most {MAX_PARAMETERS} in all"
        _check((total <= MAX_PARAMETERS, "parameters", total, limit))

    @property
    def int8(self) -> bool:
        """Whether any linear is int8."""
        return self.vision is not None and bool(self.vision.blocks.int8)

    def with_int8(self, linears: tuple[str, ...]) -> ModelSpec:
        """The same model with these int8 linears in the image tower (`BlockSpec.int8`)."""
        if self.vision is None:
            raise CheckpointError(f"int8 linears: got {self.architecture}, wanted an image tower")
        blocks = dataclasses.replace(self.vision.blocks, int8=linears)
        return dataclasses.replace(self, vision=dataclasses.replace(self.vision, blocks=blocks))

    @property
    def contrastive(self) -> bool:
        """Whether two towers embed into a shared space, with a learned temperature (CLIP)."""
        return self.vision is not None and self.text is not None

    def tensor_shapes(self) -> dict[str, Shape]:
        """Canonical name -> shape of every tensor that the checkpoint must hold."""
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
        """The number of parameters before any linear became int8."""
        model = self.with_int8(()) if self.int8 else self
        return sum(math.prod(shape) for shape in model.tensor_shapes().values())

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries, lists and values, ready for JSON.

        A tower without int8 linears does not mention them.
        """
        values = dataclasses.asdict(self)
        for tower in (values["vision"], values["text"]):
            if tower is not None and not tower["blocks"]["int8"]:
                del tower["blocks"]["int8"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelSpec:
        """The spec whose `to_dict` went through JSON. Raises CheckpointError for anything else."""
        try:
            spec = cls(**{name: _field(name, value) for name, value in values.items()})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"spec: got {error}, wanted a spec's own fields") from error
        if _tuples(values) != _tuples(spec.to_dict()):
            raise CheckpointError("spec: got fields left out, wanted every one")
        return spec


_CLASSES = {
    "vision": VisionSpec,
    "text": TextSpec,
    "head": HeadSpec,
    "image": ImageSpec,
    "blocks": BlockSpec,
    "pooler": PoolerSpec,
}


def _field(name: str, value: Any) -> Any:
    """A field's value from JSON: lists become tuples, objects become specs."""
    if isinstance(value, dict):
        return _CLASSES[name](**{inner: _field(inner, item) for inner, item in value.items()})
    return _tuples(value)


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
