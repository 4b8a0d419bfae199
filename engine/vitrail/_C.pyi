"""Vitrail's native part: knows bytes, integers and the GPU driver, but no torch.

Optional: a source install without a C++ compiler does not have it (ImportError).
"""

class Device:
    @property
    def name(self) -> str: ...
    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability, (major, minor)."""

class Driver:
    """What the NVIDIA driver says of itself, as far as it got."""

    @property
    def available(self) -> bool:
        """Whether there is a driver and at least one device."""
    @property
    def reason(self) -> str:
        """Why ``available`` is False; empty where it is True."""
    @property
    def version(self) -> int:
        """Highest CUDA version the driver serves, 1000 * major + 10 * minor; 0 where unknown."""
    @property
    def devices(self) -> list[Device]: ...

class DriverError(RuntimeError):
    """The driver refused a call; the message names what it was for, the call and its reason."""

    code: int
    """CUresult (cuda.h): 2 is out of memory."""

class Gpu:
    """A device and its primary context, which PyTorch uses too.

    ``library``: the driver, by the name or path that the system's loader takes. Raises RuntimeError
    where there is none, DriverError where it refuses.
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
    """Kernels written in CUDA C++: a fatbin, or a cubin, in a GPU's context.

    Any number of threads may use one at once. Raises ValueError for code that is neither or is cut
    short, DriverError where the driver has no use for it.
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
        """Put ``blocks`` blocks of ``threads`` (x, y) of a kernel on ``stream``, without waiting.

        ``arguments``: each parameter's value, an integer or an address, and its size in bytes. Of 0
        blocks nothing is launched, and everything checked. ``overlap``: it may begin before the
        kernel before it has ended. ``shared``: bytes of dynamic shared memory, at most 48 KiB.
        Raises ValueError for what the kernel does not take, DriverError naming the function where
        the driver refuses.
        """

class Kernels:
    """Kernel images of a GPU, by key."""

    def __init__(self, gpu: Gpu) -> None: ...
    def load(self, record: bytes) -> None:
        """Load an image unless its key is loaded; ``record`` is as `plan.lowering` writes it.

        Raises ValueError for a damaged record, DriverError where the driver refuses its code.
        """

class Executable:
    """A plan over weights at an address. Any number of threads may use it at once.

    A ``size`` is (sequences, tokens of all, tokens of the longest). ``plan`` is as
    `vitrail.plan.lowering` writes it; raises ValueError for a damaged one.
    """

    def __init__(self, kernels: Kernels, plan: bytes, weights: int) -> None: ...
    def missing(self, size: tuple[int, int, int]) -> list[str]:
        """Keys of the images that a call of this size needs and that are not loaded."""
    @staticmethod
    def capacity(size: tuple[int, int, int]) -> tuple[int, int, int]:
        """The size that an arena for ``size`` is made for, so that similar sizes share it."""
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
        """Put every launch on ``stream``, without waiting.

        ``arena`` is the address of ``arena_bytes(capacity)`` bytes, ``buffers`` those of what the
        caller brings, in the plan's order; all are multiples of 16. ``overlap``: a kernel may be
        launched before the one before it has ended. Raises DriverError naming the launch,
        ValueError for sizes or addresses that the plan does not take, RuntimeError where an image
        is missing.
        """

def version() -> str:
    """The version this module was built for."""

def driver() -> Driver:
    """The NVIDIA driver and its devices; never raises where there is none.

    Starts the driver (``cuInit``): a process forked afterwards cannot use CUDA.
    """
