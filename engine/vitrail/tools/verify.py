"""``vitrail verify``: a model on a user's own images and texts, against transformers' own.

The one module that may import transformers, where it is installed: comparing with it is its
purpose. Without transformers the reference is the engine itself in fp32, which sees
what fewer bits cost and nothing that the two have in common.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor, nn

from vitrail.checkpoint.contents import EXPORT
from vitrail.errors import ImageError, InputError
from vitrail.image import decoding
from vitrail.jobs.listing import Source, path_text
from vitrail.model.loading import load
from vitrail.model.model import Model
from vitrail.tools.agreement import CORPUS, Agreement, agree

if TYPE_CHECKING:
    from vitrail.spec import BlockSpec, ImageSpec

Verdict = Literal["pass", "fail", "note"]

CHUNK = 16
HEADROOM = 4.0  # of fp16, under which the largest residual is worth a warning
LSB = 1.01  # pixels may be a step of 8 bits apart where Pillow 13 resamples in another order
FP16_MAX = 65504.0
FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": nn.functional.silu,
    "relu": nn.functional.relu,
}


@dataclass(frozen=True, slots=True)
class Check:
    """``facts`` are numbers behind the verdict, ready for JSON."""

    name: str
    verdict: Verdict
    text: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    reference: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.verdict != "fail" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        checks = [asdict(check) for check in self.checks]
        return {"passed": self.passed, "reference": self.reference, "checks": checks}


def verify(model: Model, images: Sequence[Source], texts: Sequence[str] = ()) -> Report:
    """Every check that the model's towers allow, on images by path and on texts.

    Raises InputError where no image can be read, or texts are given to a model that takes none.
    """
    if (model.folder / EXPORT).is_file():
        wanted = "the checkpoint that it was made of, which transformers reads"
        raise InputError(f"verify: got the exported folder {model.folder}, wanted {wanted}")
    theirs = _transformers()
    checks: list[Check] = []
    oracle = None if theirs is None else _oracle(theirs, model)
    if oracle is not None:
        checks += _contract(model, oracle)
    if model.spec.vision is not None and images:
        names, kept, bad = _readable(model, images)
        if bad:
            checks.append(Check("unreadable images", "note", f"{len(bad)} left out: {bad[0]}"))
        checks += _pixels(model, names, kept, theirs)
        checks += _vision(model, oracle, names, kept)
    if texts:
        checks += _texts(model, oracle, theirs, texts)
    if theirs is None:
        reference = "the engine in float32: transformers is not installed"
        told = "faults that float32 shares are not seen: pip install transformers, and run again"
        checks.append(Check("reference", "note", told))
    else:
        reference = f"transformers {theirs.__version__}, PyTorch {torch.__version__}"
    return Report(reference, tuple(checks))


def _transformers() -> ModuleType | None:
    try:
        module = importlib.import_module("transformers")
    except ImportError:
        return None
    module.utils.logging.set_verbosity_error()
    module.utils.logging.disable_progress_bar()
    return module


def _oracle(theirs: ModuleType, model: Model) -> Any:
    kind = getattr(theirs, model.spec.architecture, None)
    if kind is None:
        raise InputError(
            f"transformers {theirs.__version__} has no {model.spec.architecture}; a newer one may"
        )
    folder = str(model.folder)
    return kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


# -- what was derived from the configuration -------------------------------------------------------


def _contract(model: Model, oracle: Any) -> Iterator[Check]:
    """Values that numbers may be too coarse to show, read off transformers' modules."""
    towers: list[tuple[str, Any, Any]] = [
        ("image", model.spec.vision, getattr(oracle, "vision_model", oracle))
    ]
    if model.spec.text is not None:
        towers.append(("text", model.spec.text, getattr(oracle, "text_model", oracle)))
    wrong: list[str] = []
    for name, spec, module in towers:
        if spec is not None:
            wrong += (f"{name} {fault}" for fault in _block_faults(spec.blocks, module))
    text = "; ".join(wrong) or "LayerNorm eps, activations and heads are those of the modules"
    yield Check("contract", "fail" if wrong else "pass", text, {"differences": wrong})


def _block_faults(blocks: BlockSpec, module: nn.Module) -> Iterator[str]:
    eps = {m.eps for m in module.modules() if isinstance(m, nn.LayerNorm)}
    if eps != {blocks.eps}:
        yield f"LayerNorm eps: engine {blocks.eps:g}, transformers {sorted(eps)}"
    x = torch.linspace(-6, 6, 121)
    wanted = FORMULAS[blocks.activation](x)
    for owner in module.modules():
        for attribute in ("activation_fn", "intermediate_act_fn", "activation"):
            act: Any = getattr(owner, attribute, None)
            in_block = callable(act) and "Pooler" not in type(owner).__name__
            if in_block and not torch.allclose(act(x), wanted, atol=1e-6):
                yield f"activation: engine {blocks.activation}, transformers {type(act).__name__}"
                return
    heads = {
        getattr(m, name)
        for m in module.modules()
        for name in ("num_heads", "num_attention_heads")
        if isinstance(getattr(m, name, None), int)
    }
    if heads and heads != {blocks.heads}:
        yield f"heads: engine {blocks.heads}, transformers {sorted(heads)}"


# -- pixels ----------------------------------------------------------------------------------------


def _readable(
    model: Model, images: Sequence[Source]
) -> tuple[list[str], list[Image.Image], list[str]]:
    """Names and upright pictures of the images that can be read, and why the others cannot."""
    assert model.spec.vision is not None, "images are verified where there is an image tower"
    names, kept, bad = [], [], []
    for image in images:
        try:
            pixels = decoding.decode(image, channels=model.spec.vision.channels)
        except ImageError as error:
            bad.append(str(error))
            continue
        names.append(path_text(image))
        kept.append(Image.fromarray(pixels.squeeze() if pixels.shape[2] == 1 else pixels))
    if not names:
        raise InputError(f"none of {len(images)} images can be read; the first: {bad[0]}")
    return names, kept, bad


def _pixels(
    model: Model, names: list[str], kept: list[Image.Image], theirs: ModuleType | None
) -> Iterator[Check]:
    spec = model.spec.image
    if spec is None:
        yield Check("pixels", "note", "no preprocessor in the folder: nothing to compare")
        return
    ours = _each_preprocessed(model, kept)
    yield _against(
        "Pillow", f"Pillow {PIL.__version__}", ours, [_pillow(i, spec) for i in kept], spec, names
    )
    if theirs is None:
        return
    try:
        processor = theirs.AutoImageProcessor.from_pretrained(
            str(model.folder), local_files_only=True, **_slow(theirs)
        )
    except ImportError as error:  # some versions want torchvision even for processors without it
        why = " ".join(str(error).split())
        told = f"not compared with transformers {theirs.__version__}: {why[:200]}"
        yield Check("pixels, processor", "note", told)
        return
    made = [processor(images=i, return_tensors="np")["pixel_values"][0] for i in kept]
    yield _against("processor", type(processor).__name__, ours, made, spec, names)


def _slow(theirs: ModuleType) -> dict[str, Any]:
    """Of the two kinds of processors the one that uses Pillow, which checkpoints were made with."""
    five = int(theirs.__version__.split(".")[0]) >= 5
    return {"backend": "pil"} if five else {"use_fast": False}


def _each_preprocessed(model: Model, kept: list[Image.Image]) -> list[np.ndarray[Any, Any]]:
    return [model.preprocess(image)[0].numpy() for image in kept]


def _pillow(image: Image.Image, spec: ImageSpec) -> np.ndarray[Any, Any]:
    """The steps of the specification with the installed Pillow's own resize, as (C, H, W)."""
    if spec.resize is not None:
        if spec.resize[0] == "exact":
            height, width = spec.resize[1:]
        else:
            short, edge = min(image.size), spec.resize[1]
            width, height = (edge if s == short else int(edge * s / short) for s in image.size)
        image = image.resize((width, height), Image.Resampling(spec.resample))
    if spec.crop is not None:
        down, across = spec.crop
        left, top = (image.width - across) // 2, (image.height - down) // 2
        image = image.crop((left, top, left + across, top + down))
    values = np.atleast_3d(np.asarray(image)).astype(np.float64).transpose(2, 0, 1)
    if spec.rescale is not None:
        values = values * spec.rescale
    if spec.mean is not None and spec.std is not None:
        mean, std = (np.array(v).reshape(-1, 1, 1) for v in (spec.mean, spec.std))
        values = (values - mean) / std
    return values


def _against(
    name: str,
    other: str,
    ours: Sequence[np.ndarray[Any, Any]],
    made: Sequence[np.ndarray[Any, Any]],
    spec: ImageSpec,
    names: Sequence[str],
) -> Check:
    """Differences in steps of 8 bits; one step is what Pillow 13's other order of passes makes."""
    step = (spec.rescale or 1.0) / np.array(spec.std or (1.0,)).reshape(-1, 1, 1)
    if any(a.shape != b.shape for a, b in zip(ours, made, strict=True)):
        at = next(i for i, (a, b) in enumerate(zip(ours, made, strict=True)) if a.shape != b.shape)
        shapes = f"engine {ours[at].shape}, {other} {made[at].shape}"
        return Check(f"pixels, {name}", "fail", f"{names[at]}: sizes differ: {shapes}")
    apart = [np.abs(a - b) / step for a, b in zip(ours, made, strict=True)]
    largest = [float(a.max()) for a in apart]
    worst = int(np.argmax(largest))
    differing = float(np.mean([(a > 0.5).mean() for a in apart]))
    facts = {
        "largest": largest[worst],
        "differing": differing,
        "worst": names[worst],
        "with": other,
    }
    if max(largest) > LSB:
        text = f"{other}: up to {largest[worst]:.1f} steps of 8 bits apart, {names[worst]}"
        return Check(f"pixels, {name}", "fail", text, facts)
    text = "the same" if differing == 0 else f"{differing:.2%} of values one step of 8 bits apart"
    return Check(f"pixels, {name}", "pass", f"{other}: {text}", facts)


# -- numbers ---------------------------------------------------------------------------------------


def _vision(
    model: Model, oracle: Any, names: list[str], kept: list[Image.Image]
) -> Iterator[Check]:
    pixels = [torch.from_numpy(p)[None] for p in _each_preprocessed(model, kept)]
    ours = torch.cat([model.encode_image(p) for p in pixels])
    reference, peer = _both(model, oracle, "encode_image", image_embedding, pixels)
    if reference is not None:
        found = agree(ours, reference, model.dtype, peer)
        where = "" if not found.reasons else _first_block(model, oracle, pixels[found.worst])
        yield _numbers("images", found, names, model.dtype, where)
    whole = model.encode_image(kept)
    ends = agree(whole, ours, torch.float32 if model.dtype == torch.float32 else torch.bfloat16)
    yield _numbers("images, from files", ends, names, model.dtype, "")
    yield _headroom(model, pixels, names)


def _both(
    model: Model,
    oracle: Any,
    call: str,
    embed: Callable[[Any, Tensor], Tensor],
    inputs: Sequence[Tensor],
) -> tuple[Tensor | None, Tensor | None]:
    """The reference in fp32 and PyTorch's own in the engine's 16 bits; None: not to be had."""
    half = model.dtype != torch.float32
    if oracle is None:
        if not half:
            return None, None
        full = load(model.folder, device="cpu", dtype="float32")
        return torch.cat([getattr(full, call)(x) for x in inputs]), None
    with torch.inference_mode():
        reference = torch.cat([embed(oracle, x).float() for x in inputs])
        if not half:
            return reference, None
        small = copy.deepcopy(oracle).to(model.dtype)
        cast = [x.to(model.dtype) if x.is_floating_point() else x for x in inputs]
        return reference, torch.cat([embed(small, x) for x in cast])


def _numbers(
    name: str, found: Agreement, names: Sequence[str], dtype: torch.dtype, where: str
) -> Check:
    few = dtype != torch.float32 and found.items < CORPUS
    text = (
        f"cosine mean {found.cosine_mean:.7f}, worst {found.cosine_worst:.7f} "
        f"({names[found.worst]}), largest error {found.error:.1e} of the largest value"
    )
    if few:
        text += f"; indicative, {found.items} of {CORPUS} items"
    if found.reasons:
        text = f"{'; '.join(found.reasons)}{where}; {text}"
    facts = asdict(found) | {"worst": names[found.worst]}
    return Check(name, "fail" if found.reasons else "pass", text, facts)


def _first_block(model: Model, oracle: Any, pixels: Tensor) -> str:
    """The first block whose output is off, on the image that is off most."""
    if oracle is None:
        return ""
    ours = _hidden(model.forward(pixels, output_hidden_states=True))
    with torch.inference_mode():
        tower = getattr(oracle, "vision_model", oracle)
        theirs = tower(pixels, output_hidden_states=True).hidden_states
    bound = 1e-4 if model.dtype == torch.float32 else 0.05
    for block, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if float((a.float().cpu() - b).abs().max()) > bound * float(b.abs().max()):
            return f"; first off after {'the patches' if block == 0 else f'block {block}'}"
    return "; no block is off, only what follows them"


def _hidden(out: Any) -> tuple[Tensor, ...]:
    inner = out.vision_model_output if out.vision_model_output is not None else out
    states: tuple[Tensor, ...] = inner.hidden_states
    return states


def _headroom(model: Model, pixels: Sequence[Tensor], names: Sequence[str]) -> Check:
    largest, where = 0.0, ""
    for name, one in zip(names, pixels, strict=True):
        for block, state in enumerate(_hidden(model.forward(one, output_hidden_states=True))):
            peak = float(state.abs().max())
            if peak > largest or not math.isfinite(peak):
                largest, where = peak, f"block {block}, {name}"
    room = FP16_MAX / largest if largest else math.inf
    facts = {"largest": largest, "headroom": room, "where": where}
    text = f"largest residual {largest:.4g} ({where}), {room:.3g} times below float16's end"
    if not math.isfinite(largest):
        return Check("headroom", "fail", f"a residual is not finite: {where}; use bfloat16", facts)
    if room < HEADROOM:
        return Check("headroom", "note", f"{text}; bfloat16 or float32 is safer", facts)
    return Check("headroom", "pass", text, facts)


def _texts(
    model: Model, oracle: Any, theirs: ModuleType | None, texts: Sequence[str]
) -> Iterator[Check]:
    ids = model.tokenize(list(texts))
    if theirs is not None:
        tokenizer = theirs.AutoTokenizer.from_pretrained(str(model.folder), local_files_only=True)
        length = ids.shape[1]
        made = tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True,
            return_tensors="pt",
        )["input_ids"]  # fmt: skip
        off = [i for i in range(len(texts)) if not torch.equal(made[i], ids[i])]
        told = f"{texts[off[0]]!r} differs" if off else f"the ids of {len(texts)} texts are equal"
        yield Check("tokens", "fail" if off else "pass", told, {"differing": len(off)})
    ours = model.encode_text(list(texts))
    reference, peer = _both(model, oracle, "encode_text", text_embedding, [ids])
    if reference is not None:
        found = agree(ours, reference, model.dtype, peer)
        yield _numbers("texts", found, [repr(text) for text in texts], model.dtype, "")


# -- what encode_image and encode_text stand for, of each transformers class -----------------------


def image_embedding(oracle: Any, pixels: Tensor) -> Any:
    name = type(oracle).__name__
    options = {} if "Dinov2" in name else {"interpolate_pos_encoding": True}
    if name == "CLIPModel":
        out = oracle.get_image_features(pixels, **options)
        return getattr(out, "pooler_output", out)
    if name.startswith("CLIP"):
        out = oracle(pixels, **options)
        return out.image_embeds if "WithProjection" in name else out.pooler_output
    return oracle.base_model(pixels, **options).last_hidden_state[:, 0]


def text_embedding(oracle: Any, ids: Tensor) -> Any:
    name = type(oracle).__name__
    if name == "CLIPModel":
        out = oracle.get_text_features(ids)
        return getattr(out, "pooler_output", out)
    out = oracle(ids)
    return out.text_embeds if "WithProjection" in name else out.pooler_output
