"""The machine code of whole models: `python benchmarks/sass.py "ViT-B/16"`, no GPU.

For each launch: registers, shared memory and blocks an SM; an iteration of the main loop with its
products, loads and waits; the instructions of the epilogue. Numbers are a warp's. ``--json FILE``
keeps them, so that a change of a kernel is compared before and after:
docs/performance.md ("Machine code") has the columns and the table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from environment import last_change, refuse_dirty
from main_loops import Loop, read_sass
from roofline import CARDS, SHAPES, steps
from suite import write

import vitrail_kernels
from vitrail_kernels.compile import KernelCode, compile_all, compilers
from vitrail_kernels.launch import Call, Target

DEFAULT = ("ViT-B/16", "CLIP L/14", "DINOv2-B@518")
BATCHES = (256, 64, 1)
OPCODES = ("FFMA", "FADD", "FMUL", "MUFU", "MOV", "IADD3", "IMAD", "LDG", "LDS", "STS", "BAR")
"""Opcodes of an epilogue that results count singly."""
HEAD = (
    "launch          kernel, tile, stages                      regs shared blocks | products, in"
    " flight, carried    loads ahead  lead  BAR MUFU  all | epilogue  a value  MOV"
)

Results = dict[str, Any]


def loop_record(loop: Loop) -> Results:
    """An iteration as the result files hold it."""
    return {
        "products": loop.products,
        "groups": loop.groups,
        "in_flight": loop.in_flight,
        "carried": loop.carried,
        "tma_loads": loop.loads,
        "cp_async": loop.copies,
        "loads_ahead": loop.loads_ahead,
        "lead": loop.lead,
        "barriers": loop.barriers,
        "mufu": loop.opcodes["MUFU"],
        "instructions": loop.instructions,
    }


def record(call: Call, code: KernelCode) -> Results:
    """A kernel as the result files hold it."""
    sass, config = read_sass(code.sass), call.config
    sides = (config.block_m, config.block_n, config.block_k)
    return {
        "kernel": code.name,
        "tile": "x".join(str(side) for side in sides if side),
        "warps": config.warps,
        "stages": config.stages,
        "registers": code.registers,
        "stack": code.stack,
        "spills": code.spills,
        "shared": code.shared,
        "blocks": code.blocks,
        "instructions": code.instructions.total(),
        "loops": [loop_record(loop) for loop in sass.loops],
        "epilogue": {
            "instructions": sass.epilogue.total(),
            "per_value": round(sass.per_value, 2),
            **{name: sass.epilogue[name] for name in OPCODES if sass.epilogue[name]},
        },
    }


def lines(label: str, kernel: Results) -> Iterator[str]:
    """The lines of a kernel; further main loops below the first."""
    name = kernel["kernel"].strip("_").removesuffix("_kernel")
    form = f"{name} {kernel['tile']}, {kernel['stages']}"
    text = f"{label:15s} {form:41s} {kernel['registers']:4d} {kernel['shared']:6d} "
    text += f"{kernel['blocks']:6d}" + f", {kernel['spills']} spills" * bool(kernel["spills"])
    for number, loop in enumerate(kernel["loops"]):
        products = " ".join(f"{count} {shape}" for shape, count in loop["products"].items())
        loads = loop["tma_loads"] + loop["cp_async"]
        text += (
            f" | {products:18s} {loop['in_flight']:3d} {loop['carried']:3d} "
            f"{loads:16d} {loop['loads_ahead']:5d} {loop['lead']:5d} {loop['barriers']:4d} "
            f"{loop['mufu']:4d} {loop['instructions']:4d}"
        )
        if number == 0 and kernel["epilogue"]["instructions"]:
            epilogue = kernel["epilogue"]
            text += (
                f" | {epilogue['instructions']:8d} {epilogue['per_value']:8.1f} "
                f"{epilogue.get('MOV', 0):4d}"
            )
        yield text
        text = " " * (len(HEAD.partition("|")[0]) - 1)
    if not kernel["loops"]:
        yield text


def model(name: str, batch: int, arch: int, dtype: torch.dtype) -> Results:
    """Print the kernels of a model, equal kernels once. Returns their records by label."""
    every = [
        (launch.label if number == 0 else f"{launch.label} {number + 1}", call)
        for launch in steps(SHAPES[name], dtype, batch)
        for number, call in enumerate(launch.calls(Target(arch, CARDS[arch].sms)))
    ]
    results: Results = {}
    codes = compile_all([call for _, call in every], arch)
    for (label, call), code in zip(every, codes, strict=True):
        kernel = record(call, code)
        equal = next(
            (label_before for label_before in results if results[label_before] == kernel), None
        )
        results[label] = {"same_as": equal} if equal else kernel
        print(*lines(label, kernel) if not equal else (f"{label:15s} as {equal}",), sep="\n")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Print, and with ``--json`` write a file as the other suites do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--arch", type=int, choices=CARDS, default=90)
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "int8"), default="float16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--allow-dirty", action="store_true", help="write of an uncommitted tree")
    options = parser.parse_args(arguments)
    names = options.models or DEFAULT
    if unknown := sorted(set(names) - SHAPES.keys()):
        parser.error(f"no model {', '.join(unknown)}; wanted some of {', '.join(SHAPES)}")
    if options.json:
        refuse_dirty(options.allow_dirty)
    triton, ptxas = compilers(options.arch)
    results: Results = {
        "kernels": last_change(Path(vitrail_kernels.__file__).parent),
        "triton": triton,
        "ptxas": ptxas,
    }
    for name in names:
        for batch in options.batch:
            case = f"{name}, batch {batch}, sm_{options.arch}"
            print(f"\n{case}, {options.dtype}, triton {triton}, ptxas {ptxas}", HEAD, sep="\n")
            results[case] = model(name, batch, options.arch, getattr(torch, options.dtype))
    if options.json:
        write(options.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
