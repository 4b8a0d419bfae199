"""The crops of a batch as the model takes them: resized on the host, or decoded there and resized
on the device by its runner."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from vitrail.errors import OutOfMemoryError, VitrailError
from vitrail.image.preprocess import Framed, held_bytes
from vitrail.image.resize import Pixels
from vitrail.runtime.runner import Runner
from vitrail_kernels.ops.resize import FIELDS, Size, Tables, resize_tables

ALIGNMENT = 16


class Crops(Protocol):
    """Crops of one ``size`` (height, width). ``members``: which of the batch they are; a slice of
    them is uint8 (n, height, width, channels), on the host or the device."""

    size: Size
    members: list[int]

    def __getitem__(self, part: slice) -> Tensor: ...


class Batch(NamedTuple):
    """What became of the first ``taken`` of some images: why there is no crop, or where it is."""

    taken: int
    errors: dict[int, VitrailError]
    crops: Sequence[Crops]


class HostCrops:
    """Crops that are made."""

    def __init__(self, size: Size) -> None:
        self.size, self.members, self._made = size, list[int](), list[Pixels]()

    def add(self, member: int, crop: Pixels) -> None:
        self.members.append(member)
        self._made.append(crop)

    def __getitem__(self, part: slice) -> Tensor:
        return torch.from_numpy(np.stack(self._made[part]))


def host_batch(found: Sequence[Pixels | VitrailError]) -> Batch:
    """Of `preprocess_uint8`."""
    errors: dict[int, VitrailError] = {}
    groups: dict[Size, HostCrops] = {}
    for member, crop in enumerate(found):
        if isinstance(crop, VitrailError):
            errors[member] = crop
        else:
            size = crop.shape[0], crop.shape[1]
            groups.setdefault(size, HostCrops(size)).add(member, crop)
    return Batch(len(found), errors, list(groups.values()))


def device_batch(
    found: Sequence[Framed[Pixels] | VitrailError], runner: Runner, most: int
) -> Batch:
    """Of `preprocess_framed`. Crops that the device resizes at once hold ``most`` bytes there, or
    are a single one's."""
    errors: dict[int, VitrailError] = {}
    groups: dict[Size, list[list[tuple[int, Framed[Pixels]]]]] = {}
    held: dict[Size, int] = {}  # by the last of a size's groups
    for member, framed in enumerate(found):
        if isinstance(framed, VitrailError):
            errors[member] = framed
            continue
        size, needed = (framed.rows.out, framed.columns.out), held_bytes(framed)
        if size not in held or held[size] + needed > most:
            groups.setdefault(size, []).append([])
            held[size] = 0
        held[size] += needed
        groups[size][-1].append((member, framed))
    crops = [DeviceCrops(group, runner) for of_size in groups.values() for group in of_size]
    return Batch(len(found), errors, crops)


class DeviceCrops:
    """Images that wait to be copied to the device of ``runner`` and resized there, all at once."""

    def __init__(self, images: Sequence[tuple[int, Framed[Pixels]]], runner: Runner) -> None:
        self.members = [member for member, _ in images]
        first = images[0][1]
        self.size = first.rows.out, first.columns.out
        self._runner = runner
        self._packed: Packed | None = pack([framed for _, framed in images], self._pinned)
        self._made: Tensor | None = None

    @property
    def _pinned(self) -> bool:
        return self._runner.device.type == "cuda"

    def __getitem__(self, part: slice) -> Tensor:
        if self._packed is not None:
            self._made, self._packed = self._resized(self._packed), None
        assert self._made is not None, "it was packed, and is resized"
        return self._made[part]

    def _resized(self, packed: Packed) -> Tensor:
        """In halves where the device has no memory for all, to the same bits."""
        try:
            return resized(packed, self._runner)
        except OutOfMemoryError:
            half = len(packed.images) // 2
            if half == 0:
                raise
        parts = packed.images[:half], packed.images[half:]
        return torch.cat([self._resized(pack(part, self._pinned)) for part in parts])


class Packed(NamedTuple):
    """Images one after the other in one ``buffer`` on the host, and behind them the tables of the
    operator: ``places`` says where pixels, images, groups and taps stand."""

    images: list[Framed[Pixels]]
    buffer: Tensor
    places: list[slice]
    tables: Tables


def pack(images: Sequence[Framed[Pixels]], pinned: bool) -> Packed:
    """``images`` of one window, filter and number of channels in a buffer, which they become views
    of."""
    first = images[0]
    tables = resize_tables(
        [(rows.source, columns.source) for _, rows, columns, _ in images],
        [(rows.full, columns.full) for _, rows, columns, _ in images],
        [(r.start - r.before, c.start - c.before) for _, r, c, _ in images],
        window=(first.rows.out, first.columns.out),
        resample=first.resample,
        channels=first.opened.shape[2],
    )
    sizes = [tables.pixels, *(table.numel() * table.itemsize for table in tables[:3])]
    starts = [0, *itertools.accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]
    places = [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]
    buffer = torch.empty(starts[-1], dtype=torch.uint8, device="cpu", pin_memory=pinned)
    room, views, at = buffer.numpy(), list[Framed[Pixels]](), 0
    for place, table in zip(places[1:], tables[:3], strict=True):
        room[place] = table.numpy().ravel().view(np.uint8)
    for framed in images:
        pixels = framed.opened
        view = room[at : at + pixels.size].reshape(pixels.shape)
        view[...] = pixels
        views.append(framed._replace(opened=view))
        at += pixels.size
    return Packed(views, buffer, places, tables)


def resized(packed: Packed, runner: Runner) -> Tensor:
    """uint8 (N, height, width, channels) on the device of ``runner``, by its kernels.

    Raises OutOfMemoryError where the device has too little memory.
    """
    first, device, count = packed.images[0], runner.device, len(packed.images)
    shape = count, first.rows.out, first.columns.out, first.opened.shape[2]
    try:
        moved = packed.buffer.to(device, non_blocking=True)
        middle = torch.empty(packed.tables.middle, dtype=torch.uint8, device=device)
        out = torch.empty(shape, dtype=torch.uint8, device=device)
        pixels, images, groups, taps = (moved[place] for place in packed.places)
        images, groups = images.view(torch.int64).view(-1, FIELDS), groups.view(torch.int32)
        runner.resize(out, middle, pixels, images, groups, taps.view(torch.int32))
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(f"resize on {device}: {error}") from error
    return out
