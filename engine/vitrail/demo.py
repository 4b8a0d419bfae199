"""``vitrail demo``: the sample photos, each found again from its crop and its mirror image.

Without ``--model`` it writes a checkpoint of random weights, as transformers would save a
CLIPVisionModelWithProjection, and opens it like any other: the whole path works, offline.
"""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from vitrail.model import Model

WIDTH, LAYERS, HEADS, MLP, PATCH, IMAGE, PROJECTION = 384, 6, 6, 1536, 32, 224, 256
CROP = 0.8
TIMED_SECONDS = 2.0
BATCH = 16
ROW = "{:<12}{:<28}{}"

CONFIG = {
    "architectures": ["CLIPVisionModelWithProjection"],
    "model_type": "clip_vision_model",
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": MLP,
    "patch_size": PATCH,
    "image_size": IMAGE,
    "num_channels": 3,
    "projection_dim": PROJECTION,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": IMAGE},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": IMAGE, "width": IMAGE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def run(load: Callable[[str], Model], name: str | None = None) -> None:
    """Prints what is nearest to each altered photo, and images a second. ``load`` opens a model."""
    if name is not None:
        _show(load(name))
        return
    with tempfile.TemporaryDirectory(prefix="vitrail-demo-") as folder:
        write_random_checkpoint(Path(folder))
        print("No --model given: these weights are RANDOM and know nothing about pictures. What is")
        print("found below is found by colour and shape alone.\n")
        _show(load(folder))
    print("\nWith a model that has learnt something:")
    print("  vitrail embed photos/ --model laion/CLIP-ViT-B-32-laion2B-s34B-b79K")


def write_random_checkpoint(folder: Path) -> None:
    """A small CLIP image tower with seeded random weights: the same bytes every time."""
    from safetensors.numpy import save_file

    random = np.random.default_rng(0)
    tensors = {
        name: np.ones(shape, np.float32)
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight"))
        else np.zeros(shape, np.float32)
        if name.endswith(".bias")
        else random.standard_normal(shape, np.float32) / np.float32(np.sqrt(np.prod(shape[1:])))
        for name, shape in _shapes().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))


def _shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes as transformers writes them ("layrnorm" is its own spelling)."""
    top = "vision_model"
    shapes: dict[str, tuple[int, ...]] = {
        f"{top}.embeddings.class_embedding": (WIDTH,),
        f"{top}.embeddings.patch_embedding.weight": (WIDTH, 3, PATCH, PATCH),
        f"{top}.embeddings.position_embedding.weight": (1 + (IMAGE // PATCH) ** 2, WIDTH),
        "visual_projection.weight": (PROJECTION, WIDTH),
    }
    linears = {f"self_attn.{x}_proj": (WIDTH, WIDTH) for x in ("q", "k", "v", "out")}
    linears |= {"mlp.fc1": (MLP, WIDTH), "mlp.fc2": (WIDTH, MLP)}
    norms = [f"{top}.pre_layrnorm", f"{top}.post_layernorm"]
    for layer in range(LAYERS):
        block = f"{top}.encoder.layers.{layer}"
        norms += [f"{block}.layer_norm1", f"{block}.layer_norm2"]
        for name, shape in linears.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}
    return shapes


def photos() -> dict[str, Image.Image]:
    """The sample photos by name, in RGB."""
    folder = resources.files("vitrail") / "assets" / "photos"
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    return {
        Path(file.name).stem: Image.open(io.BytesIO(file.read_bytes())).convert("RGB")
        for file in files
    }


def _show(model: Model) -> None:
    samples = photos()
    names, originals = list(samples), list(samples.values())
    kept = model.encode_image(originals, normalize=True).numpy()
    altered = {
        "crop": [_crop(image) for image in originals],
        "mirror image": [ImageOps.mirror(image) for image in originals],
    }
    columns = [
        _nearest(kept, model.encode_image(images, normalize=True).numpy(), names)
        for images in altered.values()
    ]
    print(
        f"{model.spec.architecture}, {model.spec.parameters / 1e6:.1f} M parameters, "
        f"{model.runner} runner, {str(model.dtype).removeprefix('torch.')} on {model.device}\n"
    )
    print(ROW.format("photo", *(f"nearest to its {kind}" for kind in altered)))
    right = 0
    for name, *found in zip(names, *columns, strict=True):
        print(ROW.format(name, *(f"{other} ({score:.2f})" for other, score in found)))
        right += sum(other == name for other, _ in found)
    print(f"\n{right} of {2 * len(names)} find their photo again.")
    print(f"{_speed(model, originals):.0f} images/s, from decoded photos to embeddings.")


def _crop(image: Image.Image) -> Image.Image:
    """The middle of a photo, ``CROP`` of each side."""
    left, top = (round(side * (1 - CROP) / 2) for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top))


def _nearest(
    kept: np.ndarray[Any, Any], queries: np.ndarray[Any, Any], names: list[str]
) -> list[tuple[str, float]]:
    """The photo nearest to each query by cosine, once what all photos share is taken away."""
    mean = kept.mean(axis=0)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries - mean, kept - mean))
    scores = a @ b.T
    best = scores.argmax(axis=1)
    return [(names[i], float(row[i])) for i, row in zip(best, scores, strict=True)]


def _speed(model: Model, images: list[Image.Image]) -> float:
    batch = (images * BATCH)[:BATCH]
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < TIMED_SECONDS:
        model.encode_image(batch)
        done += len(batch)
    return done / (time.perf_counter() - start)
