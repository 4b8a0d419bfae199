"""Nothing is compiled again because a batch, a text's length or an image's size changes.

By the Triton runner, which compiles what the native one does; `test_native` counts what that loads.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from gpu.common import gpu_alone
from gpu.models import Zoo, images, padded, texts
from vitrail_kernels.launch import Call

pytestmark = [pytest.mark.gpu, gpu_alone, pytest.mark.usefixtures("kernels")]

WARM = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
OTHERS = (5, 7, 9, 13, 17, 31, 33, 60, 63, 65, 100, 127, 129, 200, 250)


def variant(call: Call) -> tuple[Any, ...]:
    """What may tell two pieces of machine code of one kernel apart: no size that a call brings."""
    parts: list[Any] = [call.kernel.__name__, *call.config.options().items()]
    for parameter in call.kernel.params:
        value: Any = call.arguments.get(parameter.name)
        if isinstance(value, torch.Tensor):
            parts.append(value.dtype)
        elif hasattr(value, "block_shape"):
            parts.append((value.base.dtype, *value.block_shape))
        elif parameter.is_constexpr or value is None:
            parts.append(value)
    return tuple(parts)


class Watched:
    """The kernels' launches since the test began, and what Triton compiled or loaded for them."""

    def __init__(self, kernels: list[Any]) -> None:
        self.kernels, self.variants = kernels, set[tuple[Any, ...]]()

    def compiled(self) -> Counter[str]:
        """How many pieces of machine code of each kernel there are."""
        counts = {
            kernel.__name__: sum(len(cache[0]) for cache in kernel.device_caches.values())
            for kernel in self.kernels
        }
        return Counter({name: count for name, count in counts.items() if count})

    def launched(self) -> Counter[str]:
        """In how many variants each kernel was launched."""
        return Counter(name for name, *_ in self.variants)


@pytest.fixture
def watched(cold: list[Any], monkeypatch: pytest.MonkeyPatch) -> Watched:
    watched, launch = Watched(cold), Call.launch

    def noted(call: Call) -> None:
        if call.grid.blocks:
            watched.variants.add(variant(call))
        launch(call)

    monkeypatch.setattr(Call, "launch", noted)
    return watched


def no_more_than_launched(watched: Watched) -> None:
    """One piece of machine code for each variant: nothing that a call brings made another."""
    assert watched.compiled() == watched.launched()
    assert watched.compiled(), "nothing was compiled: the count sees no kernel"


def test_batches_and_image_sizes_compile_nothing(zoo: Zoo, watched: Watched) -> None:
    """ViT-B/16: once each tile has served, no batch and no size needs another."""
    model, pool = zoo.ours("ViT-B/16", runner="triton"), images(max(WARM))
    for batch in WARM:
        model.encode_image(pool[:batch], batch_size=batch)
    model.forward(pixel_values=images(2, (240, 256)))
    no_more_than_launched(watched)
    before = watched.compiled()
    for batch in OTHERS:
        model.encode_image(pool[:batch], batch_size=batch)
    for size in ((224, 256), (384, 384), (160, 512), (32, 16), (208, 240)):
        for batch in (1, 3, 20):
            model.encode_image(images(batch, size), batch_size=batch)
    assert watched.compiled() - before == Counter()
    no_more_than_launched(watched)


def test_lengths_of_texts_compile_nothing(zoo: Zoo, watched: Watched) -> None:
    model = zoo.ours("CLIP B/32", runner="triton")
    pool = texts(model, max(WARM))
    for batch in WARM:
        model.encode_text(pool[:batch], batch_size=batch)
    model.forward(input_ids=padded(pool[:3]))
    no_more_than_launched(watched)
    before = watched.compiled()
    for batch in OTHERS:
        model.encode_text(pool[-batch:], batch_size=batch)
    for length in range(2, 78, 5):
        text = [3] * (length - 1) + pool[0][-1:]
        model.encode_text([text, text[-2:]])
        model.forward(input_ids=padded([text, text[-2:]]))
    assert watched.compiled() - before == Counter()
    no_more_than_launched(watched)


def test_a_new_width_does_compile(zoo: Zoo, watched: Watched) -> None:
    """The count can fail: another model's widths are other machine code."""
    pixels = images(2)
    zoo.ours("ViT-B/16", runner="triton").encode_image(pixels)
    before = watched.compiled()
    zoo.ours("CLIP L/14", runner="triton").encode_image(pixels)
    assert watched.compiled() - before != Counter()
    no_more_than_launched(watched)
