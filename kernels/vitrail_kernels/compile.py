"""Compile kernel calls for any GPU without one, and read what the machine code does.

The same path as a launch: Triton's own binder specialises the arguments of a `Call`, which may be
meta tensors. Machine code is read with cuobjdump and nvdisasm, which triton's wheel carries.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitrail_kernels.configs import config_hash
from vitrail_kernels.launch import INTERPRETING, MISSING, Call, Target, interpreted
from vitrail_kernels.private_cache import private_cache
from vitrail_kernels.processes import in_processes
from vitrail_kernels.sass import TENSOR_CORE, opcodes
from vitrail_kernels.toolchain import compiler_names, compilers, first_fault, why_not_compiled

SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes of shared memory one block may use, by architecture (CUDA C++ guide, compute capabilities,
less the 1 KiB that CUDA keeps)."""

REGISTERS, THREADS = 65_536, {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
SHARED_TOTAL = {80: 167_936, 86: 102_400, 89: 102_400, 90: 233_472, 100: 233_472, 120: 102_400}
"""Of one multiprocessor: registers, threads, bytes of shared memory."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """Machine code of one call for one architecture.

    ``registers`` and ``stack`` bytes are a thread's, ``shared`` bytes a block's. ``instructions``:
    how often each opcode stands in the code (not how often it runs). ``ttgir``: Triton's own
    intermediate code, with the layouts it chose. ``ptx``: what ptxas was given.
    """

    name: str
    arch: int
    registers: int
    stack: int
    shared: int
    warps: int
    instructions: Counter[str]
    ttgir: str
    ptx: str
    sass: str

    @property
    def spills(self) -> int:
        """Loads and stores of a thread's local memory."""
        return self.instructions["LDL"] + self.instructions["STL"]

    @property
    def tensor_core(self) -> dict[str, int]:
        """Tensor core instructions by opcode."""
        return {name: self.instructions[name] for name in TENSOR_CORE if self.instructions[name]}

    @property
    def blocks(self) -> int:
        """Blocks that fit a multiprocessor at once."""
        threads = 32 * self.warps
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * threads)
        by_shared = SHARED_TOTAL[self.arch] // (self.shared + 1024)
        return min(by_registers, by_shared, THREADS[self.arch] // threads)


def compile_call(call: Call, arch: int) -> Compiled:
    """`compile_kernel`, and what its machine code does."""
    kernel = compile_kernel(call, arch)
    cubin = kernel.asm["cubin"]
    used = _tool("cuobjdump", "-res-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", used)
    if found is None:
        raise RuntimeError(f"cuobjdump: got {used!r}, wanted REG and STACK")
    sass = _tool("nvdisasm", "-c", cubin)
    return Compiled(
        name=call.kernel.__name__,
        arch=arch,
        registers=int(found[1]),
        stack=int(found[2]),
        shared=kernel.metadata.shared,
        warps=call.config.warps,
        instructions=Counter(opcodes(sass)),
        ttgir=kernel.asm["ttgir"],
        ptx=kernel.asm["ptx"],
        sass=sass,
    )


def compile_all(calls: Sequence[Call], arch: int) -> list[Compiled]:
    """`compile_call` for each, by a process for every core; calls alike are compiled once.

    Raises RuntimeError with what the first failing call raised.
    """
    compiled = []
    for found in compile_each(calls, arch):
        if isinstance(found, str):
            raise RuntimeError(found)
        compiled.append(found)
    return compiled


def compile_each(calls: Sequence[Call], arch: int) -> list[Compiled | str]:
    """`compile_all`, but with the error in the place of what does not compile."""
    pending = {identity(call): call for call in calls}
    compiled = in_processes(functools.partial(compile_call, arch=arch), list(pending.values()))
    found = dict(zip(pending, compiled, strict=True))
    return [found[identity(call)] for call in calls]


def identity(call: Call) -> tuple[Any, ...]:
    """Equal for calls that are one piece of machine code."""
    parts: list[Any] = [call.kernel.__name__, tuple(call.config.options().items())]
    for parameter in call.kernel.params:
        value: Any = call.arguments.get(parameter.name)
        if isinstance(value, torch.Tensor):
            parts.append((value.dtype, value.data_ptr() % 16 == 0))
        elif hasattr(value, "block_shape"):
            parts.append((value.base.dtype, tuple(value.block_shape)))
        elif parameter.is_constexpr or value is None:
            parts.append(value)
        elif isinstance(value, int) and not parameter.do_not_specialize:
            parts.append((value == 1, value % 16 == 0))
    return tuple(parts)


def compile_kernel(call: Call, arch: int) -> Any:
    """Triton's CompiledKernel of ``call`` for ``arch`` (90 for sm_90): ``asm`` and ``metadata``.

    Triton caches it by source and options. Raises RuntimeError where triton is missing or its
    interpreter is on, Triton's own errors where it does not compile.
    """
    source, target, options = source_of(call, arch)
    from triton.compiler import compile

    return compile(source, target=target, options=options)


class CompileError(RuntimeError):
    """A kernel does not compile. One line."""


def compile_privately(call: Call, arch: int) -> Any:
    """`compile_kernel`, whatever Triton's cache holds and wherever that is; leaves nothing in it.

    Raises CompileError naming the kernel, triton, ptxas and what they say.
    """
    why_not = why_not_compiled(arch)
    if why_not is not None:
        raise CompileError(f"{call.kernel.__name__}: {why_not}")
    try:
        with private_cache():
            return compile_kernel(call, arch)
    except Exception as error:  # each stage of Triton's has errors of its own
        raise CompileError(
            f"{call.kernel.__name__}: {' '.join(compiler_names(arch))} cannot compile it for "
            f"sm_{arch}: {type(error).__name__}: {first_fault(str(error))}"
        ) from error


def source_of(call: Call, arch: int) -> tuple[Any, Any, dict[str, Any]]:
    """What Triton compiles of ``call`` for ``arch``: its ASTSource, GPUTarget and options.

    The arguments are bound and specialised, no more. Raises RuntimeError where triton is missing or
    its interpreter is on.
    """
    if MISSING is not None or interpreted():
        raise RuntimeError(f"compile: needs triton's compiler, but {MISSING or INTERPRETING}")
    from triton.compiler import ASTSource

    target, backend, bind = _binder(call.kernel, arch)
    given = dict(call.config.options(), debug=False)
    bound, special, options = bind(**call.arguments, **given)
    options, signature, constants, attributes = call.kernel._pack_args(
        backend, given, bound, special, options
    )
    return ASTSource(call.kernel, signature, constants, attributes), target, dict(vars(options))


@functools.cache  # Triton writes the binder as source and evaluates it: milliseconds each time
def _binder(kernel: Any, arch: int) -> tuple[Any, Any, Any]:
    """GPUTarget, backend, and the function that specialises the arguments of ``kernel``."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    return target, backend, create_function_from_signature(kernel.signature, kernel.params, backend)


WITHOUT_TMA = ", without TMA"


def provenance(target: Target) -> str:
    """What the machine code for ``target`` follows from besides these sources: part of a model's
    fingerprint. Raises ValueError for a tuned table that cannot be read."""
    arch, (triton, ptxas) = target.arch, compilers(target.arch)
    switched = WITHOUT_TMA if target.without_tma else ""
    return f"triton {triton} ptxas {ptxas} sm_{arch} {config_hash(arch)}{switched}"


_LAYOUT = re.compile(r"^(#\w+) = #ttg\.(\w+)<\{(.*)\}>$", re.M)
_REDUCED = re.compile(
    r'"tt\.reduce"\([^)]*\) <\{axis = (\d+).*?\}\) : \(tensor<([\dx]+)x\w+, (#\w+)>\)', re.S
)
_PRODUCT = re.compile(r"versionMajor = (\d+).*instrShape = \[(?:\d+, )*(\d+)\]")


def order_of_sums(code: Compiled) -> frozenset[tuple[str, ...]]:
    """What the bits of sums follow from, in Triton's own code: equal for configurations that add
    in one order.

    The version and last side of the products' instructions, and for every axis that is reduced its
    length, and how it is shared out to the registers, threads and warps.
    """
    layouts = {name: (kind, text) for name, kind, text in _LAYOUT.findall(code.ttgir)}
    found = {("product", *m) for _, text in layouts.values() for m in _PRODUCT.findall(text)}
    for axis, sides, name in _REDUCED.findall(code.ttgir):
        kind, text = layouts.get(name, ("", name))
        lists = re.findall(r"= \[([\d, ]+)\]", text)
        if kind == "blocked":
            shared = [values.split(", ")[int(axis)] for values in lists[:3]]
        elif kind == "nvidia_mma":
            shared = [lists[0].split(", ")[int(axis)]]
        elif kind == "linear":  # of each kind of bit those that move along the axis
            bits = [re.findall(r"\[([\d, ]+)\]", part) for part in text.split("=")[1:]]
            along = [[bit.split(", ")[int(axis)] for bit in part] for part in bits]
            shared = [" ".join(step for step in part if step != "0") for part in along]
        else:
            shared = [text]
        found.add(("reduction", sides.split("x")[int(axis)], kind, *shared))
    return frozenset(found)


def _tool(name: str, option: str, cubin: bytes) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [program, option, file.name], capture_output=True, text=True, check=True
        )
    return done.stdout
