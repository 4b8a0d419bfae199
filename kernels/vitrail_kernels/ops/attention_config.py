"""The configurations of `attention`: the tuned table's, else a heuristic with its reason."""

import functools

from vitrail_kernels.configs import KernelConfig, Ladder, ladder_of, tuned
from vitrail_kernels.launch import Target, cdiv


def attention_config(
    target: Target, key: str, heads: int, head_dim: int, causal: bool, max_seqlen: int, tokens: int
) -> KernelConfig:
    """The configuration for ``tokens`` rows: the tuned table's at ``key``, else a heuristic's.

    Sizes decide BLOCK_M and stages, which change no bit: a warp holds 16 rows of the same
    instructions, over the same key tiles in order. Causal sequences are captions, and few captions
    have more than 64 tokens, so that one tile serves any length.
    """
    if key in tuned(target.arch):
        return tuned(target.arch)[key]
    if target.arch == 90:
        large = cdiv(tokens, 128) * heads >= 2 * target.sms and not causal
        registers = 128 if head_dim <= 80 else None
        if registers and large and 128 * cdiv(max_seqlen, 128) == 64 * cdiv(max_seqlen, 64):
            reason = "64 rows read K and V from L2 too often for more than 350 TFLOP/s, and pad no"
            reason += " less here; 2 blocks of 2 warpgroups overlap softmax with products, and the"
            reason += " third stage loads a tile ahead of the tile in use"
            return KernelConfig(128, 64, 0, 8, 3, registers, reason=reason)
        reason = "128 rows pad more, or leave multiprocessors idle, or take over 128 registers;"
        if max_seqlen < 192 or causal:
            reason += " 2 to 4 blocks of a warpgroup overlap softmax with products; a third stage"
            reason += " would cost one of them, and has few tiles to load ahead"
            return KernelConfig(64, 64, 0, 4, 2, registers, reason=reason)
        reason += " 3 blocks that load a tile ahead, against 4 that wait for every tile"
        return KernelConfig(64, 64, 0, 4, 3, registers, reason=reason)
    if target.tcgen05:
        reason = "2 to 4 blocks a multiprocessor; 128 rows spill past 96 columns"
        return KernelConfig(64, 64, 0, 4, 2, reason=reason)
    registers = 168 if head_dim <= 64 and not causal else None
    reason = "16 rows a warp, 2 or 3 blocks a multiprocessor; more keys or fewer registers spill"
    return KernelConfig(64, 64 if head_dim <= 80 else 32, 0, 4, 2, registers, reason=reason)


def attention_ladder(
    target: Target, key: str, heads: int, head_dim: int, causal: bool, max_seqlen: int
) -> Ladder:
    """`attention_config` for every number of tokens."""
    # up to this number, some multiprocessor has fewer than two blocks of 128 queries
    few = 128 * ((2 * target.sms - 1) // heads)
    choose = functools.partial(attention_config, target, key, heads, head_dim, causal, max_seqlen)
    return ladder_of([few], choose)
