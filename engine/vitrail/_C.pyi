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

def version() -> str:
    """The version this module was built for."""

def driver() -> Driver:
    """The NVIDIA driver and its devices; never raises where there is none.

    Starts the driver (``cuInit``): a process forked afterwards cannot use CUDA.
    """
