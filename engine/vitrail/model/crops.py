"""Crops of a batch for the image tower: made on the host, or resized on the device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from vitrail.errors import OutOfMemoryError, VitrailError
from vitrail.image.geometry import Axis
from vitrail.image.preprocess import CropTask
from vitrail.image.resize import Pixels
from vitrail.model.batches import in_halves
from vitrail.runtime.footprint import BLOCK
from vitrail.runtime.runner import Runner
from vitrail_kernels.ops.resize_tables import FIELDS, ResizeTables, Size, resize_tables

ALIGNMENT = 16


class CropGroup(Protocol):
    """Crops of the same ``size`` (height, width); ``members``: their indices in the batch.

    A slice of the group is uint8 (n, height, width, channels), on the host or on the device, or
    floats (n, channels, height, width); ``itemsize``: bytes of a number. ``resize_bytes``: device
    memory that making the crops takes; ``device_bytes``: that of the crops, until the group goes.
    Both are 0 for crops that are not made on the device.
    """

    size: Size
    itemsize: int
    resize_bytes: int
    device_bytes: int

    @property
    def members(self) -> Sequence[int]: ...

    def __getitem__(self, members: slice) -> Tensor: ...


class CropBatch(NamedTuple):
    """The first ``taken`` images of a list: each has an error, or a crop in one of ``groups``."""

    taken: int
    errors: dict[int, VitrailError]
    groups: Sequence[CropGroup]


class HostCrops:
    """Crops that the host has made."""

    itemsize, resize_bytes, device_bytes = 1, 0, 0

    def __init__(self, size: Size) -> None:
        self.size, self.members, self.crops = size, list[int](), list[Pixels]()

    def __getitem__(self, members: slice) -> Tensor:
        return torch.from_numpy(np.stack(self.crops[members]))


class FloatCrops:
    """Those of the preprocessed ``pixels`` (N, channels, height, width) that are ``members``."""

    resize_bytes = device_bytes = 0

    def __init__(self, size: Size, pixels: Tensor, members: Sequence[int]) -> None:
        self.size, self.members, self._pixels = size, members, pixels
        self.itemsize = pixels.element_size()

    def __getitem__(self, members: slice) -> Tensor:
        chosen = self.members[members]
        begin, end = chosen[0], chosen[-1] + 1
        adjacent = end - begin == len(chosen)
        return self._pixels[begin:end] if adjacent else self._pixels[list(chosen)]


def host_batch(results: Sequence[Pixels | VitrailError]) -> CropBatch:
    """Group the results of `preprocess_uint8` by size."""
    errors: dict[int, VitrailError] = {}
    groups: dict[Size, HostCrops] = {}
    for member, crop in enumerate(results):
        if isinstance(crop, VitrailError):
            errors[member] = crop
        else:
            size = crop.shape[0], crop.shape[1]
            group = groups.setdefault(size, HostCrops(size))
            group.members.append(member)
            group.crops.append(crop)
    return CropBatch(len(results), errors, list(groups.values()))


def device_batch(
    tasks: Sequence[CropTask | VitrailError], runner: Runner, max_bytes: int
) -> CropBatch:
    """Group decoded images by crop size, at most ``max_bytes`` of device memory per group.

    An image that alone needs more memory gets a group of its own. If the runner's memory is
    limited, the bytes are not estimated but known.
    """
    limited = runner.budget.limit is not None
    errors: dict[int, VitrailError] = {}
    groups: dict[Size, list[list[tuple[int, CropTask]]]] = {}
    group_bytes: dict[Size, int] = {}  # bytes of the last group of each size
    for member, task in enumerate(tasks):
        if isinstance(task, VitrailError):
            errors[member] = task
            continue
        size = task.size
        needed = resize_bytes([task], type(runner)) if limited else task.device_bytes
        if size not in group_bytes or group_bytes[size] + needed > max_bytes:
            groups.setdefault(size, []).append([])
            group_bytes[size] = 0
        group_bytes[size] += needed
        groups[size][-1].append((member, task))
    crops = [DeviceCrops(group, runner) for by_size in groups.values() for group in by_size]
    return CropBatch(len(tasks), errors, crops)


class DeviceCrops:
    """Decoded images. The first slice copies all to the device of ``runner`` and resizes them."""

    itemsize = 1

    def __init__(self, members: Sequence[tuple[int, CropTask]], runner: Runner) -> None:
        self.members = [member for member, _ in members]
        self.size = members[0][1].size
        self._runner, self._pinned = runner, runner.device.type == "cuda"
        self._packed: PackedImages | None = pack([task for _, task in members], self._pinned)
        self._crops: Tensor | None = None
        self.device_bytes = len(members) * math.prod(self.size) * members[0][1].pixels.shape[2]
        self.resize_bytes = 0
        if runner.budget.limit is not None:
            self.resize_bytes = resize_bytes([task for _, task in members], type(runner))

    def __getitem__(self, members: slice) -> Tensor:
        if self._packed is not None:
            self._crops, self._packed = self._resize(self._packed), None
        assert self._crops is not None, "the images have been resized"
        return self._crops[members]

    def _resize(self, packed: PackedImages) -> Tensor:
        def resize(tasks: Sequence[CropTask]) -> Tensor:
            whole = tasks is packed.tasks
            return resized(packed if whole else pack(tasks, self._pinned), self._runner)

        crops = [result for _, result in in_halves(resize, packed.tasks)]
        return crops[0] if len(crops) == 1 else torch.cat(crops)


class PackedImages(NamedTuple):
    """Decoded images in a host ``buffer``, and after them the tables of the operator `resize`.

    ``sections``: the slices of the buffer that hold pixels, images, groups and taps.
    """

    tasks: list[CropTask]
    buffer: Tensor
    sections: list[slice]
    tables: ResizeTables


def _tables(tasks: Sequence[CropTask]) -> tuple[ResizeTables, list[int], list[int]]:
    """The tables of images, the bytes of each section of a `PackedImages`, and where it starts; the
    last start is the end."""
    task = tasks[0]
    tables = resize_tables(
        [(rows.source, columns.source) for _, rows, columns, _ in tasks],
        [(rows.full, columns.full) for _, rows, columns, _ in tasks],
        [(r.start - r.before, c.start - c.before) for _, r, c, _ in tasks],
        window=task.size,
        resample=task.resample,
        channels=task.pixels.shape[2],
    )
    sizes = [tables.pixels, *(table.nbytes for table in tables[:3])]
    starts = [0, *itertools.accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]
    return tables, sizes, starts


def resize_bytes(tasks: Sequence[CropTask], backend: type[Runner]) -> int:
    """Device bytes that `resized` takes at most: of images that are packed apart too."""
    total = temporaries = 0
    for task in tasks:
        tables, _, starts = _tables([task])
        middle, out = math.prod(tables.middle), math.prod(task.size) * task.pixels.shape[2]
        total += starts[-1] + middle + out
        temporaries = max(temporaries, backend.resize_workspace_bytes(max(middle, out)))
    return total + temporaries + 3 * BLOCK


def one_crop_bytes(size: Size, channels: int, backend: type[Runner]) -> int:
    """`resize_bytes` of an image that already has the ``size`` of its crop."""
    rows, columns = (Axis(side, side, 0, side, 0, side) for side in size)
    pixels = np.broadcast_to(np.uint8(0), (*size, channels))
    return resize_bytes([CropTask(pixels, rows, columns, 0)], backend)


def pack(tasks: Sequence[CropTask], pinned: bool) -> PackedImages:
    """Copy images of the same crop size, filter and channel count into a buffer.

    The tasks returned hold views of that buffer.
    """
    tables, sizes, starts = _tables(tasks)
    sections = [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]
    buffer = torch.empty(starts[-1], dtype=torch.uint8, device="cpu", pin_memory=pinned)
    memory, views, start = buffer.numpy(), list[CropTask](), 0
    for section, table in zip(sections[1:], tables[:3], strict=True):
        memory[section] = table.numpy().ravel().view(np.uint8)
    for task in tasks:
        view = memory[start : start + task.pixels.size].reshape(task.pixels.shape)
        view[...] = task.pixels
        views.append(task._replace(pixels=view))
        start += task.pixels.size
    return PackedImages(views, buffer, sections, tables)


def resized(packed: PackedImages, runner: Runner) -> Tensor:
    """uint8 (N, height, width, channels) on the device of ``runner``, resized by its kernels.

    Raises OutOfMemoryError if the device has too little memory.
    """
    task, device = packed.tasks[0], runner.device
    shape = len(packed.tasks), *task.size, task.pixels.shape[2]
    try:
        moved = packed.buffer.to(device, non_blocking=True)
        middle = torch.empty(packed.tables.middle, dtype=torch.uint8, device=device)
        out = torch.empty(shape, dtype=torch.uint8, device=device)
        pixels, images, groups, taps = (moved[section] for section in packed.sections)
        images, groups = images.view(torch.int64).view(-1, FIELDS), groups.view(torch.int32)
        runner.resize(out, middle, pixels, images, groups, taps.view(torch.int32))
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(f"resize on {device}: {error}") from error
    return out
