"""Tensor maps over more rows than a call has, whose numbers are NaN: no bit of a result changes.

The native runner encodes its maps for a capacity, and what lies past a call's rows is whatever an
earlier call left there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vitrail
from kernels.test_operators import same_bits
from vitrail.plan.plan import Step
from vitrail.runtime import RUNNERS
from vitrail.runtime.triton import TritonRunner
from vitrail_kernels import OPERATORS
from vitrail_kernels.launch import INTERPRETED, descriptor

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(not INTERPRETED.tma, reason="there are no tensor maps before sm_90"),
]

EXTRA = 70
"""Rows past the end of every buffer: more than a tile's."""


class RoomyRunner(TritonRunner):
    """Every buffer of a launch with maps is copied into a larger one, and back."""

    maps = 0

    def run_step(self, step: Step, tensors: Mapping[str, Tensor], longest: int) -> None:
        roomy: dict[int, Tensor] = {}
        buffers = {name for name, _ in step.buffers}
        given = dict(tensors)
        for name in buffers:
            small = tensors[name]
            if small.dim() == 2 and small.is_floating_point() and "stats" not in name:
                if small.data_ptr() not in roomy:
                    large = torch.full((small.shape[0] + EXTRA, small.shape[1]), float("nan"))
                    roomy[small.data_ptr()] = large.to(small.dtype)
                    roomy[small.data_ptr()][: len(small)] = small
                given[name] = roomy[small.data_ptr()][: len(small)]
        larger = {large.data_ptr(): large for large in roomy.values()}
        for call in OPERATORS[step.op].calls(INTERPRETED, **given, **step.resolve(longest)):
            arguments = dict(call.arguments)
            for name, value in call.arguments.items():
                if hasattr(value, "block_shape") and value.base.data_ptr() in larger:
                    arguments[name] = descriptor(larger[value.base.data_ptr()], *value.block_shape)
                    RoomyRunner.maps += 1
            dataclasses.replace(call, arguments=arguments).launch()
        for name in buffers:
            if given[name] is not tensors[name]:
                tensors[name].copy_(given[name])


@pytest.mark.usefixtures("ordered_dot")
def test_what_lies_past_the_rows_of_a_call_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = Path(vitrail.__file__).parent / "assets/clip"
    plain = vitrail.load(clip, dtype="float16", backend="triton")
    monkeypatch.setitem(RUNNERS, "triton", RoomyRunner)
    roomy = vitrail.load(clip, dtype="float16", backend="triton")
    images, texts = torch.randn(1, 3, 56, 56), ["red circle", "a"]
    assert same_bits(roomy.encode_image(images), plain.encode_image(images))
    assert same_bits(roomy.encode_text(texts), plain.encode_text(texts))
    result, expected = (model.forward(pixel_values=images) for model in (roomy, plain))
    assert same_bits(result.image_embeds, expected.image_embeds)
    assert RoomyRunner.maps > 50
