"""Loads and stores of each space, ldmatrix and stmatrix."""

from __future__ import annotations

from typing import Any

import numpy as np

from emulator.programs import LANES, Program, bytes_of, family


@family(r"(ld|st)\.(global|shared|local|generic)")
def access(opcode: str, _: str, space: str) -> Program:
    """Bytes, sign extension, vectors, and both widths of registers, there and back."""
    prefix = "" if space == "generic" else f".{space}"
    address = {
        "global": "mov.b64 %rd10, %rd5;",
        "shared": "mul.lo.s32 %r10, %r1, 32; add.s32 %r10, %r10, %r2; cvt.u64.u32 %rd10, %r10;",
        "local": "mov.u64 %rd10, depot;",
        "generic": "mul.lo.s32 %r10, %r1, 32; add.s32 %r10, %r10, %r2; cvt.u64.u32 %rd10, %r10;"
        "cvta.shared.u64 %rd10, %rd10;",
    }[space]
    depot = ".local .align 16 .b8 depot[32];" if space == "local" else ""
    if space == "global":
        body = f"""{address}
ld.global.s8 %r20, [%rd4]; ld.global.b8 %h21, [%rd4+1]; ld.global.v2.b16 {{%h22, %h23}}, [%rd4+4];
st.global.b32 [%rd10], %r20; st.global.b8 [%rd10+4], %h21; st.global.b8 [%rd10+5], %h22;
st.global.b16 [%rd10+6], %h23;"""
    else:
        body = f"""{address}
ld.global.b64 %rd20, [%rd4];
st{prefix}.b64 [%rd10+8], %rd20; mov.b64 {{%r20, %r21}}, %rd20;
st{prefix}.v4.b32 [%rd10+16], {{%r21, %r20, %r20, %r21}};
ld{prefix}.s8 %r22, [%rd10+8]; ld{prefix}.b8 %h21, [%rd10+9];
ld{prefix}.v2.b16 {{%h22, %h23}}, [%rd10+16];
st.global.b32 [%rd5], %r22; st.global.b8 [%rd5+4], %h21; st.global.b8 [%rd5+5], %h22;
st.global.b16 [%rd5+6], %h23;"""
    values = np.random.default_rng(1).integers(0, 256, (LANES, 8), dtype=np.uint8)
    expected = np.zeros((LANES, 8), np.uint8)
    expected[:, :4] = values[:, 0].view(np.int8).astype(np.int32)[:, None].view(np.uint8)
    expected[:, 4] = values[:, 1]
    expected[:, 5] = values[:, 4]
    expected[:, 6:] = values[:, 6:]
    return Program(body, bytes_of(values), bytes_of(expected), shared=1024, depot=depot)


@family(r"ld\.param")
def load_parameter(opcode: str) -> Program:
    """The addresses themselves are parameters; their difference is not known, so by a load."""
    values = np.arange(LANES, dtype=np.uint64) * np.uint64(0x0102030405060708)
    body = """ld.param.b64 %rd10, [p0]; ld.param.v2.b32 {%r10, %r11}, [p1];
mov.b64 %rd11, {%r10, %r11}; add.s64 %rd10, %rd10, %rd3; add.s64 %rd11, %rd11, %rd3;
ld.global.b64 %rd12, [%rd10]; st.global.b64 [%rd11], %rd12;"""
    return Program(body, bytes_of(values), bytes_of(values))


def _matrices(count: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    return np.arange(count * 64, dtype=np.uint16).reshape(count, 8, 8) * np.uint16(257)


def _fragments(matrices: Any, transposed: bool) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """What each lane's registers hold, as (lane, matrix)."""
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    pairs = np.ascontiguousarray(matrices).reshape(len(matrices), LANES, 2)
    words = pairs[..., 0].astype(np.uint32) | pairs[..., 1].astype(np.uint32) << 16
    return np.ascontiguousarray(words.T)


@family(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans|)\.shared(?:::cta)?\.b16")
def matrix(opcode: str, direction: str, number: str, trans: str) -> Program:
    count = int(number)
    matrices = _matrices(count)
    fragments = np.zeros((LANES, 4), np.uint32)
    fragments[:, :count] = _fragments(matrices, bool(trans))
    registers = "{" + ", ".join(f"%r{20 + i}" for i in range(count)) + "}"
    # Rows lie 16 bytes apart; the lane's number is the row's.
    row = "shl.b32 %r10, %r1, 4; add.s32 %r10, %r10, %r2; shl.b32 %r11, %r1, 4;"
    thread = "cvt.u64.u32 %rd10, %r11; add.s64 %rd11, %rd1, %rd10; add.s64 %rd12, %rd2, %rd10;"
    guard = f"setp.lt.u32 %p1, %r1, {8 * count};"
    start = (
        row + thread + guard + "mov.b32 %r20, 0; mov.b32 %r21, 0;mov.b32 %r22, 0;mov.b32 %r23, 0;"
    )
    whole = "{%r20, %r21, %r22, %r23}"
    if direction == "ld":
        body = f"""{start} @%p1 ld.global.v4.b32 {{%r30, %r31, %r32, %r33}}, [%rd11];
@%p1 st.shared.v4.b32 [%r10], {{%r30, %r31, %r32, %r33}}; bar.sync 0;
{opcode} {registers}, [%r10]; st.global.v4.b32 [%rd12], {whole};"""
        return Program(body, bytes_of(matrices), bytes_of(fragments), shared=512)
    body = f"""{start} ld.global.v4.b32 {whole}, [%rd11];
{opcode} [%r10], {registers}; bar.sync 0;
@%p1 ld.shared.v4.b32 {{%r30, %r31, %r32, %r33}}, [%r10];
@%p1 st.global.v4.b32 [%rd12], {{%r30, %r31, %r32, %r33}};"""
    return Program(body, bytes_of(fragments), bytes_of(matrices), shared=512)
