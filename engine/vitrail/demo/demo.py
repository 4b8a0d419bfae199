"""``vitrail demo``: names and searches scenes, finds photos by altered copies, draws a sheet.

The bundled model is a small CLIP that ``examples/train_tiny_clip.py`` trained on rendered scenes.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from vitrail.demo.quiz import PAIRS, QUESTIONS, SIDE, Floats, judge
from vitrail.demo.scenes import Scene, render, sample
from vitrail.demo.sheet import Pane, Strip, contact_sheet
from vitrail.errors import InputError

if TYPE_CHECKING:
    from vitrail.model.model import Model

COLUMNS = 8
NAMED_SCENES = 16  # on the sheet
JUDGED = 500  # scenes behind the table's figures
GALLERY = 400  # rendered scenes to search in, besides those that fit a query
SEARCHES: tuple[tuple[str, dict[str, str]], ...] = (
    ("three yellow stars", {"count": "three", "color": "yellow", "shape": "star"}),
    (
        "a large green ring on a black background",
        {"count": "one", "size": "large", "color": "green", "shape": "ring", "background": "black"},
    ),
    (
        "two blue hearts at the top",
        {"count": "two", "color": "blue", "shape": "heart", "position": "at the top"},
    ),
    ("four purple things", {"count": "four", "color": "purple"}),
)
HITS = 8
ZOOM = 0.7
TIMED_SECONDS = 1.5
BATCH = 16


def bundled() -> Path:
    """The folder of the model that comes with Vitrail, a checkpoint like any other."""
    return Path(str(resources.files("vitrail") / "assets" / "clip"))


def photos() -> dict[str, Image.Image]:
    """The sample photos by name, in RGB."""
    folder = resources.files("vitrail") / "assets" / "photos"
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    return {
        Path(file.name).stem: Image.open(io.BytesIO(file.read_bytes())).convert("RGB")
        for file in files
    }


def run(load: Callable[[str], Model], name: str | None, out: Path, seed: int | None) -> None:
    """Prints what the model recognizes, and writes the contact sheet to ``out``, a PNG.

    ``load`` opens a model. If ``name`` is None, the bundled model runs; if ``seed`` is None, the
    scenes differ at each call. Raises InputError if ``out`` cannot be written.
    """
    if out.is_dir() or not os.access(out.parent, os.W_OK | os.X_OK):
        raise InputError(f"{out}: cannot write the contact sheet there; --sheet names another file")
    model = load(name if name is not None else str(bundled()))
    seed = Random().randrange(10_000) if seed is None else seed
    dtype = model.precision
    about = (
        f"{model.spec.architecture}, {model.spec.parameters / 1e6:.1f} M parameters, "
        f"{dtype} on {model.device}, scenes of seed {seed}"
    )
    print(about)
    if name is None:
        print(
            "This small bundled model knows shapes, colors, counts and positions in rendered\n"
            "scenes, and nothing of the world: it cannot recognize a cat."
        )
    strips = []
    if model.spec.text is not None and model.spec.vision is not None:
        strips += [_named(model, seed), *_searched(model, seed)]
    strips += _photo_strips(model)
    try:
        contact_sheet("Vitrail", about, strips, COLUMNS).save(out, format="PNG")
    except OSError as error:
        raise InputError(f"{out}: cannot write the contact sheet: {error}") from error
    print(f"\n{_speed(model):.0f} images/s, from decoded pictures to embeddings")
    print(f"contact sheet: {out}")


def encoders(
    model: Model,
) -> tuple[Callable[[Sequence[Image.Image]], Floats], Callable[[Sequence[str]], Floats]]:
    """Encoders of pictures and texts for `quiz.judge`: unit embeddings (N, D) in float32."""
    return (
        lambda images: model.encode_image(list(images), normalize=True).numpy(),
        lambda texts: model.encode_text(list(texts), normalize=True).numpy(),
    )


# -- scenes ----------------------------------------------------------------------------------------


def _named(model: Model, seed: int) -> Strip:
    """Names scenes whose color-shape pairs training never showed, each among all 64 pairs."""
    scores = judge(*encoders(model), JUDGED, seed)
    print(f"\n{JUDGED} new scenes, with pairs of color and shape that training never showed")
    print(f"{'question':<18}{'answers':>8}{'correct':>9}{'at least (95 %)':>18}")
    for question in QUESTIONS:
        score = scores[question.name]
        answers = len(question.answers)
        print(f"{question.name:<18}{answers:>8}{score.accuracy:>9.1%}{score.lower_bound:>18.1%}")
    dice = Random(f"shown {seed}")
    scenes = [sample(dice, held_out=True) for _ in range(NAMED_SCENES)]
    pictures = [render(scene, SIDE) for scene in scenes]
    labels = [f"{color} {shape}" for color, shape in PAIRS]
    answers_by_scene = model.classify(pictures, labels=labels, templates=("{}",)).top(1)
    panes = [
        Pane(picture, f"{label} {100 * chance:.0f} %", label == f"{scene.color} {scene.shape}")
        for scene, picture, [(label, chance)] in zip(
            scenes, pictures, answers_by_scene, strict=True
        )
    ]
    pairs = scores["color and shape"]
    return Strip(
        f"Named, among 64 colors and shapes: {pairs.accuracy:.0%} of {pairs.n} correct", panes
    )


def _searched(model: Model, seed: int) -> Iterator[Strip]:
    """The scenes nearest to a text, among several hundred."""
    dice = Random(f"gallery {seed}")
    gallery = [sample(dice) for _ in range(GALLERY)]
    for _, attributes in SEARCHES:
        gallery += _matching_scenes(dice, attributes, HITS)
    pictures = [render(scene, SIDE) for scene in gallery]
    encode_images, encode_texts = encoders(model)
    embeddings = encode_images(pictures)
    print(f"\n{len(gallery)} rendered scenes searched by text")
    print(f"{'text':<44}{f'correct of {HITS} hits':>22}")
    scores = encode_texts([text for text, _ in SEARCHES]) @ embeddings.T
    for (text, attributes), row in zip(SEARCHES, scores, strict=True):
        hits = np.argsort(-row, kind="stable")[:HITS]
        panes = [Pane(pictures[i], f"{row[i]:.2f}", _matches(gallery[i], attributes)) for i in hits]
        print(f"{text:<44}{sum(pane.correct is True for pane in panes):>22}")
        yield Strip(f'Searched: "{text}"', panes)


def _matches(scene: Scene, attributes: dict[str, str]) -> bool:
    return all(getattr(scene, field) == value for field, value in attributes.items())


def _matching_scenes(dice: Random, attributes: dict[str, str], count: int) -> Iterator[Scene]:
    """``count`` scenes with these attributes, so that a search can succeed."""
    while count:
        scene = sample(dice, held_out=dice.random() < 0.25)
        if _matches(scene, attributes):
            count -= 1
            yield scene


# -- photos ----------------------------------------------------------------------------------------


def _crop(image: Image.Image) -> Image.Image:
    """The middle of a photo, ``ZOOM`` of each side."""
    left, top = (round(side * (1 - ZOOM) / 2) for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top))


def _recolor(image: Image.Image) -> Image.Image:
    """More red, less blue, less saturation, more brightness."""
    red, green, blue = image.split()
    warm = Image.merge("RGB", (red.point(lambda v: v * 1.15), green, blue.point(lambda v: v * 0.8)))
    return ImageEnhance.Brightness(ImageEnhance.Color(warm).enhance(0.6)).enhance(1.1)


ALTERATIONS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "crop": _crop,
    "mirror": ImageOps.mirror,
    "colors": _recolor,
}


def _photo_strips(model: Model) -> list[Strip]:
    """The sample photos, each found again by a crop, a mirror image and a recolored copy."""
    samples = photos()
    names = list(samples)
    encode_images, _ = encoders(model)
    embeddings = encode_images(list(samples.values()))
    altered = {
        alteration: [alter(image) for image in samples.values()]
        for alteration, alter in ALTERATIONS.items()
    }
    matches = {
        alteration: _nearest(embeddings, encode_images(images), names)
        for alteration, images in altered.items()
    }
    print(f"\n{len(names)} photos, each searched by altered copies")
    print(f"{'photo':<14}" + "".join(f"{alteration:<22}" for alteration in ALTERATIONS))
    for i, name in enumerate(names):
        cells = (f"{match} ({score:.2f})" for match, score in (m[i] for m in matches.values()))
        print(f"{name:<14}" + "".join(f"{cell:<22}" for cell in cells))
    strips = [Strip("Photos", [Pane(image, name) for name, image in samples.items()])]
    correct = 0
    for alteration, images in altered.items():
        panes = [
            Pane(image, f"{match} {score:.2f}", match == name)
            for name, image, (match, score) in zip(names, images, matches[alteration], strict=True)
        ]
        count = sum(pane.correct is True for pane in panes)
        correct += count
        strips.append(Strip(f"Found again by {alteration}: {count} of {len(names)}", panes))
    print(f"{correct} of {len(ALTERATIONS) * len(names)} correct")
    return strips


def _nearest(embeddings: Floats, queries: Floats, names: Sequence[str]) -> list[tuple[str, float]]:
    """The photo nearest to each query by cosine, after the mean of all photos is subtracted."""
    mean = embeddings.mean(axis=0)
    a, b = (
        x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries - mean, embeddings - mean)
    )
    scores = a @ b.T
    best = scores.argmax(axis=1)
    return [(names[i], float(row[i])) for i, row in zip(best, scores, strict=True)]


def _speed(model: Model) -> float:
    """Images per second of `encode_image` on decoded photos."""
    batch = (list(photos().values()) * BATCH)[:BATCH]
    done, start = 0, time.perf_counter()
    while done == 0 or time.perf_counter() - start < TIMED_SECONDS:
        model.encode_image(batch)
        done += len(batch)
    return done / (time.perf_counter() - start)
