"""Programmatic dependent launch: a kernel's blocks start while the kernel before still runs.

It is the launch that asks for it; in one that does not, these instructions do nothing.
"""

from __future__ import annotations

from vitrail_kernels.launch import jit, tl


@jit()
def wait_for_previous(PDL: tl.constexpr) -> None:
    """Wait for the kernel before and all that it wrote, then let the next one's blocks come.

    Every kernel's first statement, before any access to memory and any return.
    """
    # Waiting comes first: once every block here waits no more, the kernel before has ended, and a
    # third kernel could not take the room on a multiprocessor that its blocks still need.
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
