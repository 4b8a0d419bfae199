"""Threads, streams, and memory that is given back at once: the bits stay those of serial calls."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from random import Random
from threading import Barrier

import pytest
import torch
from torch import Tensor

import vitrail
from gpu.common import gpu_alone, same_bits
from gpu.models import Zoo, images, padded, texts

pytestmark = [pytest.mark.gpu, gpu_alone, pytest.mark.usefixtures("kernels")]

THREADS, CALLS = 8, 50
Calls = list[Callable[[], Tensor]]


def calls_of(zoo: Zoo) -> Calls:
    """Calls of several kinds and sizes, on two models."""
    vit, clip = zoo.ours("ViT-B/16"), zoo.ours("CLIP B/32")
    pools = [images(count, seed=count) for count in (1, 3, 16)]
    other, ids = images(2, (256, 320)), texts(clip, 16)

    def tokens(model: vitrail.Model, pixels: Tensor) -> Tensor:
        out = model.forward(pixel_values=pixels).last_hidden_state
        assert out is not None
        return out.cpu()

    return [
        *(lambda pixels=pixels: vit.encode_image(pixels) for pixels in pools),
        lambda: clip.encode_image(pools[1]),
        lambda: vit.encode_image(other),
        lambda: tokens(vit, pools[1]),
        lambda: clip.encode_text(ids),
        lambda: clip.encode_text(ids[:1]),
    ]


@pytest.mark.parametrize("streams", [False, True], ids=["one stream", "a stream each"])
def test_threads_give_the_serial_bits(streams: bool, zoo: Zoo) -> None:
    calls = calls_of(zoo)
    serial = [call() for call in calls]
    assert not same_bits(serial[0], serial[1][:1])
    torch.cuda.synchronize()

    def work(thread: int) -> list[str]:
        dice = Random(thread)
        stream = torch.cuda.Stream() if streams else torch.cuda.current_stream()
        with torch.cuda.stream(stream):
            chosen = [dice.randrange(len(calls)) for _ in range(CALLS)]
            return [
                f"thread {thread}, call {place}: kind {kind}"
                for place, kind in enumerate(chosen)
                if not same_bits(calls[kind](), serial[kind])
            ]

    with ThreadPoolExecutor(THREADS) as pool:
        wrong = [line for found in pool.map(work, range(THREADS)) for line in found]
    assert wrong == []


@pytest.mark.usefixtures("cold")
def test_threads_that_are_first_to_launch_give_the_serial_bits(zoo: Zoo) -> None:
    """All at once, when Triton has loaded no kernel yet; `test_native` has the same of C++."""
    model, pixels = zoo.ours("ViT-B/16", runner="triton"), images(4)
    start = Barrier(THREADS)

    def work(_: int) -> Tensor:
        start.wait()
        return model.encode_image(pixels)

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(work, range(THREADS)))
    wanted = model.encode_image(pixels)
    assert [n for n, out in enumerate(found) if not same_bits(out, wanted)] == []


def embedded(model: vitrail.Model, pixels: Tensor) -> Tensor:
    """A whole forward that is left on the stream: nothing waits for it."""
    assert model._vision is not None
    return model._vision.embeddings(pixels)["vision.embedding"]


def test_a_side_stream_gives_the_same(zoo: Zoo) -> None:
    """Work is put on the caller's stream, behind what is there already."""
    model, pixels = zoo.ours("ViT-B/16"), images(16)
    wanted = embedded(model, pixels), model.forward(pixel_values=pixels).last_hidden_state
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        late = torch.zeros_like(pixels)
        torch.cuda._sleep(200_000_000)  # the copy is a tenth of a second away when embed is called
        late.copy_(pixels)
        found = embedded(model, late), model.forward(pixel_values=late).last_hidden_state
    assert not side.query(), "a call waited for the GPU"
    side.synchronize()
    for ours, right in zip(found, wanted, strict=True):
        assert ours is not None
        assert right is not None
        assert same_bits(ours, right)


def test_streams_that_run_at_once_do_not_share_memory(zoo: Zoo) -> None:
    """No synchronization between calls on three streams, of other images and batches."""
    model = zoo.ours("ViT-B/16")
    inputs = [images(count, seed=count) for count in (1, 8, 33)]
    wanted = [embedded(model, pixels) for pixels in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    found: list[tuple[int, Tensor]] = []
    for _ in range(20):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found.append((number, embedded(model, inputs[number])))
    torch.cuda.synchronize()
    wrong = [n for n, (number, out) in enumerate(found) if not same_bits(out, wanted[number])]
    assert wrong == []


def test_inputs_may_be_freed_right_after_the_call(zoo: Zoo) -> None:
    """Their memory, and the call's own, is at once another tensor's, full of NaN."""
    vit, clip = zoo.ours("ViT-B/16"), zoo.ours("CLIP B/32")
    pixels, ids = images(8), padded(texts(clip, 8))

    def read(rows: Tensor) -> Tensor:
        assert clip._text is not None
        return clip._text.dense(rows)["text.embedding"]

    wanted = embedded(vit, pixels), read(ids)
    torch.cuda.synchronize()
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(20):
                image, row = pixels.clone(), ids.clone()
                torch.cuda._sleep(2_000_000)
                found = embedded(vit, image), read(row)
                del image, row
                junk = [torch.full_like(pixels, float("nan")) for _ in range(4)]
                junk += [torch.full((40 << 20,), float("nan"), device="cuda")]
                del junk
                for ours, right in zip(found, wanted, strict=True):
                    assert same_bits(ours, right)


def test_an_input_of_another_stream_is_safe_once_recorded(zoo: Zoo) -> None:
    """`record_stream` keeps an input's memory until the side stream has read it."""
    model, pixels = zoo.ours("ViT-B/16"), images(8)
    wanted = embedded(model, pixels)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    found = []
    for _ in range(20):
        image = pixels.clone()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(2_000_000)
            found.append(embedded(model, image))
        image.record_stream(side)
        del image
        torch.full_like(pixels, float("nan"))
    torch.cuda.synchronize()
    assert [n for n, out in enumerate(found) if not same_bits(out, wanted)] == []


def test_a_caller_may_capture_a_warm_call(zoo: Zoo) -> None:
    """In a CUDA graph of the caller's own: a replay reads what the input holds by then."""
    model, pixels, other = zoo.ours("ViT-B/16"), images(8), images(8, seed=1)
    wanted = embedded(model, pixels), embedded(model, other)
    given = pixels.clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = embedded(model, given)
    for source, right in zip((pixels, other), wanted, strict=True):
        given.copy_(source)
        graph.replay()
        assert same_bits(captured, right)
