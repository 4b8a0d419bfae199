"""``vitrail verify``: compares a model with transformers on a user's own images and texts.

Without transformers the reference is Vitrail in float32. This reference shows the error of a 16-bit
dtype, but not a fault that both runs share. The reference of a folder of int8 weights, which
transformers cannot read, is the checkpoint that it was made from.
"""

import copy
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vitrail.checkpoint.contents import EXPORT
from vitrail.errors import InputError
from vitrail.jobs.listing import Source
from vitrail.model.loading import load
from vitrail.model.model import Model
from vitrail.tools.agreement import CORPUS, Agreement, compare
from vitrail.tools.int8_checks import check_int8
from vitrail.tools.oracle import (
    image_embedding,
    import_transformers,
    load_oracle,
    spec_faults,
    text_embedding,
)
from vitrail.tools.pixels import Pixels, check_pixels, preprocess_each, read_images
from vitrail.tools.report import Check, Report

HEADROOM = 4.0
"""The report has a note if float16's maximum is less than this many times the largest residual."""
FLOAT16_MAX = 65504.0
INT8_COSINE = 0.99
"""In int8 a difference in the last bit of a pixel grows block by block: it moves codes by a step,
and those move more codes. It ends at the noise of int8, where sound pictures are above 0.998."""


def verify(
    model: Model,
    images: Sequence[Source],
    texts: Sequence[str] = (),
    *,
    against: str | os.PathLike[str] | None = None,
    own: bool = True,
) -> Report:
    """Runs every check that the model's towers allow.

    ``against``: the checkpoint that an int8 ``model`` was made from. ``own``: the images are the
    user's, so that they say whether int8 may be used. Raises InputError if no image can be read, a
    model without a text tower gets texts, or ``against`` is another checkpoint.
    """
    int8 = model.spec.int8
    if against is not None and not int8:
        raise InputError(f"against: got {against}, but the weights of {model.source} are not int8")
    if (model.folder / EXPORT).is_file():
        raise InputError(
            f"verify: got the exported folder {model.folder}, wanted the checkpoint that it was "
            "made from, which transformers can read"
        )
    transformers = import_transformers()
    checks: list[Check] = []
    oracle = None if transformers is None or int8 else load_oracle(transformers, model)
    if oracle is not None:
        checks.append(_check_spec(model, oracle))
    if model.spec.vision is not None and images:
        names, pictures, errors = read_images(model, images)
        if errors:
            checks.append(
                Check("unreadable images", "note", f"{len(errors)} left out: {errors[0]}")
            )
        pixels = preprocess_each(model, pictures)
        checks += check_pixels(model, names, pictures, pixels, transformers)
        if int8:
            checks += check_int8(model, pixels, against, own=own)
        checks += _check_images(model, oracle, names, pictures, pixels)
    if texts:
        checks += _check_texts(model, oracle, transformers, list(texts))
    if int8:
        reference = "itself" if against is None else str(against)
    elif transformers is None:
        reference = "Vitrail in float32: transformers is not installed"
        text = "faults that both runs share are not seen: pip install transformers, and run again"
        checks.append(Check("reference", "note", text))
    else:
        reference = f"transformers {transformers.__version__}, PyTorch {torch.__version__}"
    return Report(model.precision, reference, tuple(checks))


def _check_spec(model: Model, oracle: Any) -> Check:
    faults = list(spec_faults(model.spec, oracle))
    text = "; ".join(faults) or "LayerNorm eps, activations and heads equal those of the modules"
    return Check("contract", "fail" if faults else "pass", text, {"differences": faults})


def _check_images(
    model: Model,
    oracle: Any,
    names: Sequence[str],
    pictures: list[Image.Image],
    preprocessed: Sequence[Pixels],
) -> Iterator[Check]:
    pixels = [torch.from_numpy(image)[None] for image in preprocessed]
    ours = torch.cat([model.encode_image(p) for p in pixels])
    reference, peer = _references(model, oracle, "encode_image", image_embedding, pixels)
    if reference is not None:
        agreement = compare(ours, reference, model.dtype, peer)
        block = ""
        if agreement.reasons:
            block = _first_bad_block(model, oracle, pixels[agreement.worst])
        yield _embedding_check("images", agreement, names, model.dtype, block)
    batched = model.encode_image(pictures)
    yield _embedding_check(
        "images, from files", _compare_files(model, batched, ours), names, model.dtype, ""
    )
    yield _check_headroom(model, pixels, names)


def _compare_files(model: Model, batched: Tensor, ours: Tensor) -> Agreement:
    """Embeddings of uint8 pixels, in batches, against those of float pixels, one by one."""
    if not model.spec.int8:
        dtype = torch.float32 if model.dtype == torch.float32 else torch.bfloat16
        return compare(batched, ours, dtype)
    agreement = compare(batched, ours, torch.bfloat16, cosines=False)
    if agreement.cosine_worst >= INT8_COSINE:
        return agreement
    reason = f"worst cosine {agreement.cosine_worst:.5f}, wanted {INT8_COSINE}"
    return replace(agreement, reasons=(*agreement.reasons, reason))


def _check_texts(
    model: Model, oracle: Any, transformers: ModuleType | None, texts: list[str]
) -> Iterator[Check]:
    ids = model.tokenize(texts)
    if transformers is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(model.folder), local_files_only=True
        )
        expected = tokenizer(
            texts,
            padding="max_length",
            max_length=ids.shape[1],
            truncation=True,
            return_tensors="pt",
        )["input_ids"]
        differing = [i for i in range(len(texts)) if not torch.equal(expected[i], ids[i])]
        text = f"the ids of {len(texts)} texts are equal"
        if differing:
            text = f"the ids of {texts[differing[0]]!r} differ"
        facts = {"differing": len(differing)}
        yield Check("tokens", "fail" if differing else "pass", text, facts)
    ours = model.encode_text(texts)
    reference, peer = _references(model, oracle, "encode_text", text_embedding, [ids])
    if reference is not None:
        agreement = compare(ours, reference, model.dtype, peer)
        yield _embedding_check("texts", agreement, [repr(t) for t in texts], model.dtype, "")


def _references(
    model: Model,
    oracle: Any,
    method: str,
    embed: Callable[[Any, Tensor], Tensor],
    inputs: Sequence[Tensor],
) -> tuple[Tensor | None, Tensor | None]:
    """Embeddings in float32, and PyTorch's in the model's 16-bit dtype; None if there are none.

    The oracle (transformers' model) computes both with ``embed``. If the oracle is None, Vitrail's
    ``method`` computes the first.
    """
    half = model.dtype != torch.float32
    if oracle is None:
        if not half or model.spec.int8:
            return None, None
        full = load(model.folder, device="cpu", dtype="float32")
        return torch.cat([getattr(full, method)(x) for x in inputs]), None
    with torch.inference_mode():
        reference = torch.cat([embed(oracle, x).float() for x in inputs])
        if not half:
            return reference, None
        peer = copy.deepcopy(oracle).to(model.dtype)
        cast = [x.to(model.dtype) if x.is_floating_point() else x for x in inputs]
        return reference, torch.cat([embed(peer, x) for x in cast])


def _embedding_check(
    name: str, agreement: Agreement, names: Sequence[str], dtype: torch.dtype, block: str
) -> Check:
    worst = names[agreement.worst]
    text = (
        f"cosine mean {agreement.cosine_mean:.7f}, worst {agreement.cosine_worst:.7f} "
        f"({worst}), largest error {agreement.error:.1e} of the largest value"
    )
    if dtype != torch.float32 and agreement.items < CORPUS:
        text += f"; indicative, {agreement.items} of {CORPUS} items"
    if agreement.reasons:
        text = f"{'; '.join(agreement.reasons)}{block}; {text}"
    facts = asdict(agreement) | {"worst": worst}
    return Check(name, "fail" if agreement.reasons else "pass", text, facts)


def _first_bad_block(model: Model, oracle: Any, pixels: Tensor) -> str:
    """Names the first block whose output differs from the oracle's on ``pixels`` (1, C, H, W)."""
    if oracle is None:
        return ""
    ours = _hidden_states(model, pixels)
    with torch.inference_mode():
        tower = getattr(oracle, "vision_model", oracle)
        theirs = tower(pixels, output_hidden_states=True).hidden_states
    bound = 1e-4 if model.dtype == torch.float32 else 0.05
    for block, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if float((a.float().cpu() - b).abs().max()) > bound * float(b.abs().max()):
            return f"; first off after {'the patches' if block == 0 else f'block {block}'}"
    return "; no block is off, only a step after the last block"


def _hidden_states(model: Model, pixels: Tensor) -> tuple[Tensor, ...]:
    out: Any = model.forward(pixels, output_hidden_states=True)
    tower = out.vision_model_output if out.vision_model_output is not None else out
    states: tuple[Tensor, ...] = tower.hidden_states
    return states


def _check_headroom(model: Model, pixels: Sequence[Tensor], names: Sequence[str]) -> Check:
    largest, location = 0.0, ""
    for name, image in zip(names, pixels, strict=True):
        for block, state in enumerate(_hidden_states(model, image)):
            peak = float(state.abs().max())
            if peak > largest or not math.isfinite(peak):
                largest, location = peak, f"block {block}, {name}"
    headroom = FLOAT16_MAX / largest if largest else math.inf
    facts = {"largest": largest, "headroom": headroom, "where": location}
    if not math.isfinite(largest):
        text = f"a residual is not finite: {location}; use bfloat16"
        return Check("headroom", "fail", text, facts)
    text = (
        f"largest residual {largest:.4g} ({location}), {headroom:.3g} times below float16's maximum"
    )
    if headroom < HEADROOM:
        return Check("headroom", "note", f"{text}; bfloat16 or float32 is safer", facts)
    return Check("headroom", "pass", text, facts)
