"""Runs a `vitrail_kernels` Call in the emulator, compiled for a GPU, on CPU tensors."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import emulator
from emulator import Launch, Module, Range, Report
from vitrail_kernels.compile import compile_kernel, source_of
from vitrail_kernels.launch import Call

MAP_TYPES = {torch.uint8: 0, torch.int8: 0, torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
"""CUtensorMapDataType of a dtype."""

_FORMATS = {
    "fp32": "<f",
    "i1": "<b",
    "i8": "<b",
    "i32": "<i",
    "u32": "<I",
    "i64": "<q",
    "u64": "<Q",
}

Edit = Callable[[str], str]


@functools.lru_cache(maxsize=256)
def module_of(ptx: str) -> Module:
    """The parsed module, kept."""
    return Module(ptx)


@dataclass(frozen=True, slots=True)
class Compiled:
    """A Call for one architecture: its module, and the bytes of each parameter in order.

    ``tensors``: by parameter name, the tensors of pointers and tensor maps. ``shared`` in bytes.
    """

    module: Module
    values: tuple[bytes, ...]
    tensors: dict[str, Tensor]
    grid: tuple[int]
    block: tuple[int]
    shared: int

    def launch(self, *, pdl: bool = False, **changes: Any) -> Launch:
        """The launch; ``changes`` replace fields of it."""
        fields = {
            "module": self.module,
            "grid": self.grid,
            "block": self.block,
            "parameters": self.module.pack(self.values),
            "shared": self.shared,
            "pdl": pdl,
        }
        return Launch(**(fields | changes))


def compiled(
    call: Call,
    arch: int,
    *,
    edit: Edit | None = None,
    map_edit: Callable[[str, dict[str, Any]], dict[str, Any]] | None = None,
) -> Compiled:
    """Compiles ``call`` for ``arch`` and encodes its arguments.

    ``edit`` changes the PTX, ``map_edit(name, fields)`` the arguments of
    `emulator.tensor_map`: both plant faults. Raises ValueError if ``edit`` changes nothing.
    """
    kernel = compile_kernel(call, arch)
    ptx = kernel.asm["ptx"]
    if edit is not None:
        ptx = edit(original := ptx)
        if ptx == original:
            raise ValueError("the edit changed nothing")
    module = module_of(ptx)
    source, _, _ = source_of(call, arch)
    boxes = list(kernel.metadata.tensordesc_meta or ())
    values: list[bytes] = []
    tensors: dict[str, Tensor] = {}
    for name, type_name in source.signature.items():
        if type_name == "constexpr":
            continue
        argument = call.arguments[name]
        if type_name.startswith("tensordesc"):
            tensors[name] = argument.base
            fields = _map_fields(argument.base, boxes.pop(0))
            if map_edit is not None:
                fields = map_edit(name, fields)
            values.append(emulator.tensor_map(**fields))
            values += [struct.pack("<i", size) for size in argument.shape]
            values += [struct.pack("<q", stride) for stride in argument.strides]
        elif type_name.startswith("*"):
            tensors[name] = argument
            values.append(struct.pack("<Q", argument.data_ptr()))
        elif type_name in _FORMATS:
            values.append(struct.pack(_FORMATS[type_name], argument))
        else:
            raise NotImplementedError(f"parameter {name}: got the type {type_name}")
    for _, size in module.parameters()[len(values) :]:  # Triton's own scratch pointers
        values.append(bytes(size))
    block = (32 * kernel.metadata.num_warps,)
    grid = (call.grid.blocks,)
    return Compiled(module, tuple(values), tensors, grid, block, kernel.metadata.shared)


def _map_fields(base: Tensor, box: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "base": base.data_ptr(),
        "element_type": MAP_TYPES[base.dtype],
        "dims": list(reversed(base.shape)),
        "strides": [base.stride(0) * base.element_size()],
        "box": list(reversed(box["block_size"])),
        "swizzle": box["swizzle"],
    }


def ranges_of(
    tensors: Mapping[str, Tensor], outputs: Sequence[Tensor] = (), *, track: bool = True
) -> list[Range]:
    """A range for each storage, named by its tensors.

    ``outputs`` hold nothing yet: they are filled with NaN's bits, and reads of them are faults
    until they are written. Without ``track`` all bytes count as written.
    """
    storages: dict[int, tuple[int, list[str]]] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if storage.nbytes():
            names = storages.setdefault(storage.data_ptr(), (storage.nbytes(), []))[1]
            names.append(f"{name} {tuple(tensor.shape)} {str(tensor.dtype)[6:]}")
    empty = {tensor.untyped_storage().data_ptr() for tensor in outputs}
    ranges = []
    for start, (size, names) in storages.items():
        written = None
        if track:
            written = np.full(size, 0 if start in empty else 1, np.uint8)
        ranges.append(Range(start, size, " = ".join(names), written))
    for tensor in outputs:
        tensor.untyped_storage().fill_(0xFF)
    return ranges


def run_call(
    call: Call,
    arch: int,
    outputs: Sequence[Tensor] = (),
    *,
    edit: Edit | None = None,
    map_edit: Callable[[str, dict[str, Any]], dict[str, Any]] | None = None,
    changes: Mapping[str, Any] | None = None,
    track: bool = True,
    **options: Any,
) -> Report:
    """Runs ``call`` on its own tensors as compiled for ``arch``, and reports.

    ``outputs``: tensors that hold nothing before. Raises `Fault`, for outputs of which bytes stay
    unwritten too. ``changes`` replace fields of the `Launch`; ``options`` are those of
    `emulator.run`.
    """
    program = compiled(call, arch, edit=edit, map_edit=map_edit)
    tensors = program.tensors | {f"output {i}": tensor for i, tensor in enumerate(outputs)}
    ranges = ranges_of(tensors, outputs, track=track)
    (report,) = emulator.run(program.launch(**(changes or {})), ranges, **options)
    for item in ranges:
        if count := item.unwritten():
            name = call.kernel.__name__
            raise emulator.Fault(f"{name}: {count} bytes of {item.name} stay unwritten")
    return report
