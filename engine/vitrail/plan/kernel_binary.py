"""Kernel binaries: a compiled kernel with its launch parameters, as csrc/plan.hpp reads it."""

import hashlib
import re
import struct
from typing import Any, NamedTuple

import torch

from vitrail._version import __version__
from vitrail.errors import VitrailError
from vitrail.plan.record import RecordReader, items, magic, string
from vitrail_kernels import Call
from vitrail_kernels.compile import CompileError, compile_privately, identity
from vitrail_kernels.toolchain import compilers

KERNEL_MAGIC = magic("kernel")
TENSOR_MAP_TYPES = {
    torch.uint8: 0,
    torch.int8: 0,  # copied as bytes
    torch.float16: 6,
    torch.float32: 7,
    torch.bfloat16: 9,
}
"""CUtensorMapDataType (cuda.h)."""

_PARAMETER = re.compile(r"\.param (?:\.align \d+ )?\.([bfsu])(\d+) [^\[\],()]*(?:\[(\d+)\])?[,\n)]")


class KernelBinary(NamedTuple):
    """``threads`` per block, ``shared`` bytes of dynamic shared memory."""

    function: str
    threads: int
    shared: int
    cubin: bytes


def kernel_key(call: Call, arch: int) -> str:
    """SHA-256 of everything that determines a kernel's machine code.

    That is the kernel's source with all functions it calls, Triton and ptxas, the architecture, and
    the types and configuration of the call.
    """
    parts = (call.kernel.cache_key, compilers(arch), arch, identity(call))
    return hashlib.sha256(repr((__version__, *parts)).encode()).hexdigest()


def compile_binary(key: str, call: Call, arch: int) -> bytes:
    """Compile a kernel without Triton's cache. Raises VitrailError if it does not compile."""
    try:
        return encode_binary(key, call, arch, compile_privately(call, arch))
    except CompileError as error:
        raise VitrailError(str(error)) from error


def encode_binary(key: str, call: Call, arch: int, kernel: Any) -> bytes:
    """The binary of a ``kernel`` that Triton has compiled.

    Raises VitrailError if the kernel takes other parameters than plans pass.
    """
    meta = kernel.metadata
    scratch = meta.global_scratch_size, meta.profile_scratch_size, meta.num_ctas
    assert scratch == (0, 0, 1), f"{meta.name}: got scratch memory or clusters {scratch}"
    _check_parameters(call, arch, kernel)
    bases = [value.base for value in call.arguments.values() if hasattr(value, "block_shape")]
    boxes = [
        struct.pack(
            "<5I",
            TENSOR_MAP_TYPES[base.dtype],
            box["swizzle"],
            base.element_size(),
            *box["block_size"],
        )
        for base, box in zip(bases, meta.tensordesc_meta or (), strict=True)
    ]
    overlaps = bool(call.arguments.get("PDL"))
    return (
        KERNEL_MAGIC
        + string(key)
        + string(meta.name)
        + struct.pack("<IIIB", arch, 32 * meta.num_warps, meta.shared, overlaps)
        + items(boxes)
        + string(kernel.asm["cubin"])
    )


def decode_binary(record: bytes) -> KernelBinary:
    """The parts of a binary that `encode_binary` returned."""
    reader = RecordReader(record, KERNEL_MAGIC)
    reader.string()  # the key
    function = reader.string().decode()
    _, threads, shared, _ = reader.numbers("IIIB")
    reader.items(lambda: reader.numbers("5I"))  # the boxes
    return KernelBinary(function, threads, shared, reader.string())


def _check_parameters(call: Call, arch: int, kernel: Any) -> None:
    """Raises VitrailError unless the machine code takes its parameters as plans pack them.

    Another triton may pass parameters differently, and a driver before CUDA 12.4 cannot tell.
    """
    sizes = {"i32": [4], "fp32": [4], "tensordesc": [128, 4, 4, 8, 8]}
    types = [t.partition("<")[0] for t in kernel.src.signature.values() if t != "constexpr"]
    packed = [size for name in types for size in sizes.get(name, [8])] + [8, 8]
    entry = kernel.asm["ptx"].partition(".visible .entry")[2].partition("{")[0]
    compiled = [int(bits) // 8 * int(n or 1) for _, bits, n in _PARAMETER.findall(entry)]
    if compiled != packed:
        raise VitrailError(
            f"{call.kernel.__name__}: got parameters of {compiled} bytes from triton "
            f"{compilers(arch)[0]}, wanted {packed}; load with backend='triton'"
        )
