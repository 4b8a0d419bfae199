"""``vitrail demo``: scenes named and found by words, photos found by pictures, and a contact sheet.

The bundled model is a small CLIP that ``examples/train_tiny_clip.py`` trained on rendered scenes.
"""

from __future__ import annotations

import io
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from vitrail.demo.quiz import PAIRS, SIDE, Floats, Score, judge
from vitrail.demo.scenes import Scene, render, sample
from vitrail.demo.sheet import Pane, Row, contact_sheet
from vitrail.dtypes import dtype_name
from vitrail.errors import InputError

if TYPE_CHECKING:
    from vitrail.model.model import Model

COLUMNS = 8
SHOWN = 16  # scenes named on the sheet
JUDGED = 500  # scenes behind the table's figures
GALLERY = 400  # rendered scenes that are searched, and what was put among them for the queries
SEARCHES: tuple[tuple[str, dict[str, str]], ...] = (
    ("three yellow stars", {"count": "three", "colour": "yellow", "shape": "star"}),
    (
        "a large green ring on a black background",
        {
            "count": "one",
            "size": "large",
            "colour": "green",
            "shape": "ring",
            "background": "black",
        },
    ),
    (
        "two blue hearts at the top",
        {"count": "two", "colour": "blue", "shape": "heart", "position": "at the top"},
    ),
    ("four purple things", {"count": "four", "colour": "purple"}),
)
HITS = 8
ZOOM = 0.7
TIMED_SECONDS = 1.5
BATCH = 16
EXAMPLE = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"


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
    """Prints what the model sees and writes the contact sheet to ``out``, a PNG.

    ``load`` opens a model; ``name`` None is the bundled one; ``seed`` None takes new scenes each
    time. Raises InputError where ``out`` cannot be written.
    """
    _check(out)
    model = load(name if name is not None else str(bundled()))
    seed = Random().randrange(10_000) if seed is None else seed
    dtype = dtype_name(model.dtype)
    about = (
        f"{model.spec.architecture}, {model.spec.parameters / 1e6:.1f} M parameters, "
        f"{dtype} on {model.device}, scenes of seed {seed}"
    )
    print(about)
    if name is None:
        print(
            "This small bundled model knows shapes, colours, counts and places of rendered scenes,"
            "\nand nothing of the world: not what a cat is."
        )
    rows = []
    if model.spec.text is not None and model.spec.vision is not None:
        rows += [_named(model, seed), *_searched(model, seed)]
    rows += list(_refound(model))
    _save(contact_sheet("Vitrail", about, rows, COLUMNS), out)
    print(f"\n{_speed(model):.0f} images/s, from decoded pictures to embeddings")
    print(f"contact sheet: {out}")
    print(f"\nWith a CLIP that knows the world:\n  vitrail demo --model {EXAMPLE}")


def _check(out: Path) -> None:
    if out.is_dir() or not os.access(out.parent, os.W_OK | os.X_OK):
        raise InputError(f"{out}: cannot write the contact sheet there; --sheet names another file")


def _save(sheet: Image.Image, out: Path) -> None:
    try:
        sheet.save(out, format="PNG")
    except OSError as error:
        raise InputError(f"{out}: cannot write the contact sheet: {error}") from error


def encoders(
    model: Model,
) -> tuple[Callable[[Sequence[Image.Image]], Floats], Callable[[Sequence[str]], Floats]]:
    """Pictures and texts to unit embeddings (N, D) float32 as `quiz.judge` takes them."""
    return (
        lambda images: model.encode_image(list(images), normalize=True).numpy(),
        lambda texts: model.encode_text(list(texts), normalize=True).numpy(),
    )


# -- scenes ----------------------------------------------------------------------------------------


def _named(model: Model, seed: int) -> Row:
    """Fresh scenes of pairs that training never showed, each named among all 64 pairs."""
    scores = judge(*encoders(model), JUDGED, seed)
    print(f"\nfresh scenes, pairs of colour and shape it never saw ({JUDGED} scenes)")
    print(f"{'what':<18}{'answers':>8}{'right':>9}{'at least (95 %)':>18}")
    choices = {"colour and shape": 64, "count": 4, "position": 5, "size": 2, "background": 4}
    for what, score in scores.items():
        print(f"{what:<18}{choices[what]:>8}{score.accuracy:>9.1%}{score.lower_bound:>18.1%}")
    dice = Random(f"shown {seed}")
    shown = [sample(dice, held_out=True) for _ in range(SHOWN)]
    pictures = [render(scene, SIDE) for scene in shown]
    labels = [f"{colour} {shape}" for colour, shape in PAIRS]
    found = model.classify(pictures, labels=labels, templates=("{}",)).top(1)
    panes = [
        Pane(picture, f"{label} {100 * chance:.0f} %", label == f"{scene.colour} {scene.shape}")
        for scene, picture, [(label, chance)] in zip(shown, pictures, found, strict=True)
    ]
    pair: Score = scores["colour and shape"]
    return Row(f"Named, among 64 colours and shapes: {pair.accuracy:.0%} of {pair.n} right", panes)


def _searched(model: Model, seed: int) -> Iterator[Row]:
    """The scenes nearest to a text, among several hundred."""
    dice = Random(f"gallery {seed}")
    gallery = [sample(dice) for _ in range(GALLERY)]
    for _, wanted in SEARCHES:
        gallery += _fitting(dice, wanted, HITS)
    pictures = [render(scene, SIDE) for scene in gallery]
    images, texts = encoders(model)
    kept = images(pictures)
    print(f"\n{len(gallery)} rendered scenes searched by words")
    print(f"{'words':<44}{f'right of the first {HITS}':>22}")
    scores = texts([text for text, _ in SEARCHES]) @ kept.T
    for (text, wanted), row in zip(SEARCHES, scores, strict=True):
        best = np.argsort(-row, kind="stable")[:HITS]
        right = [_fits(gallery[i], wanted) for i in best]
        print(f"{text:<44}{sum(right):>22}")
        panes = [
            Pane(pictures[i], f"{row[i]:.2f}", good) for i, good in zip(best, right, strict=True)
        ]
        yield Row(f'Searched: "{text}"', panes)


def _fits(scene: Scene, wanted: dict[str, str]) -> bool:
    return all(getattr(scene, field) == value for field, value in wanted.items())


def _fitting(dice: Random, wanted: dict[str, str], count: int) -> Iterator[Scene]:
    """``count`` scenes as wanted, so that a search has something to find."""
    while count:
        scene = sample(dice, held_out=dice.random() < 0.25)
        if _fits(scene, wanted):
            count -= 1
            yield scene


# -- photos ----------------------------------------------------------------------------------------


def _zoomed(image: Image.Image) -> Image.Image:
    """The middle of a photo, ``ZOOM`` of each side."""
    left, top = (round(side * (1 - ZOOM) / 2) for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top))


def _warmed(image: Image.Image) -> Image.Image:
    """Other colours: red up, blue down, less saturated, brighter."""
    red, green, blue = image.split()
    warm = Image.merge("RGB", (red.point(lambda v: v * 1.15), green, blue.point(lambda v: v * 0.8)))
    return ImageEnhance.Brightness(ImageEnhance.Color(warm).enhance(0.6)).enhance(1.1)


ALTERED: dict[str, Callable[[Image.Image], Image.Image]] = {
    "crop": _zoomed,
    "mirror": ImageOps.mirror,
    "colours": _warmed,
}


def _refound(model: Model) -> Iterator[Row]:
    """The sample photos, each found again from a crop, a mirror image and other colours of it."""
    samples = photos()
    names, originals = list(samples), list(samples.values())
    images, _ = encoders(model)
    kept = images(originals)
    print(f"\n{len(names)} photos, found again by an altered one")
    print(f"{'photo':<14}" + "".join(f"{kind:<22}" for kind in ALTERED))
    columns = {}
    for kind, alter in ALTERED.items():
        columns[kind] = _nearest(kept, images([alter(image) for image in originals]), names)
    for i, name in enumerate(names):
        cells = (f"{found} ({score:.2f})" for found, score in (columns[k][i] for k in ALTERED))
        print(f"{name:<14}" + "".join(f"{cell:<22}" for cell in cells))
    right = Counter(
        kind
        for kind in ALTERED
        for name, (found, _) in zip(names, columns[kind], strict=True)
        if name == found
    )
    print(f"{sum(right.values())} of {len(ALTERED) * len(names)} right")
    panes = [Pane(image, name) for name, image in samples.items()]
    yield Row("Photos", panes)
    for kind, alter in ALTERED.items():
        yield Row(
            f"Found again by {kind}: {right[kind]} of {len(names)}",
            [
                Pane(alter(image), f"{found} {score:.2f}", found == name)
                for (name, image), (found, score) in zip(
                    samples.items(), columns[kind], strict=True
                )
            ],
        )


def _nearest(kept: Floats, queries: Floats, names: Sequence[str]) -> list[tuple[str, float]]:
    """The photo nearest to each query by cosine, once what all photos share is taken away."""
    mean = kept.mean(axis=0)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries - mean, kept - mean))
    scores = a @ b.T
    best = scores.argmax(axis=1)
    return [(names[i], float(row[i])) for i, row in zip(best, scores, strict=True)]


def _speed(model: Model) -> float:
    batch = (list(photos().values()) * BATCH)[:BATCH]
    done, start = 0, time.perf_counter()
    while done == 0 or time.perf_counter() - start < TIMED_SECONDS:
        model.encode_image(batch)
        done += len(batch)
    return done / (time.perf_counter() - start)
