"""The exact product of int8 matrices in PyTorch.

``torch._int_mm`` is exact on a CPU with VNNI. Without VNNI, oneDNN adds pairs of byte products in
16 saturating bits and returns wrong sums without a word: at K = 768 the largest error is over 12
million. `int8_product` therefore probes it once, and otherwise adds exact products in fp32.
"""

import functools

import torch
from torch import Tensor

EXACT_IN_FLOAT = 1024
"""So many products of two int8 numbers add up exactly in fp32: 1024 * 128 * 128 = 2^24."""


def int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` (M, K) times the transpose of ``weight`` (N, K), both int8, as exact int32 sums (M, N).

    K is at most 131,071, so that no sum overflows.
    """
    # with one column both strides of the transpose are 1, and _int_mm leaves the result unwritten
    if x.device.type == "cpu" and x.shape[1] > 1 and _int_mm_is_exact():
        return torch._int_mm(x, weight.t())
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.int32, device=x.device)
    for start in range(0, x.shape[1], EXACT_IN_FLOAT):
        columns = slice(start, start + EXACT_IN_FLOAT)
        total += (x[:, columns].float() @ weight[:, columns].float().t()).int()
    return total


@functools.cache
def _int_mm_is_exact() -> bool:
    """Whether `torch._int_mm` is exact for the codes whose sums are largest."""
    signs = torch.tensor([[127], [-128]], dtype=torch.int8, device="cpu")
    x = signs.repeat(16, 512)
    product = torch._int_mm(x, x.t())
    return torch.equal(product.long(), x.long() @ x.long().t())
