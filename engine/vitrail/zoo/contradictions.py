"""A sentence for each key of config.json that the shapes of the tensors contradict.

The sentences begin the error about tensors that do not fit. A wrong number in config.json makes
hundreds of tensors misshaped, and their list does not show which number is wrong.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from vitrail.spec import HeadSpec, ModelSpec, Shape, TextSpec, VisionSpec
from vitrail.zoo.common import Family


class Fact(NamedTuple):
    """A key of config.json, its value there, and the tensors' value (None: they do not show it).

    ``sentence`` describes the tensors, with ``{}`` for the value. ``note`` follows the key's value.
    """

    key: str
    config: object
    tensors: object
    sentence: str
    note: str = ""


def contradictions(
    spec: ModelSpec, family: Family, config: Mapping[str, Any], shapes: Mapping[str, Shape]
) -> Iterator[str]:
    """Sentences such as "config.json says hidden_size 390, the tensors are 384 wide".

    ``shapes``: shapes of the stored tensors by canonical name, without leading dimensions of 1. If
    several tensors show a number, the most common number counts: a single damaged tensor is no
    contradiction.
    """
    for tower, facts in (
        ("vision", _tower_facts(spec.vision, "vision", family, shapes) if spec.vision else ()),
        ("text", _tower_facts(spec.text, "text", family, shapes) if spec.text else ()),
        ("head", [_head_fact(spec.head, config, shapes)] if spec.head else ()),
    ):
        nested = [config.get(f"{tower}_{name}") or {} for name in ("config", "config_dict")]
        for fact in facts:
            location, values = f"config.json ({tower}_config)", nested[0] | nested[1]
            if not values or config.get(fact.key) == fact.config:
                location, values = "config.json", config
            if fact.tensors not in (None, fact.config):
                yield f"{location} {_sentence(fact, values)}"


def _sentence(fact: Fact, values: Mapping[str, Any]) -> str:
    value = values.get(fact.key, fact.config)
    if isinstance(value, dict):
        value = f"of {fact.config} labels"
    text = str(value).lower() if isinstance(value, bool) else value
    says = f"says {fact.key} {text}" if fact.key in values else f"leaves {fact.key} at {text}"
    return f"{says}{fact.note}, {fact.sentence.format(fact.tensors)}"


def _size(shapes: Mapping[str, Shape], pattern: str, axis: int) -> int | None:
    """The most common size along ``axis`` of the tensors whose names match ``pattern``."""
    sizes = Counter(
        shape[axis]
        for name, shape in shapes.items()
        if len(shape) >= abs(axis) and re.fullmatch(pattern, name)
    )
    return sizes.most_common(1)[0][0] if sizes else None


def _tower_facts(
    spec: VisionSpec | TextSpec, tower: str, family: Family, shapes: Mapping[str, Shape]
) -> Iterator[Fact]:
    blocks = spec.blocks
    width = _size(shapes, rf"{tower}\.(blocks\.\d+\.)?norm[12]?\.(weight|bias)", -1)
    yield Fact("hidden_size", blocks.width, width, "the tensors are {} wide")
    layers = {name.split(".")[2] for name in shapes if name.startswith(f"{tower}.blocks.")}
    yield Fact(
        "num_hidden_layers", blocks.layers, len(layers) or None, "the tensors have {} layers"
    )
    if width == blocks.width:  # mlp_ratio is relative to the width
        mlp = _size(shapes, rf"{tower}\.blocks\.\d+\.down\.weight", -1)
        note = "" if family.mlp_key == "intermediate_size" else f" (MLPs {blocks.mlp} wide)"
        yield Fact(family.mlp_key, blocks.mlp, mlp, "the tensors' MLPs are {} wide", note)
    if layers and any("qkv_bias" in schema.defaults for schema in family.schemas.values()):
        biased = any(name.endswith(".q.bias") for name in shapes)
        sentence = f"the queries have {'a' if biased else 'no'} bias"
        yield Fact("qkv_bias", blocks.qkv_bias, biased, sentence)
    projection = _size(shapes, rf"{tower}\.projection\.weight", -2)
    yield Fact("projection_dim", spec.projection, projection, "the projection is {} wide")
    rows = _size(shapes, rf"{tower}\.position", -2)
    if isinstance(spec, VisionSpec):
        yield from _image_facts(spec, rows, shapes)
        return
    yield Fact("max_position_embeddings", spec.context, rows, "the position table has {} rows")
    vocab = _size(shapes, r"text\.token", -2)
    yield Fact("vocab_size", spec.vocab, vocab, "the token table has {} rows")


def _image_facts(
    spec: VisionSpec, positions: int | None, shapes: Mapping[str, Shape]
) -> Iterator[Fact]:
    patch, weight = spec.patch, shapes.get("vision.patch.weight", ())
    if len(weight) == 4:
        patch = weight[2], weight[3]
        yield Fact("num_channels", spec.channels, weight[1], "the patch projection reads {}")
        sentence = "the patch projection reads patches of {}"
        yield Fact("patch_size", _side(spec.patch), _side(patch), sentence)
    if positions is not None and min(patch) > 0:
        patches = positions - spec.positioned
        side = math.isqrt(max(patches, 0))
        configured = spec.image[0] // patch[0] * (spec.image[1] // patch[1])
        if side * side == patches and patches not in (0, configured):
            image = _side((side * patch[0], side * patch[1]))
            yield Fact("image_size", _side(spec.image), image, "the position table is for {}")
    if spec.registers:
        registers = _size(shapes, r"vision\.registers", -2)
        yield Fact("num_register_tokens", spec.registers, registers, "the tensors have {}")
    if spec.pooler is not None:
        pooler = _size(shapes, r"vision\.pooler\.weight", -2)
        yield Fact("pooler_output_size", spec.pooler.width, pooler, "the pooler is {} wide")


def _head_fact(head: HeadSpec, config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Fact:
    key = "num_labels" if config.get("id2label") is None else "id2label"
    rows = _size(shapes, r"head\.(class\.)?bias", -1)
    return Fact(key, len(head.labels), rows, "the classifier has {} rows")


def _side(size: tuple[int, int]) -> str:
    """The value in config.json: a single number for a square."""
    return str(size[0]) if size[0] == size[1] else f"[{size[0]}, {size[1]}]"
