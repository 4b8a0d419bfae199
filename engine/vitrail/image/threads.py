"""Work on many images by threads. An image that fails gives its error and harms no neighbor."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TypeVar

from vitrail.errors import VitrailError
from vitrail.image.sources import PixelInput

Result = TypeVar("Result")


def core_count() -> int:
    """The CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _threads(images: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(images, core_count()), "vitrail-images")


def _attempt(work: Callable[[PixelInput], Result], image: PixelInput) -> Result | VitrailError:
    try:
        return work(image)
    except VitrailError as error:
        # a kept traceback would keep the pixels of the failed image alive
        return error.with_traceback(None)


def map_images(
    work: Callable[[PixelInput], Result], images: Sequence[PixelInput]
) -> list[Result | VitrailError]:
    """``work`` of each image, in order, on a thread for every core.

    A single image is done in the calling thread.
    """
    if len(images) < 2:
        return [_attempt(work, image) for image in images]
    with _threads(len(images)) as threads:
        return list(threads.map(partial(_attempt, work), images))


def map_first_images(
    work: Callable[[PixelInput], Result],
    images: Sequence[PixelInput],
    stop_bytes: int,
    size_of: Callable[[Result], int],
) -> list[Result | VitrailError]:
    """`map_images` for the first images only, at least one of them.

    No image is begun once the results hold ``stop_bytes`` by ``size_of``; images under way are
    finished.
    """
    if len(images) < 2:
        return map_images(work, images)
    results: dict[int, Result | VitrailError] = {}
    running: dict[Future[Result | VitrailError], int] = {}
    begun = total = 0
    with _threads(len(images)) as threads:
        while True:
            while len(running) < core_count() and begun < len(images) and total < stop_bytes:
                running[threads.submit(_attempt, work, images[begun])] = begun
                begun += 1
            if not running:
                return [results[number] for number in range(begun)]
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                result = results[running.pop(future)] = future.result()
                total += 0 if isinstance(result, VitrailError) else size_of(result)
