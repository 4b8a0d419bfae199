"""preprocessor_config.json -> ImageSpec, as the PIL processors of transformers 5 read it.

Source: ``models/*/image_processing_pil_*.py``, and ``PilBackend`` and ``get_size_dict`` in
``image_processing_{backends,utils}.py``. A null in the file does not mean the default: a null flag
is off, and a null value must not be needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vitrail.errors import CheckpointError, show
from vitrail.spec import MAX_IMAGE_SIDE, ImageSpec
from vitrail.zoo.fields import Fields, is_integer, is_number, words

_FILE = "preprocessor_config.json"

Resize = tuple[Literal["shortest"], int] | tuple[Literal["exact"], int, int]

# Class attributes of CLIPImageProcessorPil. Other processors differ from it by a few keys.
BASE: Mapping[str, Any] = {
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_pad": False,
    "use_square_size": False,
}


@dataclass(frozen=True, slots=True)
class Processor:
    """An image processor of transformers. ``name``: its class name without "ImageProcessor"."""

    name: str
    defaults: Mapping[str, Any]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Every published spelling of its class name."""
        suffixes = "ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor"
        return tuple(self.name + suffix for suffix in suffixes)


_TYPES = ("image_processor_type", "feature_extractor_type")

# Keys about the batch, the container or the tensor library: no effect on the pixels.
INERT = words(
    """
    _valid_kwargs_names _valid_processor_keys data_format device disable_grouping image_seq_length
    input_data_format pad_size processor_class return_tensors
    """
)

_SIZES = (
    {"height", "width"},
    {"shortest_edge"},
    {"shortest_edge", "longest_edge"},
    {"longest_edge"},
    {"max_height", "max_width"},
    {"min_pixels", "max_pixels"},
)


def read_image_spec(
    config: Mapping[str, Any],
    default: Processor,
    processors: Mapping[str, Processor],
    channels: int,
) -> ImageSpec:
    """The preprocessing of a checkpoint, for an image tower of ``channels`` channels.

    ``default``: the processor if ``config`` names none; ``processors``: by class name. Raises
    CheckpointError for a class, key or value that Vitrail does not reproduce exactly.
    """
    named = [config[key] for key in _TYPES if config.get(key) is not None]
    if named and (not isinstance(named[0], str) or named[0] not in processors):
        choices = f"wanted one of {', '.join(processors)}"
        raise CheckpointError(f"{_FILE}: image_processor_type: got {show(named[0])}, {choices}")
    processor = processors[named[0]] if named else default
    fields = Fields(_FILE, config, processor.defaults)
    unknown = [
        key
        for key in config
        if key not in fields.defaults and key not in INERT and key not in _TYPES
    ]
    if unknown:
        raise CheckpointError(
            f"{_FILE}: unknown key {', '.join(map(repr, unknown[:20]))}: it may change the "
            f"pixels; wanted only keys of {processor.name}ImageProcessor"
        )
    if _flag(fields, "do_pad"):
        fields.refuse("do_pad", "false: padding is not supported")
    mean, std = None, None
    if _flag(fields, "do_normalize"):
        mean = _per_channel(fields, "image_mean", channels)
        std = _per_channel(fields, "image_std", channels)
        if min(std) <= 0:
            fields.refuse("image_std", "numbers over 0")
    resize = _resize(fields, processor)
    unused = resize is None and fields.get("resample") is None
    return ImageSpec(
        convert_rgb=_flag(fields, "do_convert_rgb"),
        resize=resize,
        resample=fields.defaults["resample"] if unused else fields.count("resample", 0, 5),
        crop=_crop(fields),
        rescale=fields.number("rescale_factor", 0, 1e6) if _flag(fields, "do_rescale") else None,
        mean=mean,
        std=std,
    )


def _flag(fields: Fields, key: str) -> bool:
    return fields.get(key) is not None and fields.flag(key)


def _sides(fields: Fields, key: str, square: bool) -> dict[str, int]:
    """A size as an object: ``n`` is a square or a shortest edge, ``[h, w]`` height and width."""
    value = fields.get(key)
    if is_integer(value):
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    elif isinstance(value, list) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    if not isinstance(value, dict) or set(value) not in _SIZES:
        fields.refuse(key, "an integer, [height, width], {height, width} or {shortest_edge}")
    if not all(is_integer(side) and side >= 1 for side in value.values()):
        fields.refuse(key, "integers from 1")
    return dict(value)


def _resize(fields: Fields, processor: Processor) -> Resize | None:
    resizes = _flag(fields, "do_resize")
    if not resizes and fields.get("size") is None:
        return None
    size = _sides(fields, "size", _flag(fields, "default_to_square"))
    if _flag(fields, "use_square_size"):
        # transformers 4 makes a square of the given edge, transformers 5 always of 224
        if processor.name != "CLIP" or size != {"shortest_edge": 224}:
            fields.refuse("use_square_size", "false, unless CLIP's shortest edge is 224")
        size = {"height": 224, "width": 224}
    if not resizes:
        return None
    if max(size.values()) > MAX_IMAGE_SIDE:
        fields.refuse("size", f"at most {MAX_IMAGE_SIDE}")
    if set(size) == {"shortest_edge"}:
        return ("shortest", size["shortest_edge"])
    if set(size) == {"height", "width"}:
        return ("exact", size["height"], size["width"])
    fields.refuse("size", "{height, width} or {shortest_edge}; the others are not supported")


def _crop(fields: Fields) -> tuple[int, int] | None:
    crops = _flag(fields, "do_center_crop")
    if not crops and fields.get("crop_size") is None:
        return None
    size = _sides(fields, "crop_size", square=True)
    if not crops:
        return None
    if set(size) != {"height", "width"} or max(size.values()) > MAX_IMAGE_SIDE:
        fields.refuse("crop_size", f"a height and a width of at most {MAX_IMAGE_SIDE}")
    return size["height"], size["width"]


def _per_channel(fields: Fields, key: str, channels: int) -> tuple[float, ...]:
    """A finite number per channel, from a list or from a single number."""
    value = fields.get(key)
    values = value if isinstance(value, list) else [value] * channels
    if len(values) != channels or not all(is_number(v) and abs(v) < 1e6 for v in values):
        fields.refuse(key, f"{channels} finite numbers, or one for all channels")
    return tuple(map(float, values))
