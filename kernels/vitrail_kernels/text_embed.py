"""text_embed: out[i] = token[ids[i]] + position[positions[i]]

FLOPs  none counted       bytes  3 M C       bound  by memory
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitrail_kernels.cost import Cost, traffic


def text_embed_ref(
    out: Tensor, ids: Tensor, positions: Tensor, token: Tensor, position: Tensor
) -> None:
    """Write ``out`` (M, C); ``ids``, ``positions`` (M,), ``token`` (V, C), ``position`` (T, C)."""
    place = position.index_select(0, positions)
    word = token.index_select(0, ids)
    if out.dtype == word.dtype == place.dtype:
        torch.add(word, place, out=out)
    else:
        out.copy_(word + place)


def text_embed_cost(
    out: Tensor, ids: Tensor, positions: Tensor, token: Tensor, position: Tensor, **_: object
) -> Cost:
    """A row of each table is read and a row written for every token."""
    row = out.shape[1] * (token.element_size() + position.element_size())
    return Cost(0, out.shape[0] * row + traffic(out, ids, positions))
