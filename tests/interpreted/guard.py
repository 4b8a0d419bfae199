"""Tensors whose last byte is the last of its page, with a page after it that kills who reads it.

Triton's interpreter reads raw memory: a load past the end of an input goes unseen unless nothing is
mapped there. On a GPU such a load would read a neighbor's data, or fault.
"""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def at_page_end(tensor: Tensor) -> Tensor:
    """A contiguous copy of ``tensor`` that ends where an unreadable page begins."""
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes == 0:
        return tensor.contiguous()
    body = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, body + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _LIBC.mprotect(start + body, mmap.PAGESIZE, mmap.PROT_READ * 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    raw = torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=body - nbytes)
    copy = raw.view(tensor.dtype).view(tensor.shape)
    copy.copy_(tensor)
    return copy
