"""The native part of Vitrail: bytes, integers and the GPU driver, without PyTorch.

Optional: an installation without a C++ compiler does not have it (ImportError).
"""

class Device:
    @property
    def name(self) -> str: ...
    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability, (major, minor)."""

class Driver:
    """The NVIDIA driver, as far as it could be asked."""

    @property
    def available(self) -> bool:
        """Whether there is a driver with at least one device."""
    @property
    def reason(self) -> str:
        """Why ``available`` is False; else empty."""
    @property
    def version(self) -> int:
        """Highest CUDA version the driver supports, 1000 * major + 10 * minor; 0 if unknown."""
    @property
    def devices(self) -> list[Device]: ...

class DriverError(RuntimeError):
    """A call of the driver failed. The message names its purpose, the call and the reason."""

    code: int
    """CUresult (cuda.h); 2 is out of memory."""

class Gpu:
    """A device and its primary context, which PyTorch uses too.

    ``library``: name or path of the driver's library, for the system's loader. Raises RuntimeError
    if it cannot be opened, DriverError if the driver refuses.
    """

    def __init__(self, library: str, ordinal: int) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability, (major, minor)."""
    @property
    def multiprocessors(self) -> int: ...

class CudaBinary:
    """A fatbin or a cubin of CUDA C++ kernels, loaded into a GPU's context.

    Any number of threads may use it at once. Raises ValueError if ``code`` is neither or is
    truncated, DriverError if the driver refuses it.
    """

    def __init__(self, gpu: Gpu, code: bytes) -> None: ...
    def launch(
        self,
        function: str,
        blocks: int,
        threads: tuple[int, int],
        arguments: list[tuple[int, int]],
        stream: int,
        overlap: bool,
        shared: int = 0,
    ) -> None:
        """Launch ``blocks`` blocks of ``threads`` (x, y) on ``stream``, without waiting.

        ``arguments``: value (an integer or an address) and size in bytes of each parameter. With 0
        blocks, only checks the arguments. ``overlap``: the kernel may start before the previous one
        has ended. ``shared``: bytes of dynamic shared memory, at most 48 KiB. Raises ValueError for
        arguments that the kernel does not take, DriverError naming the kernel if the driver fails.
        """

class Kernels:
    """The loaded kernels of a GPU, by key."""

    def __init__(self, gpu: Gpu) -> None: ...
    def load(self, record: bytes) -> None:
        """Load a kernel binary (`vitrail.plan.kernel_binary`) unless its key is loaded already.

        Raises ValueError for a damaged record, DriverError if the driver refuses the code.
        """

class Executable:
    """A native plan (`vitrail.plan.lowering`) with the address of its weights.

    Any number of threads may use it at once. A ``size`` is (sequences, tokens of all sequences,
    tokens of the longest sequence). Raises ValueError for a damaged plan.
    """

    def __init__(self, kernels: Kernels, plan: bytes, weights: int) -> None: ...
    def missing(self, size: tuple[int, int, int]) -> list[str]:
        """Keys of the kernels that a call of this size needs and that are not loaded."""
    @staticmethod
    def capacity(size: tuple[int, int, int]) -> tuple[int, int, int]:
        """``size`` rounded up, so that calls of similar sizes can share an arena."""
    def arena_bytes(self, capacity: tuple[int, int, int]) -> int: ...
    def run(
        self,
        size: tuple[int, int, int],
        capacity: tuple[int, int, int],
        arena: int,
        buffers: list[int],
        stream: int,
        overlap: bool,
    ) -> None:
        """Put all launches on ``stream``, without waiting.

        ``arena``: address of ``arena_bytes(capacity)`` bytes. ``buffers``: addresses of the buffers
        that the caller brings, in the plan's order. Addresses are multiples of 16. ``overlap``: a
        kernel may start before the previous one has ended. Raises DriverError naming the launch,
        ValueError for sizes or addresses that the plan cannot take, RuntimeError if a kernel is not
        loaded.
        """

def version() -> str:
    """The version that this module was built for."""

def driver() -> Driver:
    """The NVIDIA driver and its devices. Never raises, even without a driver.

    Starts the driver (``cuInit``): a process that is forked afterwards cannot use CUDA.
    """

def driver_lost() -> bool:
    """Whether this process was forked from one in which `Gpu` or `driver` had started the driver.

    `Gpu` raises DriverError in such a process, and `driver` gives the reason.
    """

def int8_instructions() -> str:
    """The processor's instructions that the int8 operators use; empty if there are none."""

def use_int8_instructions(name: str) -> bool:
    """Use these instructions from now on, in the whole process: for tests. False if the processor
    does not have them."""

def norm_quant(
    out: int,
    out_scale: int,
    x: int,
    smooth: int,
    picks: int,
    rows: int,
    width: int,
    eps: float,
    threads: int,
) -> None:
    """`vitrail_kernels.ops.norm_quant` of contiguous tensors, which are addresses; 0 is None.

    These three functions check nothing. They run on at most ``threads`` threads of PyTorch's
    OpenMP. They raise RuntimeError if there are no instructions for them.
    """

def linear_int8(
    out: int,
    codes: int,
    code_scale: int,
    x: int,
    x_scale: int,
    weight: int,
    weight_scale: int,
    bias: int,
    rows: int,
    columns: int,
    depth: int,
    activation: int,
    gated: bool,
    is_unsigned: bool,
    threads: int,
) -> None:
    """`vitrail_kernels.ops.linear_int8`: writes fp32 ``out``, or ``codes`` and ``code_scale``.

    ``activation``: its number in csrc/int8_cpu.hpp.
    """

def linear_int8_grouped(
    out: int,
    x: int,
    x_scale: int,
    weight: int,
    weight_scale: int,
    shift: int,
    bias: int,
    scale: int,
    residual: int,
    residual_rows: int,
    rows: int,
    columns: int,
    depth: int,
    group: int,
    threads: int,
) -> None:
    """`vitrail_kernels.ops.linear_int8_grouped`, without the statistics."""
