"""Programmatic dependent launch: the blocks of a kernel start while the previous kernel still runs.

A launch attribute allows this. Without that attribute the instructions below do nothing.
"""

from __future__ import annotations

from vitrail_kernels.launch import jit, tl


@jit()
def wait_for_previous(PDL: tl.constexpr) -> None:
    """Wait until the previous kernel has finished and its writes are visible, then allow the next
    kernel to start.

    This is the first statement of every kernel, before any access to memory and any return.
    """
    # Wait first, release second. An early release would let a third kernel take room on a
    # multiprocessor that blocks of the previous kernel still need.
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
