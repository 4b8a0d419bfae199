"""Branches and divergence, ends, and instructions whose only effect is not on results."""

from __future__ import annotations

import numpy as np

from emulator.programs import LANES, Program, bytes_of, family, slots


def steps(number: int) -> int:
    """Of the sequence that halves even numbers and triples odd ones plus 1, until 1."""
    count = 0
    while number != 1:
        number = number * 3 + 1 if number % 2 else number // 2
        count += 1
    return count


STORE = "mov.b32 %r99, 0; st.global.v2.b32 [%rd5], {%r9, %r99};"


@family(r"bra")
def branch(opcode: str) -> Program:
    """Each lane has a number of iterations of its own, and of branches in them."""
    body = f"""add.s32 %r4, %r1, 1; mov.b32 %r9, 0;
L1: setp.eq.s32 %p1, %r4, 1; @%p1 bra L3;
and.b32 %r5, %r4, 1; setp.eq.s32 %p2, %r5, 0; @%p2 bra L2;
mad.lo.s32 %r4, %r4, 3, 1; add.s32 %r9, %r9, 1; bra L1;
L2: shr.u32 %r4, %r4, 1; add.s32 %r9, %r9, 1; bra L1;
L3: bar.sync 0; {STORE}"""
    expected = np.array([steps(i + 1) for i in range(LANES)], np.uint32)
    return Program(body, bytes_of(), bytes_of(slots(expected)))


@family(r"bra\.uni")
def uniform_branch(opcode: str) -> Program:
    body = f"mov.b32 %r9, 1; bra.uni L1; mov.b32 %r9, 2; L1: {STORE}"
    return Program(body, bytes_of(), bytes_of(slots(np.ones(LANES, np.uint32))))


@family(r"(ret|exit)")
def end(opcode: str, _: str) -> Program:
    """Half of the lanes end early."""
    body = f"""mov.b32 %r9, 1; {STORE} setp.lt.u32 %p1, %r1, 16;
@%p1 {opcode}; mov.b32 %r9, 2; {STORE}"""
    expected = np.where(np.arange(LANES) < 16, 1, 2).astype(np.uint32)
    return Program(body, bytes_of(), bytes_of(slots(expected)))


@family(r"trap")
def trap(opcode: str) -> Program:
    return Program("trap;", bytes_of(), bytes_of(), fault="trap [trap, PTX line ")


@family(r"griddepcontrol\.(wait|launch_dependents)")
def dependencies(opcode: str, _: str) -> Program:
    """Two launches add 1 to what the first of them found."""
    body = f"""griddepcontrol.launch_dependents; griddepcontrol.wait;
ld.global.b32 %r9, [%rd5]; add.s32 %r9, %r9, 1; {STORE}"""
    expected = np.full(LANES, 0xA5A5A5A5 + 2, np.uint32)
    return Program(body, bytes_of(), bytes_of(slots(expected)), overlaps=True)


@family(r"setmaxnreg\.(inc|dec)\.sync\.aligned\.u32")
def max_registers(opcode: str, _: str) -> Program:
    body = f"{opcode} 20;"
    return Program(body, bytes_of(), bytes_of(), fault="setmaxnreg: 20 registers")


NO_EFFECT = {
    "nanosleep.u32": "nanosleep.u32 100;",
    "prefetch.tensormap": "prefetch.tensormap [%rd1];",
    "prefetch.param.tensormap": "mov.b64 %rd9, p2; prefetch.param.tensormap [%rd9];",
    "fence.mbarrier_init.release.cluster": "fence.mbarrier_init.release.cluster;",
}


@family(
    r"(nanosleep\.u32|prefetch\.(?:param\.)?tensormap|fence\.mbarrier_init\.release\.cluster"
    r"|(?:membar|fence\.acq_rel|fence\.sc)\.(?:cta|cluster))"
)
def no_effect(opcode: str, _: str) -> Program:
    """What these do not do cannot be wrong; a mutation of them fails, so that they are reached."""
    body = f"{NO_EFFECT.get(opcode, opcode + ';')} mov.b32 %r9, 1; {STORE}"
    return Program(body, bytes_of(), bytes_of(slots(np.ones(LANES, np.uint32))))
