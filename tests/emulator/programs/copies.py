"""cp.async, and tensors by cp.async.bulk.tensor."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from emulator.programs import LANES, Program, bytes_of, family

ROW = """shl.b32 %r10, %r1, 4; add.s32 %r11, %r10, %r2; cvt.u64.u32 %rd9, %r10;
add.s64 %rd10, %rd1, %rd9; add.s64 %rd11, %rd2, %rd9;"""


def async_copy(copy: str, commit: str, wait: str, lengths: Any) -> Program:
    """16 bytes a lane, of which ``lengths`` are read; the neighbor's are given back."""
    body = f"""{ROW} rem.u32 %r12, %r1, 17; {copy} {commit} {wait} bar.sync 0;
xor.b32 %r13, %r10, 64; add.s32 %r13, %r13, %r2;
ld.shared.v4.b32 {{%r20, %r21, %r22, %r23}}, [%r13];
st.global.v4.b32 [%rd11], {{%r20, %r21, %r22, %r23}};"""
    values = np.random.default_rng(2).integers(1, 256, (LANES, 16), dtype=np.uint8)
    expected = np.where(np.arange(16) < np.asarray(lengths)[:, None], values, 0).astype(np.uint8)
    return Program(body, bytes_of(values), bytes_of(expected[np.arange(LANES) ^ 4]), shared=512)


COPY = "cp.async.cg.shared.global [%r11], [%rd10], 16;"
COMMIT, WAIT = "cp.async.commit_group;", "cp.async.wait_group 0;"


@family(r"(cp\.async\.(?:ca|cg)\.shared\.global(?:\.L2::\w+)?)(#4|)")
def copy(opcode: str, name: str, sized: str) -> Program:
    lengths = np.arange(LANES) % 17 if sized else np.full(LANES, 16)
    return async_copy(
        f"{name} [%r11], [%rd10], 16{', %r12' if sized else ''};", COMMIT, WAIT, lengths
    )


@family(r"cp\.async\.(commit_group|wait_group|wait_all)")
def groups(opcode: str, name: str) -> Program:
    commit, wait = ("", "cp.async.wait_all;") if name == "wait_all" else (COMMIT, WAIT)
    return async_copy(COPY, commit, wait, np.full(LANES, 16))


# -- tensors: of fp16, rows of 16 bytes in the box, and the box beyond the tensor's end

DIMS, BOX, START = (12, 3, 3, 2, 2), (8, 2, 2, 2, 2), (8, 2, 0, 1, 0)
TENSOR_INIT = """setp.eq.u32 %p2, %r1, 0; add.s32 %r20, %r2, 1024;
@%p2 mbarrier.init.shared::cta.b64 [%r20], 1; mov.b64 %rd9, p2;"""
TENSOR_WAIT = "W: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r20], 0; @!%p3 bra W;"


def fields(rank: int, dims: Any = DIMS, swizzle: int = 0) -> dict[str, Any]:
    """Of a tensor map with rows of 32 bytes, the last 8 of which are no part of the tensor."""
    strides, stride = [], 32
    for size in dims[1:rank]:
        strides.append(stride)
        stride *= size
    return {
        "element_type": 6,
        "dims": list(dims[:rank]),
        "strides": strides,
        "box": list(BOX[:rank]),
        "swizzle": swizzle,
    }


def tensor(rank: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Values with the innermost dimension last, padding included."""
    shape = (*reversed(DIMS[1:rank]), 16)
    return np.arange(1, np.prod(shape) + 1, dtype=np.uint16).reshape(shape)


def box_of(rank: int) -> tuple[np.ndarray[Any, np.dtype[np.uint16]], tuple[slice, ...]]:
    """The box's values, zeros outside, and which part of the tensor it covers."""
    result = np.zeros(tuple(reversed(BOX[:rank])), np.uint16)
    starts, sizes, limits = (tuple(reversed(x[:rank])) for x in (START, BOX, DIMS))
    ends = [min(s + b, d) for s, b, d in zip(starts, sizes, limits, strict=True)]
    covered = tuple(slice(s, e) for s, e in zip(starts, ends, strict=True))
    result[tuple(slice(0, e - s) for s, e in zip(starts, ends, strict=True))] = tensor(rank)[
        covered
    ]
    return result, covered


def coordinates(rank: int) -> tuple[str, str]:
    """Statements that set the registers, and their list."""
    names = [f"%r{40 + i}" for i in range(rank)]
    moves = " ".join(f"mov.b32 {n}, {START[i]};" for i, n in enumerate(names))
    return moves, "{" + ", ".join(names) + "}"


SHOW = """setp.lt.u32 %p5, %r30, SIZE; mul.wide.u32 %rd12, %r30, 8; add.s64 %rd12, %rd12, %rd2;
@%p5 ld.shared.b64 %rd20, [%r31]; @%p5 st.global.b64 [%rd12+OFFSET], %rd20;"""


HINT = r"(\.L2::cache_hint|)"
SEVERAL = r"(\.multicast::cluster|)"


@family(rf"cp\.async\.bulk\.tensor\.(\d)d\.shared::(?:cta|cluster)\.global.*?{SEVERAL}{HINT}")
def load(opcode: str, dimensions: str, multicast: str, hint: str) -> Program:
    """The box's bytes, of each block."""
    rank = int(dimensions)
    values, _ = box_of(rank)
    moves, names = coordinates(rank)
    program = bulk_load(opcode, moves, f"[%rd9, {names}]", values, bool(multicast), hint)
    return dataclasses.replace(program, inputs=bytes_of(tensor(rank)), tensor=("in", fields(rank)))


@family(rf"cp\.async\.bulk\.shared::(?:cta|cluster)\.global.*?{SEVERAL}{HINT}")
def load_bytes(opcode: str, multicast: str, hint: str) -> Program:
    """Bytes without a tensor map."""
    values = np.arange(1, 97, dtype=np.uint16)
    source = f"[%rd1+16], {values.nbytes}"
    program = bulk_load(opcode, "", source, values, bool(multicast), hint)
    return dataclasses.replace(program, inputs=bytes_of(np.zeros(8, np.uint16), values))


def bulk_load(
    opcode: str, moves: str, source: str, values: Any, multicast: bool, hint: str
) -> Program:
    """Loads ``values`` to shared memory, waits for them and gives them back."""
    lane = "mov.b32 %r30, %r1; shl.b32 %r31, %r1, 3; add.s32 %r31, %r31, %r2;"
    show = SHOW.replace("SIZE", str(values.size // 4)).replace("OFFSET", "0")
    expect = f"@%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], {values.nbytes};"
    policy = ", %rd30" if hint else ""
    if not multicast:
        body = f"""{TENSOR_INIT} bar.sync 0; {moves} {expect} mov.b64 %rd30, 0;
@%p2 {opcode} [%r2], {source}, [%r20]{policy}; {TENSOR_WAIT} {lane} {show}"""
        return Program(body, bytes_of(), bytes_of(values), shared=2048)
    meet = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
    second = f"""mov.u32 %r33, %cluster_ctarank; mul.wide.u32 %rd13, %r33, {values.nbytes};
add.s64 %rd2, %rd2, %rd13; mov.b64 %rd30, 0;"""
    body = f"""{TENSOR_INIT} {meet} {moves} {second} {expect} mov.b16 %h1, 3;
setp.eq.u32 %p4, %r3, 0; @%p4 {opcode} [%r2], {source}, [%r20], %h1{policy};
{TENSOR_WAIT} {lane} {show} {meet}"""
    return Program(
        body,
        bytes_of(),
        bytes_of(values, values),
        grid=2,
        shared=2048,
        directives=".explicitcluster .reqnctapercluster 2",
    )


def tensor_store(store: str, fence: str, commit: str, wait: str, rank: int) -> Program:
    """The box from shared memory, which is overwritten once the store has read it."""
    values, covered = box_of(rank)
    inside = values.copy()
    moves, names = coordinates(rank)
    target = tensor(rank)
    target[:] = 0xA5A5
    part = tuple(slice(0, s.stop - s.start) for s in covered)
    inside = np.arange(values.size, dtype=np.uint16).reshape(values.shape)
    target[covered] = inside[part]
    words = values.size // 4
    body = f"""setp.lt.u32 %p5, %r1, {words}; setp.eq.u32 %p2, %r1, 0; mov.b64 %rd9, p2; {moves}
shl.b32 %r31, %r1, 3; add.s32 %r31, %r31, %r2; @%p5 ld.global.b64 %rd20, [%rd4];
@%p5 st.shared.b64 [%r31], %rd20; {fence} bar.sync 0;
@%p2 {store} [%rd9, {names}], [%r2]; {commit} {wait} bar.sync 0;
mov.b64 %rd20, 0; @%p5 st.shared.b64 [%r31], %rd20;"""
    return Program(
        body, bytes_of(inside), bytes_of(target), shared=2048, tensor=("out", fields(rank))
    )


STORE = "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group"
FENCE, BULK_COMMIT = "fence.proxy.async.shared::cta;", "cp.async.bulk.commit_group;"
BULK_WAIT = "cp.async.bulk.wait_group.read 0;"


@family(rf"cp\.async\.bulk\.tensor\.(\d)d\.global.*?{HINT}")
def store(opcode: str, dimensions: str, hint: str) -> Program:
    program = tensor_store(opcode, FENCE, BULK_COMMIT, BULK_WAIT, int(dimensions))
    return _with_policy(program, hint)


@family(rf"cp\.async\.bulk\.global.*?{HINT}")
def store_bytes(opcode: str, hint: str) -> Program:
    """Bytes without a tensor map, which are overwritten once the store has read them."""
    program = tensor_store(opcode, FENCE, BULK_COMMIT, BULK_WAIT, 2)
    size = program.inputs.size
    body = program.body.replace("[%rd9, {%r40, %r41}], [%r2];", f"[%rd2+16], [%r2], {size};")
    assert body != program.body, "the copy stands there"
    expected = bytes_of(np.full(8, 0xA5A5, np.uint16), program.inputs)
    program = dataclasses.replace(program, body=body, expected=expected, tensor=None)
    return _with_policy(program, hint)


def _with_policy(program: Program, hint: str) -> Program:
    """The copy with a cache policy as its last operand."""
    if not hint:
        return program
    at = program.body.index(";", program.body.index("@%p2 cp.async.bulk"))
    body = f"mov.b64 %rd30, 0; {program.body[:at]}, %rd30{program.body[at:]}"
    return dataclasses.replace(program, body=body)


@family(r"cp\.async\.bulk\.(commit_group|wait_group|wait_group\.read)")
def bulk_groups(opcode: str, name: str) -> Program:
    wait = BULK_WAIT if name == "commit_group" else f"{opcode} 0;"
    return tensor_store(STORE, FENCE, BULK_COMMIT, wait, 2)


@family(r"fence\.proxy\.async(?:\.shared::cta)?")
def proxy_fence(opcode: str) -> Program:
    return tensor_store(STORE, f"{opcode};", BULK_COMMIT, BULK_WAIT, 2)
