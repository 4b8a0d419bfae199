"""preprocessor_config.json -> ImageSpec, against the processors of transformers."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import hypothesis.strategies as st
import pytest
import transformers
from hypothesis import given, settings
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import checkpoints
from vitrail import zoo
from vitrail.errors import CheckpointError
from vitrail.spec import ImageSpec
from vitrail.zoo.hf import FAMILIES, PROCESSORS
from vitrail.zoo.preprocessor import BASE
from vitrail.zoo.preprocessor import read_image_spec as read_with

transformers.logging.set_verbosity_error()

ORACLES = {
    "CLIP": CLIPImageProcessorPil,
    "ViT": ViTImageProcessorPil,
    "DeiT": DeiTImageProcessorPil,
    "Bit": BitImageProcessorPil,
}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


def read_image_spec(config: dict[str, Any], family: str, channels: int) -> ImageSpec:
    """The preprocessing of a checkpoint of ``family``."""
    (default,) = (each.processor for each in FAMILIES if each.name == family)
    return read_with(config, default, PROCESSORS, channels)


# ---- published checkpoints

CLIP_224 = ImageSpec(True, ("shortest", 224), 3, (224, 224), 1 / 255, CLIP_MEAN, CLIP_STD)
CLIP_336 = ImageSpec(True, ("shortest", 336), 3, (336, 336), 1 / 255, CLIP_MEAN, CLIP_STD)
VIT_224 = ImageSpec(False, ("exact", 224, 224), 2, None, 1 / 255, HALF, HALF)
VIT_384 = ImageSpec(False, ("exact", 384, 384), 2, None, 1 / 255, HALF, HALF)
DINO = ImageSpec(False, ("exact", 224, 224), 2, None, 1 / 255, IMAGENET_MEAN, IMAGENET_STD)
DEIT = ImageSpec(False, ("exact", 256, 256), 3, (224, 224), 1 / 255, IMAGENET_MEAN, IMAGENET_STD)
BIT = ImageSpec(True, ("shortest", 256), 3, (224, 224), 1 / 255, IMAGENET_MEAN, IMAGENET_STD)
GOLDEN = {
    "vit-base-patch16-224": VIT_224,
    "vit-large-patch16-384": VIT_384,
    "vit-base-patch16-224-in21k": VIT_224,
    "vit-small-patch16-224": VIT_224,
    "dino-vits16": DINO,
    "clip-vit-base-patch32": CLIP_224,
    "clip-vit-base-patch16": CLIP_224,
    "clip-vit-large-patch14": CLIP_224,
    "clip-vit-large-patch14-336": CLIP_336,
    "clip-vit-b-32-laion2b": CLIP_224,
    "clip-vit-h-14-laion2b": CLIP_224,
    "clip-vit-h-14-image-encoder": None,
    "sd-image-variations-encoder": CLIP_224,
    "sd-text-encoder": None,
    "deit-base-distilled-patch16-224": DEIT,
    "dinov2-small": BIT,
    "dinov2-base": BIT,
    "dinov2-large": BIT,
    "dinov2-giant": BIT,
    "dinov2-small-imagenet1k-1-layer": BIT,
    "dinov2-with-registers-base": BIT,
}


def test_the_published_checkpoints_are_those_with_a_golden_spec() -> None:
    assert sorted(GOLDEN) == checkpoints.NAMES


@pytest.mark.parametrize("name", GOLDEN)
def test_a_published_checkpoint_has_its_preprocessing(name: str) -> None:
    assert zoo.read_spec(checkpoints.load(name)).image == GOLDEN[name]


# ---- against transformers


def _expected(oracle: Any) -> ImageSpec:
    """What PilBackend._preprocess does with the attributes of a processor."""
    resize: Any = None
    resample = type(oracle).resample if oracle.resample is None else oracle.resample
    if oracle.do_resize:
        size = oracle.size
        edge = size.shortest_edge
        resize = ("shortest", edge) if edge else ("exact", size.height, size.width)
    crop = (oracle.crop_size.height, oracle.crop_size.width) if oracle.do_center_crop else None
    mean, std = oracle.image_mean, oracle.image_std
    if not isinstance(mean, tuple | list):
        mean = (mean,) * 3
    if not isinstance(std, tuple | list):
        std = (std,) * 3
    return ImageSpec(
        convert_rgb=bool(oracle.do_convert_rgb),
        resize=resize,
        resample=int(resample),
        crop=crop,
        rescale=oracle.rescale_factor if oracle.do_rescale else None,
        mean=tuple(map(float, mean)) if oracle.do_normalize else None,
        std=tuple(map(float, std)) if oracle.do_normalize else None,
    )


SIDE = st.integers(1, 2000)
FLAG = st.none() | st.booleans()
SQUARE = st.fixed_dictionaries({"height": SIDE, "width": SIDE})
EDGE = st.fixed_dictionaries({"shortest_edge": SIDE})
PAIR = st.lists(SIDE, min_size=2, max_size=2)
THREE = st.lists(st.floats(0.01, 1), min_size=3, max_size=3)
KEYS: dict[str, st.SearchStrategy[Any]] = {
    "do_convert_rgb": FLAG,
    "do_center_crop": FLAG,
    "do_resize": FLAG,
    "size": st.none() | SIDE | PAIR | SQUARE | EDGE,
    "default_to_square": FLAG,
    "resample": st.none() | st.integers(0, 5),
    "crop_size": st.none() | SIDE | PAIR | SQUARE,
    "do_rescale": FLAG,
    "rescale_factor": st.none() | st.floats(1e-6, 2),
    "do_normalize": FLAG,
    "image_mean": st.none() | THREE | st.floats(-1, 1),
    "image_std": st.none() | THREE | st.floats(0.01, 1) | st.just(1),
    "do_pad": st.none() | st.just(False),
    "processor_class": st.none() | st.just("CLIPProcessor"),
    "data_format": st.none() | st.just("channels_first"),
    "device": st.none(),
    "image_seq_length": st.none() | st.just(7),
}


NEEDED = {
    "do_resize": ("size", "resample"),
    "do_center_crop": ("crop_size",),
    "do_rescale": ("rescale_factor",),
    "do_normalize": ("image_mean", "image_std"),
}


@pytest.mark.parametrize("kind", ORACLES)
@settings(max_examples=200, deadline=None)
@given(config=st.fixed_dictionaries({}, optional=KEYS))
def test_a_processor_reads_as_in_transformers(kind: str, config: dict[str, Any]) -> None:
    """Where transformers would stop at a null that is needed, so does the load."""
    config |= {"image_processor_type": f"{kind}ImageProcessor"}
    oracle = ORACLES[kind].from_dict(dict(config))
    lacking = [
        key
        for flag, keys in NEEDED.items()
        for key in keys
        if getattr(oracle, flag) and getattr(oracle, key) is None
    ]
    if lacking:
        with pytest.raises(CheckpointError, match=f"({'|'.join(lacking)}): got None"):
            read_image_spec(config, "vit", 3)
    else:
        assert read_image_spec(config, "vit", 3) == _expected(oracle)


@pytest.mark.parametrize("size", [{}, {"size": 224}, {"size": {"shortest_edge": 224}}])
@pytest.mark.parametrize("square", [True, False, None])
def test_use_square_size_reads_as_in_transformers(
    size: dict[str, Any], square: bool | None
) -> None:
    config = {**size, "use_square_size": square}
    assert read_image_spec(config, "clip", 3) == _expected(CLIPImageProcessorPil(**config))


@pytest.mark.parametrize("kind", ORACLES)
def test_a_processor_that_transformers_saves_is_read_back(kind: str) -> None:
    """Every key that ``to_dict`` writes is known."""
    oracle = ORACLES[kind]()
    written = json.loads(oracle.to_json_string())
    assert written["image_processor_type"] == f"{kind}ImageProcessor"
    assert read_image_spec(written, "vit", 3) == _expected(oracle)


def test_the_nulls_that_transformers_4_saved_for_a_fast_vit_change_nothing() -> None:
    nulls = ("crop_size", "do_center_crop", "do_convert_rgb", "do_pad", "pad_size", "device")
    nulls += ("disable_grouping", "input_data_format", "return_tensors")
    saved = {"image_processor_type": "ViTImageProcessorFast", "default_to_square": True}
    saved |= {"data_format": "channels_first", **dict.fromkeys(nulls)}
    assert read_image_spec(saved, "vit", 3) == _expected(ViTImageProcessorPil())


@pytest.mark.parametrize("kind", ORACLES)
def test_a_null_flag_is_off(kind: str) -> None:
    """transformers keeps a null that a file holds, whatever the default of the class."""
    config = {"image_processor_type": f"{kind}ImageProcessor", "do_center_crop": None}
    config |= {"do_normalize": None, "do_rescale": None, "do_resize": None, "resample": None}
    spec = read_image_spec(config, "vit", 3)
    assert (spec.resize, spec.crop, spec.rescale, spec.mean, spec.std) == (None,) * 5


# ---- which processor


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("key", ["image_processor_type", "feature_extractor_type"])
def test_every_spelling_of_a_class_is_that_class(name: str, key: str) -> None:
    (kind,) = (kind for kind in ORACLES if name.startswith(kind))
    assert read_image_spec({key: name}, "vit", 3) == _expected(ORACLES[kind]())


def test_the_image_processor_is_asked_before_the_feature_extractor() -> None:
    config = {
        "image_processor_type": "ViTImageProcessor",
        "feature_extractor_type": "CLIPFeatureExtractor",
    }
    assert read_image_spec(config, "clip", 3) == _expected(ViTImageProcessorPil())


DEFAULTS = {
    "vit": "ViT",
    "deit": "DeiT",
    "clip": "CLIP",
    "dinov2": "Bit",
    "dinov2_with_registers": "Bit",
}


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_without_a_class_the_family_has_its_own(family: str) -> None:
    assert read_image_spec({}, family, 3) == _expected(ORACLES[DEFAULTS[family]]())


def test_no_preprocessor_is_no_error() -> None:
    checkpoint = dataclasses.replace(checkpoints.load("dinov2-base"), preprocessor=None)
    assert zoo.read_spec(checkpoint).image is None


def test_a_text_tower_has_no_preprocessing() -> None:
    checkpoint = checkpoints.load("sd-text-encoder")
    beside = dataclasses.replace(checkpoint, preprocessor={"image_processor_type": "Other"})
    assert zoo.read_spec(beside).image is None


# ---- legacy forms


@pytest.mark.parametrize(
    ("family", "size", "resize"),
    [
        ("clip", 224, ("shortest", 224)),
        ("dinov2", 256, ("shortest", 256)),
        ("vit", 224, ("exact", 224, 224)),
        ("clip", {"shortest_edge": 30}, ("shortest", 30)),
        ("vit", {"shortest_edge": 30}, ("shortest", 30)),
        ("clip", {"height": 20, "width": 30}, ("exact", 20, 30)),
        ("clip", [20, 30], ("exact", 20, 30)),
    ],
)
def test_a_size_may_be_an_integer_a_pair_or_an_object(
    family: str, size: object, resize: tuple[Any, ...]
) -> None:
    assert read_image_spec({"size": size}, family, 3).resize == resize


def test_one_number_serves_every_channel() -> None:
    spec = read_image_spec({"image_mean": 0.5, "image_std": 1}, "vit", 4)
    assert (spec.mean, spec.std) == ((0.5,) * 4, (1.0,) * 4)


def test_a_square_from_clips_own_edge_is_taken() -> None:
    spec = read_image_spec({"size": 224, "use_square_size": True}, "clip", 3)
    assert spec.resize == ("exact", 224, 224)


# ---- refused

BAD = [
    ({"image_mean": [0.5, 0.5]}, "image_mean: got [0.5, 0.5], wanted 3 finite numbers"),
    ({"image_std": [0.5, 0.5, 0.5, 0.5]}, "image_std: got [0.5, 0.5, 0.5, 0.5], wanted 3"),
    ({"image_mean": []}, "image_mean: got []"),
    ({"image_std": [0.5, 0, 0.5]}, "image_std: got [0.5, 0, 0.5], wanted numbers over 0"),
    ({"image_std": 0}, "image_std: got 0, wanted numbers over 0"),
    ({"image_std": [0.5, -0.5, 0.5]}, "image_std: got [0.5, -0.5, 0.5]"),
    ({"image_mean": [0.5, math.nan, 0.5]}, "image_mean: got [0.5, nan, 0.5]"),
    ({"image_mean": [0.5, math.inf, 0.5]}, "image_mean: got [0.5, inf, 0.5]"),
    ({"image_mean": ["0.5", 0.5, 0.5]}, "image_mean: got ['0.5', 0.5, 0.5]"),
    ({"image_mean": [True, 0.5, 0.5]}, "image_mean: got [True, 0.5, 0.5]"),
    ({"image_mean": {"r": 0.5}}, "image_mean: got {'r': 0.5}"),
    ({"rescale_factor": 0}, "rescale_factor: got 0"),
    ({"rescale_factor": -1}, "rescale_factor: got -1"),
    ({"rescale_factor": math.nan}, "rescale_factor: got nan"),
    ({"rescale_factor": "1/255"}, "rescale_factor: got '1/255'"),
    ({"resample": 6}, "resample: got 6, wanted an integer from 0 to 5"),
    ({"resample": -1}, "resample: got -1"),
    ({"resample": "bicubic"}, "resample: got 'bicubic'"),
    ({"resample": True}, "resample: got True"),
    ({"do_resize": 1}, "do_resize: got 1, wanted true or false"),
    ({"do_normalize": "false"}, "do_normalize: got 'false'"),
    ({"size": 0}, "size: got 0, wanted integers from 1"),
    ({"size": -224}, "size: got -224"),
    ({"size": 224.0}, "size: got 224.0"),
    ({"size": "224"}, "size: got '224'"),
    ({"size": True}, "size: got True"),
    ({"size": [224]}, "size: got [224]"),
    ({"size": [224, 224, 3]}, "size: got [224, 224, 3]"),
    ({"size": 2**31}, "size: got 2147483648, wanted at most 16384"),
    ({"size": {}}, "size: got {}"),
    ({"size": {"height": 224}}, "size: got {'height': 224}"),
    ({"size": {"height": 224, "width": None}}, "wanted integers from 1"),
    ({"size": {"edge": 224}}, "size: got {'edge': 224}"),
    ({"size": {"shortest_edge": 224, "longest_edge": 300}}, "the others are not supported"),
    ({"size": {"longest_edge": 300}}, "the others are not supported"),
    ({"size": {"max_height": 3, "max_width": 3}}, "the others are not supported"),
    (
        {"crop_size": {"shortest_edge": 224}},
        "crop_size: got {'shortest_edge': 224}, wanted a height",
    ),
    ({"crop_size": 0}, "crop_size: got 0"),
    ({"crop_size": 2**31}, "crop_size: got 2147483648"),
    ({"image_processor_type": "ViTImageProcessor", "crop_size": None}, "crop_size: got None"),
    ({"do_pad": True}, "do_pad: got True, wanted false"),
    ({"do_pad": True, "pad_size": 224}, "do_pad: got True, wanted false"),
    ({"use_square_size": True, "size": 448}, "use_square_size: got True"),
    (
        {"use_square_size": True, "image_processor_type": "BitImageProcessor"},
        "use_square_size: got",
    ),
    ({"size": None}, "size: got None"),
    ({"image_std": None}, "image_std: got None"),
    ({"crop_pct": None}, "unknown key 'crop_pct'"),
    ({"crop_pct": 0.9}, "unknown key 'crop_pct': it may change the pixels"),
    ({"do_flip_channel_order": True}, "unknown key 'do_flip_channel_order'"),
    ({"size_divisor": 32, "max_size": 3}, "unknown key 'size_divisor', 'max_size'"),
    ({"image_processor_type": "SiglipImageProcessor"}, "got 'SiglipImageProcessor', wanted one of"),
    ({"image_processor_type": "ConvNextImageProcessor"}, "got 'ConvNextImageProcessor'"),
    ({"feature_extractor_type": "BeitFeatureExtractor"}, "got 'BeitFeatureExtractor'"),
    ({"image_processor_type": 3}, "image_processor_type: got 3"),
]


@pytest.mark.parametrize(("changes", "wanted"), BAD, ids=[str(bad[0]) for bad in BAD])
def test_a_bad_preprocessor_stops_the_load_by_name(changes: dict[str, Any], wanted: str) -> None:
    checkpoint = checkpoints.load("clip-vit-base-patch32")
    assert checkpoint.preprocessor is not None
    given_ = {key: value for key, value in checkpoint.preprocessor.items() if "type" not in key}
    with pytest.raises(CheckpointError, match=re.escape(wanted)) as caught:
        zoo.read_spec(dataclasses.replace(checkpoint, preprocessor=given_ | changes))
    assert str(caught.value).startswith("folder: preprocessor_config.json: ")


def test_mean_and_std_fit_the_channels_of_the_model() -> None:
    checkpoint = checkpoints.load("dinov2-small")
    config = {**checkpoint.config, "num_channels": 1}
    with pytest.raises(CheckpointError, match="wanted 1 finite numbers"):
        zoo.read_spec(dataclasses.replace(checkpoint, config=config))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_json_value_under_any_key_is_read_or_refused_by_us(data: st.DataObject) -> None:
    """No exception but CheckpointError leaves the reader."""
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.sampled_from(["height", "width", "shortest_edge"]), inner)
        ),
        max_leaves=5,
    )
    keys = st.sampled_from([*BASE, "image_processor_type", "other"])
    config = data.draw(st.dictionaries(keys, values, max_size=4))
    try:
        spec = read_image_spec(config, "clip", 3)
    except CheckpointError:
        return
    assert spec.resample in range(6)
