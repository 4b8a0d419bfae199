"""Look into an image tower: the first block that is not finite, and tokens after chosen blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vitrail.dtypes import dtype_name
from vitrail.errors import InputError, OutOfMemoryError, VitrailError
from vitrail.runtime.towers import VisionTower


def not_finite(dtype: torch.dtype) -> str:
    """The end of a sentence about a tensor that holds NaN or infinity, with advice."""
    advice = "; load with dtype='bfloat16' or 'float32'" if dtype == torch.float16 else ""
    return f"holds numbers that are not finite in {dtype_name(dtype)}{advice}"


def first_bad_block(tower: VisionTower, pixels: Tensor) -> str:
    """The first block that gives NaN or infinity for the image ``pixels`` (1, ...), in words.

    The image is computed again, this time with the output of every block.
    """
    layers, problem = tower.spec.blocks.layers, not_finite(tower.runner.dtype)
    taps = tuple(range(layers + 1))

    def find(part: slice) -> str:
        outputs = tower.dense(pixels[part], taps)
        for layer in taps:
            if not torch.isfinite(outputs[f"vision.hidden.{layer}"]).all():
                return f"block {layer - 1} {problem}" if layer else f"the patch embedding {problem}"
        return f"the final projection {problem}"

    try:
        return tower.in_parts(lambda: tower.dense_plan(pixels, taps), pixels, find)[0]
    except (InputError, OutOfMemoryError):
        # an exported folder has no plan for it, and triton is not installed; or the outputs of all
        # blocks need more memory than the embedding did
        return f"the result {problem}"


def intermediate_layers(
    tower: VisionTower,
    pixels: Tensor,
    n: int | Sequence[int],
    reshape: bool,
    return_class_token: bool,
    norm: bool,
) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
    """See `Model.get_intermediate_layers`. ``pixels`` (B, C, H, W) are checked floats."""
    layers = tower.spec.blocks.layers
    numbers = range(layers - n, layers) if isinstance(n, int) else n
    blocks = tuple(numbers) if isinstance(numbers, Sequence) else ()
    if not blocks or any(not isinstance(b, int) or not 0 <= b < layers for b in blocks):
        raise InputError(f"n: got {n!r}, wanted 1 to {layers}, or block numbers below {layers}")
    if list(blocks) != sorted(set(blocks)):
        raise InputError(f"n: got block numbers {n!r}, wanted them ascending and once each")

    def compute(part: slice) -> tuple[Tensor, ...]:
        outputs = tower.layers(pixels[part], blocks, norm)
        finite = [torch.isfinite(out).flatten(1).all(dim=1) for out in outputs]
        bad = torch.stack(finite).all(dim=0).logical_not().nonzero()
        if len(bad):
            raise _BadItem(part.start + int(bad[0]))
        return tuple(outputs)

    try:
        parts = tower.in_parts(
            lambda: tower.layers_plan(pixels, blocks, norm), pixels, compute, counts_outputs=False
        )
    except _BadItem as error:
        (item,) = error.args
        problem = first_bad_block(tower, pixels[item : item + 1])
        raise VitrailError(f"get_intermediate_layers: image {item}: {problem}") from None
    outputs = [out[0] if len(out) == 1 else torch.cat(out) for out in zip(*parts, strict=True)]
    patches = [out[:, tower.spec.prefix :] for out in outputs]
    if reshape:
        batch, width = pixels.shape[0], tower.spec.blocks.width
        grid = tower.spec.grid_at(tower.image_size(pixels))
        patches = [
            tokens.reshape(batch, *grid, width).permute(0, 3, 1, 2).contiguous()
            for tokens in patches
        ]
    if return_class_token:
        return tuple((tokens, out[:, 0]) for tokens, out in zip(patches, outputs, strict=True))
    return tuple(patches)


class _BadItem(Exception):
    """The number of the first image that is not finite; its part has given its memory back."""
