"""The host's time for a forward: `python benchmarks/host.py --device cpu` writes host.json.

ViT-B/16, pooled, fp16, uint8 224 x 224. On the CPU a stand-in takes the driver's place that does
nothing, and tensors on the CPU the device's:

* "vitrail" is `NativeRunner.run`, plan and tensors in, tensors out; "vitrail C++" its one call of
  C++, bindings included.
* "triton" is the Triton runner over the same plan up to Triton's launcher, which does nothing: no
  parameter is packed and no tensor map made. The real cost is higher.

"allocations" are counted in a C++ program (host.cpp). With ``--device cuda`` all is real, and a
sample is one call on an idle GPU, until it returns.
"""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from environment import ROOT
from harness import OURS, Case, Keep, Results, Run, measure, rotate, tolerances
from shapes import VISION
from suite import arguments, results_folder, run_suite
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver
from triton.runtime import driver as triton_driver

from vitrail.plan.plan import Plan, Step
from vitrail.plan.vision import vision_pooled
from vitrail.runtime.kernel_cache import kernel_record
from vitrail.runtime.native import DRIVER, NativeRunner, Size
from vitrail.runtime.triton import TritonRunner
from vitrail.spec import ModelSpec, VisionSpec
from vitrail.weights.layout import Weights, arena_bytes, arena_views
from vitrail_kernels import OPERATORS
from vitrail_kernels.launch import Target, launch

BATCHES = (1, 8, 64, 256)
TARGET = Target(90, 132)
CALLS, ROUNDS = 20, 100
"""Calls of a sample on the CPU, if a single call is too short for the clock; and samples."""
CPP = f"{OURS} C++"

# -- drivers that do nothing -----------------------------------------------------------------------


def standin_package() -> Any:
    """tests/standin."""
    tolerances()  # puts tests/ on the path
    return importlib.import_module("standin")


def standin() -> Any:
    """A driver stand-in of this process's own, told to do nothing."""
    driver = standin_package().own(Path(tempfile.mkdtemp()), TARGET.sms)
    driver.checks(False)
    driver.compute(False)
    return driver


class NoLauncher:
    """The end of Triton's own work."""

    def __init__(self, *_: Any) -> None: ...

    def __call__(self, *_: Any) -> None: ...


class NoDriver(GPUDriver):  # type: ignore[misc]  # triton has no types
    """A GPU for Triton, whose binder, specialization and cache look-up are the real ones."""

    launcher_cls = NoLauncher
    utils = SimpleNamespace(
        load_binary=lambda *_: (0, 0, 0, 0, 1024),
        get_device_properties=lambda _: {"max_shared_mem": 232_448},
    )

    def __init__(self) -> None:
        self.get_current_device = self.get_current_stream = lambda *_: 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", TARGET.arch, 32)

    @staticmethod
    def is_active() -> bool:
        return True

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError


class IdleTriton(TritonRunner):
    """The Triton runner on CPU tensors, as if they were a GPU's."""

    def run_step(self, step: Step, tensors: Mapping[str, Tensor], longest: int) -> None:
        scalars = step.resolve(longest)
        launch(OPERATORS[step.op].calls(TARGET, **tensors, **scalars))


class IdleNative(NativeRunner):
    """Arenas at the same place again, as from a GPU's allocator; the CPU's would ask the system."""

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if dtype != torch.uint8:
            return super()._empty(shape, dtype)
        super()._empty((256,), dtype)  # the cost of an allocation
        return _arena(shape[0])


@functools.cache
def _arena(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


# -- the timed calls -------------------------------------------------------------------------------


def weights_of(spec: ModelSpec, device: str) -> Weights:
    """Zeros, which launch the same kernels as any others."""
    arena = torch.zeros(arena_bytes(spec, torch.float16), dtype=torch.uint8, device=device)
    return Weights(arena_views(spec, torch.float16, arena), arena, None)


class Forward:
    """A plan, and both runners over it."""

    def __init__(self, spec: VisionSpec, device: str) -> None:
        self.spec, self.device = spec, torch.device(device)
        self.plan: Plan = vision_pooled(spec, uint8=True)
        self.tokens = spec.tokens_at(spec.image)
        self.kept = list[Tensor]()  # tensors whose addresses C++ has
        weights = weights_of(ModelSpec("vit", "ViTModel", vision=spec), device)
        options = weights, torch.float16, self.device
        if device == "cuda":
            self.driver = None
            self.native, self.triton = NativeRunner(*options, DRIVER), TritonRunner(*options)
        else:
            self.driver = standin()
            triton_driver.set_active(NoDriver())
            self.native = IdleNative(*options, str(self.driver.path))
            self.triton = IdleTriton(*options)

    @functools.cache  # noqa: B019  a single object a process
    def inputs(self, batch: int) -> dict[str, Tensor]:
        tokens, zeros = self.tokens, functools.partial(torch.zeros, device=self.device)
        offsets = torch.arange(
            0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=self.device
        )
        return {
            "pixels": zeros(batch, *self.spec.image, self.spec.channels, dtype=torch.uint8),
            "table": zeros(tokens, self.spec.blocks.width),
            "cu_seqlens": offsets,
            "token_rows": offsets[:-1],
        }

    def whole(self, runner: TritonRunner, batch: int) -> Run:
        """`Runner.run` on a batch."""
        sizes = dict(zip(("batch", "tokens", "longest"), self.size(batch), strict=True))
        return functools.partial(runner.run, self.plan, self.inputs(batch), **sizes)

    def size(self, batch: int) -> Size:
        return batch, batch * self.tokens, self.tokens

    def alone(self, *batches: int) -> Run:
        """`_C.Executable.run` alone, of each batch in turn, in the arena of the largest."""
        native = self.native
        for batch in batches:
            self.whole(native, batch)()  # loads the kernels of this size
        cached = native._cached_plan(self.plan, self.inputs(batches[0]))
        largest = cached.sizes[self.size(max(batches))]
        arena = native._empty(largest.arena_shape, torch.uint8)

        def run_of(batch: int) -> Run:
            size = self.size(batch)
            buffers = self.inputs(batch) | {
                buffer.name: native._empty(shape, native._dtypes[buffer.dtype])
                for buffer, shape in zip(cached.externals, cached.sizes[size].shapes, strict=True)
                if buffer.name in self.plan.outputs
            }
            self.kept += [arena, *buffers.values()]
            addresses = [buffers[buffer.name].data_ptr() for buffer in cached.externals]
            return functools.partial(
                cached.executable.run,
                size,
                largest.capacity,
                arena.data_ptr(),
                addresses,
                native._stream(),
                False,
            )

        return rotate([run_of(batch) for batch in batches])

    def case(self, batch: int) -> Case:
        variants = {
            OURS: self.whole(self.native, batch),
            CPP: self.alone(batch),
            "triton": self.whole(self.triton, batch),
        }
        self.check(variants)
        return Case(variants, lambda *_: None)

    def check(self, variants: Mapping[str, Run]) -> None:
        """Assert that Vitrail's variants launch the kernels of the Triton runner, by count."""
        if self.driver is None:
            return
        expected = sum(1 for _ in self.calls(1))
        for name in (OURS, CPP):
            self.driver.record(True)
            variants[name]()
            found = len(self.driver.launched())
            self.driver.record(False)
            self.driver.reset()
            assert found == expected, f"{name}: got {found} launches, wanted {expected}"

    def calls(self, batch: int) -> Iterator[Any]:
        lengths = [self.tokens] * batch
        pixels = self.inputs(batch)["pixels"].to("meta")
        for step, tensors, scalars in self.plan.bind(lengths, "float16", {"pixels": pixels}):
            yield from OPERATORS[step.op].calls(TARGET, **tensors, **scalars)


def sample(
    calls: int, clock: Callable[[], float], before: Callable[[], Any] | None = None
) -> Callable[[Run], float]:
    """A timer: the mean of ``calls`` calls. ``before`` runs first and is not timed."""

    def seconds(run: Run) -> float:
        run()  # the calls before have filled the caches with other data
        if before is not None:
            before()
        start = clock()
        for _ in range(calls):
            run()
        return (clock() - start) / calls

    return seconds


# -- allocations -----------------------------------------------------------------------------------

PROGRAM = Path(__file__).with_suffix(".cpp")
SOURCES = ("driver.cpp", "cubin.cpp", "plan.cpp", "executor.cpp")


def counts(forward: Forward, batches: Sequence[int] = BATCHES) -> Results:
    """The output of host.cpp: C++'s allocations and microseconds, without Python, at each batch.

    Built as setup.py builds the extension. Raises RuntimeError without a compiler, or with what a
    failed step says.
    """
    if (compiler := standin_package().compiler()) is None:
        raise RuntimeError("host.cpp: got no C++ compiler, wanted c++ or $CXX")
    native = forward.native
    cached = native._cached_plan(forward.plan, forward.inputs(batches[0]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "plan").write_bytes(cached.native.record)
        for number, (key, call) in enumerate(cached.native.calls.items()):
            record = kernel_record(key, call, TARGET.arch)
            (folder / f"kernel{number}").write_bytes(record)
        csrc, program = ROOT / "csrc", folder / "host"
        sources = [PROGRAM, *(csrc / source for source in SOURCES)]
        built = ["-std=c++17", "-O2", f"-I{csrc}", "-rdynamic", "-o", program, *sources, "-ldl"]
        sizes = [str(number) for batch in batches for number in forward.size(batch)]
        assert forward.driver is not None, "counted with the stand-in alone"
        for command in ([compiler, *built], [program, forward.driver.path, folder, *sizes]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"host.cpp: {done.stderr or done.stdout}")
    rows = [line.split() for line in done.stdout.splitlines()]
    return {
        f"batch {row[0]}": {"first": int(row[1]), "later": int(row[2]), "us": float(row[3])}
        for row in rows
    }


# -- the suite -------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write ``host.json``."""
    names = [f"batch {batch}" for batch in BATCHES]
    turns, allocations = "batches 63 and 64 in turn", "allocations"
    options = arguments(__doc__, [*names, turns, allocations], argv)
    torch.set_num_threads(1)
    forward = Forward(VISION["B/16"], options.device)
    cuda = options.device == "cuda"
    # nothing waits for a driver that does nothing: the thread's own time, whoever else runs
    timer = sample(CALLS, time.thread_time)
    if cuda:
        timer = sample(1, time.perf_counter, torch.cuda.synchronize)

    def run(name: str, keep: Keep) -> Results:
        if name == allocations:
            return counts(forward)
        if name == turns:  # both fit one arena: every call writes its sizes anew
            case = Case({CPP: forward.alone(63, 64)}, lambda *_: None)
        else:
            case = forward.case(int(name.split()[1]))
        return measure(case, timer, ROUNDS, keep=keep)

    chosen = [name for name in options.cases if not (cuda and name == allocations)]
    cases = {name: functools.partial(run, name) for name in chosen}
    path = results_folder(options.device) / "host.json"
    return run_suite(path, cases, options.device, options.resume, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
