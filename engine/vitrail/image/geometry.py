"""The geometry of preprocessing: how far an image is resized, and which window of it is kept."""

from dataclasses import dataclass, replace

from vitrail.errors import ImageError, InputError
from vitrail.spec import MAX_IMAGE_SIDE, ImageSpec

MAX_RESIZED_PIXELS = 100_000_000
"""The most pixels that a resize pass may make before the crop."""


@dataclass(frozen=True, slots=True)
class Axis:
    """The resize and crop along one axis, in pixels.

    ``source`` pixels are resized to ``full``; of these, [start, stop) are kept and placed after
    ``before`` zeros into an output of ``out`` pixels.
    """

    source: int
    full: int
    start: int
    stop: int
    before: int
    out: int

    @property
    def kept(self) -> int:
        return self.stop - self.start

    @property
    def narrow(self) -> bool:
        """Whether a pass over the whole axis would mostly make pixels that the crop discards."""
        return self.full != self.source and self.full > 4 * self.kept

    @property
    def made(self) -> int:
        """Pixels along this axis that the pass makes."""
        return self.kept if self.narrow else self.full


def crop_axis(source: int, full: int, crop: int | None) -> Axis:
    """A center crop as in transformers: floor of half the excess, ceiling of half the padding."""
    if crop is None:
        return Axis(source, full, 0, full, 0, full)
    if crop <= full:
        start = (full - crop) // 2
        return Axis(source, full, start, start + crop, 0, crop)
    return Axis(source, full, 0, full, (crop - full + 1) // 2, crop)


def geometry(
    height: int, width: int, spec: ImageSpec, location: str = "image"
) -> tuple[Axis, Axis]:
    """Rows and columns of the resize and crop of an image of ``height`` x ``width`` pixels.

    Raises ImageError if the resized image would be over 100 million pixels.
    """
    full = (height, width)
    if spec.resize is not None and spec.resize[0] == "exact":
        full = (spec.resize[1], spec.resize[2])
    elif spec.resize is not None:
        edge = spec.resize[1]
        tall = int(edge * height / width), edge
        wide = edge, int(edge * width / height)
        full = tall if width <= height else wide
    crop = spec.crop or (None, None)
    rows, columns = crop_axis(height, full[0], crop[0]), crop_axis(width, full[1], crop[1])
    if max(columns.made * rows.source, columns.kept * rows.made) > MAX_RESIZED_PIXELS:
        raise ImageError(
            f"{location}: {width} x {height} pixels would be resized to {columns.full} x "
            f"{rows.full}, over the limit of {MAX_RESIZED_PIXELS} pixels"
        )
    return rows, columns


def spec_at(spec: ImageSpec, size: tuple[int, int] | None) -> ImageSpec:
    """``spec`` with its output changed to ``size`` = (height, width) pixels; None: unchanged.

    An exact resize without a crop becomes a resize to ``size``. Otherwise the crop becomes
    ``size``, and the resize grows by the same factor (the larger of the two axes, rounded half
    up). A shortest-edge resize without a crop counts as cropped to its edge. For example, CLIP's
    "shortest edge 224, crop 224" at (336, 336) is "shortest edge 336, crop 336".

    Raises InputError if ``size`` is not two integers from 1 to 16384, or the processor neither
    resizes nor crops.
    """
    if size is None:
        return spec
    is_pair = isinstance(size, tuple | list) and len(size) == 2
    if not is_pair or not all(type(side) is int and 1 <= side <= MAX_IMAGE_SIDE for side in size):
        raise InputError(f"size: got {size!r}, wanted (height, width) from 1 to {MAX_IMAGE_SIDE}")
    size = size[0], size[1]
    if spec.resize is None:
        if spec.crop is None:
            raise InputError(f"size: got {size!r}, but this processor neither resizes nor crops")
        return replace(spec, crop=size)
    if spec.resize[0] == "exact":
        if spec.crop is None:
            return replace(spec, resize=("exact", *size))
        height = _scaled(spec.resize[1], size[0], spec.crop[0])
        width = _scaled(spec.resize[2], size[1], spec.crop[1])
        return replace(spec, resize=("exact", height, width), crop=size)
    edge = spec.resize[1]
    crop = spec.crop or (edge, edge)
    edge = max(_scaled(edge, size[0], crop[0]), _scaled(edge, size[1], crop[1]))
    return replace(spec, resize=("shortest", edge), crop=size)


def _scaled(value: int, numerator: int, denominator: int) -> int:
    scaled = (2 * value * numerator + denominator) // (2 * denominator)
    if not 1 <= scaled <= MAX_IMAGE_SIDE:
        raise InputError(f"size: wants a resize to {scaled} pixels, the most is {MAX_IMAGE_SIDE}")
    return scaled


def down_first(rows: Axis, columns: Axis) -> bool:
    """Whether Pillow 12 resizes such an image along its columns before it resizes its rows."""
    return rows.source > 100 * columns.source and rows.full < rows.source
