"""The keys of config.json that the shapes of the tensors contradict, one sentence each.

They come first in the error about tensors that do not fit: a wrong number in config.json makes
hundreds of tensors misshaped, and the list of these does not show the number.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from vitrail.spec import BlockSpec, HeadSpec, ModelSpec, Shape, TextSpec, VisionSpec
from vitrail.zoo.common import Family


class Fact(NamedTuple):
    """A key of config.json: its value there, the value that the tensors show (None: none does).

    ``sentence``: about the tensors, with ``{}`` for their value. ``note``: follows the value.
    """

    key: str
    config: object
    tensors: object
    sentence: str
    note: str = ""


def contradictions(
    spec: ModelSpec, family: Family, config: Mapping[str, Any], shapes: Mapping[str, Shape]
) -> Iterator[str]:
    """Such as "config.json says hidden_size 390, the tensors are 384 wide".

    ``shapes``: of the stored tensors by canonical name, without leading dimensions of 1. If many
    tensors show a number, most of them must agree: one damaged tensor is no contradiction.
    """
    towers: tuple[tuple[str, VisionSpec | TextSpec | None], ...]
    towers = ("vision", spec.vision), ("text", spec.text)
    for tower, tower_spec in towers:
        if tower_spec is None:
            continue
        nested = [config.get(f"{tower}_{name}") or {} for name in ("config", "config_dict")]
        for fact in _tower_facts(tower_spec, tower, family, shapes):
            if not any(nested) or config.get(fact.key) == fact.config:
                yield from _sentence(fact, "config.json", config)
            else:
                yield from _sentence(fact, f"config.json ({tower}_config)", nested[0] | nested[1])
    if spec.head is not None:
        yield from _sentence(_head_fact(spec.head, config, shapes), "config.json", config)


def _sentence(fact: Fact, location: str, values: Mapping[str, Any]) -> Iterator[str]:
    if fact.tensors is None or fact.tensors == fact.config:
        return
    value = values.get(fact.key, fact.config)
    if isinstance(value, bool):
        value = str(value).lower()
    elif isinstance(value, dict):
        value = f"of {fact.config} labels"
    says = f"says {fact.key} {value}" if fact.key in values else f"leaves {fact.key} at {value}"
    yield f"{location} {says}{fact.note}, {fact.sentence.format(fact.tensors)}"


def _most_common(shapes: Mapping[str, Shape], pattern: str, axis: int) -> int | None:
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
    yield from _block_facts(spec.blocks, tower, family, shapes)
    if isinstance(spec, VisionSpec):
        yield from _vision_facts(spec, shapes)
    else:
        vocab = _most_common(shapes, r"text\.token", -2)
        yield Fact("vocab_size", spec.vocab, vocab, "the token table has {} rows")
        key, context = "max_position_embeddings", _most_common(shapes, r"text\.position", -2)
        yield Fact(key, spec.context, context, "the position table has {} rows")
    if spec.projection is not None:
        width = _most_common(shapes, rf"{tower}\.projection\.weight", -2)
        yield Fact("projection_dim", spec.projection, width, "the projection is {} wide")


def _block_facts(
    spec: BlockSpec, tower: str, family: Family, shapes: Mapping[str, Shape]
) -> Iterator[Fact]:
    width = _most_common(shapes, rf"{tower}\.(blocks\.\d+\.)?norm[12]?\.(weight|bias)", -1)
    yield Fact("hidden_size", spec.width, width, "the tensors are {} wide")
    block = re.compile(rf"{tower}\.blocks\.(\d+)\.")
    layers = {match[1] for name in shapes if (match := block.match(name))}
    if not layers:
        return
    yield Fact("num_hidden_layers", spec.layers, len(layers), "the tensors have {} layers")
    if width == spec.width:  # a ratio follows from the width
        mlp = _most_common(shapes, rf"{tower}\.blocks\.\d+\.down\.weight", -1)
        note = "" if family.mlp_key == "intermediate_size" else f" (MLPs {spec.mlp} wide)"
        yield Fact(family.mlp_key, spec.mlp, mlp, "the tensors' MLPs are {} wide", note)
    if any("qkv_bias" in schema.defaults for schema in family.schemas.values()):
        biased = any(name.endswith(".q.bias") for name in shapes)
        sentence = f"the queries have {'a' if biased else 'no'} bias"
        yield Fact("qkv_bias", spec.qkv_bias, biased, sentence)


def _vision_facts(spec: VisionSpec, shapes: Mapping[str, Shape]) -> Iterator[Fact]:
    patch, weight = spec.patch, shapes.get("vision.patch.weight", ())
    if len(weight) == 4:
        patch = weight[2], weight[3]
        yield Fact("num_channels", spec.channels, weight[1], "the patch projection reads {}")
        sentence = "the patch projection reads patches of {}"
        yield Fact("patch_size", _side(spec.patch), _side(patch), sentence)
    position = shapes.get("vision.position", ())
    if len(position) == 2 and min(patch) > 0:
        patches = position[0] - (spec.positions - spec.grid[0] * spec.grid[1])
        side = math.isqrt(max(patches, 0))
        own = spec.image[0] // patch[0] * (spec.image[1] // patch[1])
        if side * side == patches and patches not in (0, own):
            image = _side((side * patch[0], side * patch[1]))
            yield Fact("image_size", _side(spec.image), image, "the position table is for {}")
    if spec.registers:
        registers = _most_common(shapes, r"vision\.registers", -2)
        yield Fact("num_register_tokens", spec.registers, registers, "the tensors have {}")
    if spec.pooler is not None:
        pooler = _most_common(shapes, r"vision\.pooler\.weight", -2)
        yield Fact("pooler_output_size", spec.pooler.width, pooler, "the pooler is {} wide")


def _side(size: tuple[int, int]) -> str:
    """The value in config.json: one number for a square."""
    return str(size[0]) if size[0] == size[1] else f"[{size[0]}, {size[1]}]"


def _head_fact(head: HeadSpec, config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Fact:
    rows = _most_common(shapes, r"head\.(class\.)?bias", -1)
    key = "num_labels" if config.get("id2label") is None else "id2label"
    return Fact(key, len(head.labels), rows, "the classifier has {} rows")
