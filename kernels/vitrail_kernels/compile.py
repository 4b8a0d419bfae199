"""Compile kernel calls for any GPU, even for a GPU that is not here, and read the machine code.

Compiling takes the same path as a launch: Triton's binder specializes the arguments of a `Call`,
which may be meta tensors. cuobjdump and nvdisasm, which are part of triton's wheel, print the
machine code.
"""

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
from vitrail_kernels.toolchain import compiler_names, compilers, first_fault, why_not_compiled

SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes of shared memory that a block may use, by architecture: the limit of the CUDA C++ guide
("compute capabilities") less the 1 KiB that CUDA keeps."""

REGISTERS, THREADS = 65_536, {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
SHARED_TOTAL = {80: 167_936, 86: 102_400, 89: 102_400, 90: 233_472, 100: 233_472, 120: 102_400}
"""A multiprocessor's registers, threads and bytes of shared memory."""

TENSOR_CORE = ("HGMMA", "IGMMA", "HMMA", "IMMA", "UTCHMMA", "UTCIMMA")
"""The opcodes of matrix products on tensor cores."""

SASS_LINE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9]*[\w.]*)\s*([^;]*)")
"""A line of nvdisasm's output that holds an instruction: its predicate, opcode and operands."""


@dataclass(frozen=True, slots=True)
class KernelCode:
    """The machine code of a call for one architecture.

    ``registers`` and ``stack`` (bytes) are per thread, ``shared`` (bytes) per block.
    ``instructions`` counts each opcode in the code, not how often it runs. ``ttgir`` is Triton's
    intermediate code with the layouts that it chose, and ``ptx`` the input of ptxas.
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
        """The number of loads and stores of local memory."""
        return self.instructions["LDL"] + self.instructions["STL"]

    @property
    def tensor_core(self) -> dict[str, int]:
        """The number of tensor core instructions by opcode."""
        return {name: self.instructions[name] for name in TENSOR_CORE if self.instructions[name]}

    @property
    def blocks(self) -> int:
        """How many blocks fit on a multiprocessor at once."""
        threads = 32 * self.warps
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * threads)
        by_shared = SHARED_TOTAL[self.arch] // (self.shared + 1024)
        return min(by_registers, by_shared, THREADS[self.arch] // threads)


def compile_call(call: Call, arch: int) -> KernelCode:
    """Compile ``call`` for ``arch`` (90 for sm_90) and read its machine code."""
    kernel = compile_kernel(call, arch)
    cubin = kernel.asm["cubin"]
    usage = _tool("cuobjdump", "-res-usage", cubin)
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"cuobjdump: got {usage!r}, wanted REG and STACK")
    sass = _tool("nvdisasm", "-c", cubin)
    return KernelCode(
        name=call.kernel.__name__,
        arch=arch,
        registers=int(match[1]),
        stack=int(match[2]),
        shared=kernel.metadata.shared,
        warps=call.config.warps,
        instructions=Counter(opcodes(sass)),
        ttgir=kernel.asm["ttgir"],
        ptx=kernel.asm["ptx"],
        sass=sass,
    )


def opcodes(sass: str) -> list[str]:
    """The opcodes of nvdisasm's output in the order of the code, without their suffixes."""
    lines = filter(None, map(SASS_LINE.match, sass.splitlines()))
    return [line[2].partition(".")[0] for line in lines]


def compile_all(calls: Sequence[Call], arch: int) -> list[KernelCode]:
    """`compile_call` of each call, with one process per core. Equal calls are compiled once.

    Raises RuntimeError with the message of the first call that does not compile.
    """
    codes = []
    for code in compile_each(calls, arch):
        if isinstance(code, str):
            raise RuntimeError(code)
        codes.append(code)
    return codes


def compile_each(calls: Sequence[Call], arch: int) -> list[KernelCode | str]:
    """As `compile_all`, but the result of a call that does not compile is its error message."""
    pending = {identity(call): call for call in calls}
    results = in_processes(functools.partial(compile_call, arch=arch), list(pending.values()))
    codes = dict(zip(pending, results, strict=True))
    return [codes[identity(call)] for call in calls]


def identity(call: Call) -> tuple[Any, ...]:
    """A value that is equal for two calls exactly if they have the same machine code."""
    facts: list[Any] = [call.kernel.__name__, tuple(call.config.options().items())]
    for parameter in call.kernel.params:
        value: Any = call.arguments.get(parameter.name)
        if isinstance(value, torch.Tensor):
            facts.append((value.dtype, value.data_ptr() % 16 == 0))
        elif hasattr(value, "block_shape"):
            facts.append((value.base.dtype, tuple(value.block_shape)))
        elif parameter.is_constexpr or value is None:
            facts.append(value)
        elif isinstance(value, int) and not parameter.do_not_specialize:
            facts.append((value == 1, value % 16 == 0))
    return tuple(facts)


def compile_kernel(call: Call, arch: int) -> Any:
    """Triton's CompiledKernel of ``call`` for ``arch``: ``asm`` and ``metadata``.

    Triton caches it by source and options. Raises RuntimeError if triton is missing or its
    interpreter is on, and Triton's own errors if the kernel does not compile.
    """
    source, target, options = source_of(call, arch)
    from triton.compiler import compile

    return compile(source, target=target, options=options)


class CompileError(RuntimeError):
    """A kernel does not compile. The message is one line."""


def compile_privately(call: Call, arch: int) -> Any:
    """`compile_kernel` without reading or writing Triton's cache on disk.

    Raises CompileError with the kernel, the versions of triton and ptxas, and their message.
    """
    why_not = why_not_compiled(arch)
    if why_not is not None:
        raise CompileError(f"{call.kernel.__name__}: {why_not}")
    try:
        with private_cache():
            return compile_kernel(call, arch)
    except Exception as error:  # each stage of Triton's compiler has its own errors
        raise CompileError(
            f"{call.kernel.__name__}: {' '.join(compiler_names(arch))} cannot compile it for "
            f"sm_{arch}: {type(error).__name__}: {first_fault(str(error))}"
        ) from error


def source_of(call: Call, arch: int) -> tuple[Any, Any, dict[str, Any]]:
    """The inputs of Triton's compiler for ``call``: its ASTSource, GPUTarget and options.

    The arguments are bound and specialized; nothing is compiled. Raises RuntimeError if triton is
    missing or its interpreter is on.
    """
    if MISSING is not None or interpreted():
        raise RuntimeError(f"compile: needs triton's compiler, but {MISSING or INTERPRETING}")
    from triton.compiler import ASTSource

    target, backend, bind = _binder(call.kernel, arch)
    settings = dict(call.config.options(), debug=False)
    bound, special, options = bind(**call.arguments, **settings)
    options, signature, constants, attributes = call.kernel._pack_args(
        backend, settings, bound, special, options
    )
    return ASTSource(call.kernel, signature, constants, attributes), target, dict(vars(options))


@functools.cache  # Triton writes the binder as source and evaluates it: milliseconds each time
def _binder(kernel: Any, arch: int) -> tuple[Any, Any, Any]:
    """GPUTarget, backend, and the function that specializes the arguments of ``kernel``."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    return target, backend, create_function_from_signature(kernel.signature, kernel.params, backend)


WITHOUT_TMA = ", without TMA"


def provenance(target: Target) -> str:
    """A string of compiler versions, architecture and tuned table, for a model's fingerprint.

    Together with the sources these decide the machine code.

    Raises ValueError if the tuned table cannot be read.
    """
    arch, (triton, ptxas) = target.arch, compilers(target.arch)
    suffix = WITHOUT_TMA if target.without_tma else ""
    return f"triton {triton} ptxas {ptxas} sm_{arch} {config_hash(arch)}{suffix}"


_LAYOUT = re.compile(r"^(#\w+) = #ttg\.(\w+)<\{(.*)\}>$", re.M)
_REDUCED = re.compile(
    r'"tt\.reduce"\([^)]*\) <\{axis = (\d+).*?\}\) : \(tensor<([\dx]+)x\w+, (#\w+)>\)', re.S
)
_PRODUCT = re.compile(r"versionMajor = (\d+).*instrShape = \[(?:\d+, )*(\d+)\]")


def order_of_sums(code: KernelCode) -> frozenset[tuple[str, ...]]:
    """The facts in Triton's code that fix the order of every sum, and with it the sum's bits.

    Configurations with equal facts add in the same order. The facts are the version and K of the
    product instructions, and for every reduced axis its length and how its elements are spread
    over registers, threads and warps.
    """
    layouts = {name: (layout, text) for name, layout, text in _LAYOUT.findall(code.ttgir)}
    facts = {("product", *m) for _, text in layouts.values() for m in _PRODUCT.findall(text)}
    for axis, sides, name in _REDUCED.findall(code.ttgir):
        layout, text = layouts.get(name, ("", name))
        lists = re.findall(r"= \[([\d, ]+)\]", text)
        if layout == "blocked":
            spread = [values.split(", ")[int(axis)] for values in lists[:3]]
        elif layout == "nvidia_mma":
            spread = [lists[0].split(", ")[int(axis)]]
        elif layout == "linear":  # the bits of registers, lanes and warps along the axis
            bases = [re.findall(r"\[([\d, ]+)\]", basis) for basis in text.split("=")[1:]]
            steps = [[vector.split(", ")[int(axis)] for vector in basis] for basis in bases]
            spread = [" ".join(step for step in basis if step != "0") for basis in steps]
        else:
            spread = [text]
        facts.add(("reduction", sides.split("x")[int(axis)], layout, *spread))
    return frozenset(facts)


def _tool(name: str, option: str, cubin: bytes) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), option, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout
