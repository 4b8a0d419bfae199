"""Compares Vitrail's pixels with Pillow's and with the checkpoint's own processor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL
from PIL import Image

from vitrail.errors import ImageError, InputError
from vitrail.image import decoding
from vitrail.jobs.listing import Source, path_text
from vitrail.tools.oracle import load_processor
from vitrail.tools.report import Check

if TYPE_CHECKING:
    from vitrail.model.model import Model
    from vitrail.spec import ImageSpec

MAX_STEPS = 1.01
"""Largest difference in steps of 8 bits: Pillow 13's order of passes can change a value by one."""

Pixels = np.ndarray[Any, Any]


def read_images(
    model: Model, images: Sequence[Source]
) -> tuple[list[str], list[Image.Image], list[str]]:
    """Names and upright pictures of the readable images, and the errors of the others."""
    assert model.spec.vision is not None, "only a model with an image tower has images to verify"
    names, pictures, errors = [], [], []
    for image in images:
        try:
            pixels = decoding.decode(image, channels=model.spec.vision.channels)
        except ImageError as error:
            errors.append(str(error))
            continue
        names.append(path_text(image))
        pictures.append(Image.fromarray(pixels.squeeze() if pixels.shape[2] == 1 else pixels))
    if not names:
        raise InputError(f"none of {len(images)} images can be read; the first: {errors[0]}")
    return names, pictures, errors


def preprocess_each(model: Model, pictures: Sequence[Image.Image]) -> list[Pixels]:
    """Vitrail's pixels (C, H, W) of each picture, which may differ in size."""
    return [model.preprocess(picture)[0].numpy() for picture in pictures]


def check_pixels(
    model: Model,
    names: Sequence[str],
    pictures: Sequence[Image.Image],
    ours: Sequence[Pixels],
    transformers: ModuleType | None,
) -> Iterator[Check]:
    """``ours``: the result of `preprocess_each`."""
    spec = model.spec.image
    if spec is None:
        yield Check("pixels", "note", "no preprocessor in the folder: nothing to compare")
        return
    expected = [_pillow_pixels(picture, spec) for picture in pictures]
    yield _compare("Pillow", f"Pillow {PIL.__version__}", ours, expected, spec, names)
    if transformers is None:
        return
    try:
        processor = load_processor(transformers, model)
    except ImportError as error:  # some versions need torchvision even for Pillow's processors
        reason = " ".join(str(error).split())
        text = f"not compared with transformers {transformers.__version__}: {reason[:200]}"
        yield Check("pixels, processor", "note", text)
        return
    theirs = [
        processor(images=picture, return_tensors="np")["pixel_values"][0] for picture in pictures
    ]
    yield _compare("processor", type(processor).__name__, ours, theirs, spec, names)


def _pillow_pixels(image: Image.Image, spec: ImageSpec) -> Pixels:
    """The steps of ``spec`` with the installed Pillow's resize: (C, H, W) in float64."""
    if spec.resize is not None:
        if spec.resize[0] == "exact":
            height, width = spec.resize[1:]
        else:
            short, edge = min(image.size), spec.resize[1]
            width, height = (edge if s == short else int(edge * s / short) for s in image.size)
        image = image.resize((width, height), Image.Resampling(spec.resample))
    if spec.crop is not None:
        height, width = spec.crop
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    values = np.atleast_3d(np.asarray(image)).astype(np.float64).transpose(2, 0, 1)
    if spec.rescale is not None:
        values = values * spec.rescale
    if spec.mean is not None and spec.std is not None:
        mean, std = (np.array(v).reshape(-1, 1, 1) for v in (spec.mean, spec.std))
        values = (values - mean) / std
    return values


def _compare(
    name: str,
    reference: str,
    ours: Sequence[Pixels],
    theirs: Sequence[Pixels],
    spec: ImageSpec,
    names: Sequence[str],
) -> Check:
    """Compares two sets of images by differences in steps of 8 bits; ``names`` are the images'."""
    name = f"pixels, {name}"
    pairs = list(zip(names, ours, theirs, strict=True))
    for image, a, b in pairs:
        if a.shape != b.shape:
            shapes = f"Vitrail {a.shape}, {reference} {b.shape}"
            return Check(name, "fail", f"{image}: sizes differ: {shapes}")
    step = (spec.rescale or 1.0) / np.array(spec.std or (1.0,)).reshape(-1, 1, 1)
    differences = [np.abs(a - b) / step for _, a, b in pairs]
    peaks = [float(d.max()) for d in differences]
    worst = int(np.argmax(peaks))
    differing = float(np.mean([(d > 0.5).mean() for d in differences]))
    facts = {
        "largest": peaks[worst],
        "differing": differing,
        "worst": names[worst],
        "with": reference,
    }
    if peaks[worst] > MAX_STEPS:
        text = f"up to {peaks[worst]:.1f} steps of 8 bits apart, {names[worst]}"
        return Check(name, "fail", f"{reference}: {text}", facts)
    text = "the same" if differing == 0 else f"{differing:.2%} of values one step of 8 bits apart"
    return Check(name, "pass", f"{reference}: {text}", facts)
