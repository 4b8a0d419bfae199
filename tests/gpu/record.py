"""Records the results of small launches of every operator, for a machine without a GPU:
`python -m gpu.record FILE.safetensors` writes the outputs, by launch, dtype and argument.

The inputs follow from a seed, on the CPU; their SHA-256 is kept beside the outputs, so that whoever
compares knows that these were the inputs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

from gpu import cases
from gpu.cases import Case, Work, different, vision_work
from gpu.common import NAMES, same_bits
from vitrail.plan.text import text_pooled
from vitrail.plan.vision import vision_dense, vision_pooled
from vitrail.spec import BlockSpec, ModelSpec
from vitrail_kernels import OPERATORS
from vitrail_kernels.configs import KernelConfig
from vitrail_kernels.launch import Call, Target, triton_version

LENGTHS = (5, 9, 24, 3, 66)


def _small(blocks: BlockSpec) -> BlockSpec:
    heads = 128 // blocks.head_dim or 1
    return dataclasses.replace(
        blocks, width=heads * blocks.head_dim, heads=heads, mlp=200, layers=2
    )


def _small_spec(checkpoint: str) -> ModelSpec:
    spec = cases.spec_of(checkpoint)
    vision, text = spec.vision, spec.text
    if vision is not None:
        side = 4 * vision.patch[0]
        vision = dataclasses.replace(vision, blocks=_small(vision.blocks), image=(side, side))
    if text is not None:
        text = dataclasses.replace(text, blocks=_small(text.blocks), vocab=100, context=77, eos=99)
    return dataclasses.replace(spec, vision=vision, text=text)


def small_works() -> Iterator[tuple[str, Work]]:
    """Pooled and dense plans of a ViT, a CLIP and a DINOv2, and the pooled plan of CLIP's texts."""
    for checkpoint in ("vit-base-patch16-224", "clip-vit-large-patch14", "dinov2-small"):
        spec = _small_spec(checkpoint)
        vision = spec.vision
        assert vision is not None, "the checkpoint has an image tower"
        for uint8 in (True, False):
            plan = vision_pooled(vision, uint8=uint8)
            yield checkpoint, vision_work(spec, plan, 3, vision.image, uint8)
        plan = vision_dense(vision)
        yield checkpoint, vision_work(spec, plan, 3, vision.image, uint8=False)
    text = _small_spec("clip-vit-base-patch32").text
    assert text is not None, "the checkpoint has a text tower"
    yield "clip-vit-base-patch32", Work(text_pooled(text), LENGTHS, None)


def small_cases() -> Iterator[tuple[str, Case]]:
    """Every different launch of these plans with its inputs, on the CPU, in fp16 and bf16."""
    groups: dict[str, list[Work]] = {}
    for name, work in small_works():
        groups.setdefault(name, []).append(work)
    with mock.patch.object(cases, "DEVICE", "cpu"):
        for name, group in groups.items():
            for label, work, launch in different(group):
                for dtype in (torch.float16, torch.bfloat16):
                    torch.manual_seed(0)
                    yield f"{name}|{label}|{NAMES[dtype]}", cases.case_of(work, launch, dtype)


def digest(case: Case) -> str:
    """SHA-256 of the inputs."""
    sha = hashlib.sha256()
    for name, tensor in sorted(case.given.items()):
        sha.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def on_gpu(case: Case) -> dict[str, Tensor]:
    """The outputs of a launch, on the CPU."""
    inputs = {name: tensor.to("cuda") for name, tensor in case.given.items()}
    outputs = dataclasses.replace(case, given=inputs).run()
    return {name: tensor.cpu() for name, tensor in outputs.items()}


def tiles_of(name: str, case: Case) -> tuple[KernelConfig, ...]:
    """The tiles that a case is run by besides the usual: linear ones of a first block, in fp16."""
    return cases.TILES if case.op == "linear" and ".0." in name and name.endswith("float16") else ()


def by_tile(tile: KernelConfig) -> Any:
    """Inside it, every linear takes this tile."""
    return mock.patch("vitrail_kernels.ops.linear.linear_config", return_value=tile)


def record(file: Path) -> int:
    """Run every case and write the file, with what there is if it is interrupted; 1 after a fault.

    A launch that fails prints a line. If it loses the device, no later launch can run.
    """
    recorded: dict[str, Tensor] = {}
    inputs: dict[str, str] = {}
    faults, card = 0, torch.cuda.get_device_properties()
    try:
        for name, case in small_cases():
            try:
                outputs, others = by_tiles(name, case)
                torch.cuda.synchronize()
            except Exception as error:
                faults += 1
                print(f"FAILED {name}: {type(error).__name__}: {error}", flush=True)
                torch.cuda.synchronize()
                continue
            faults += others
            inputs[name] = digest(case)
            recorded |= {f"{name}|{argument}": tensor for argument, tensor in outputs.items()}
    finally:
        about = {"gpu": card.name, "arch": f"sm_{card.major}{card.minor}"}
        about |= {"torch": torch.__version__, "triton": str(triton_version())}
        save_file(recorded, file, about | inputs)
        print(f"{len(recorded)} outputs of {len(inputs)} launches, {file.stat().st_size >> 10} KiB")
    return int(faults > 0)


def by_tiles(name: str, case: Case) -> tuple[dict[str, Tensor], int]:
    """The outputs of a case, and how many of other tiles have other bits, a line for each."""
    outputs, others = on_gpu(case), 0
    for tile in tiles_of(name, case):
        with by_tile(tile):
            again = on_gpu(case)
        for argument, tensor in again.items():
            if not same_bits(tensor, outputs[argument]):
                others += 1
                differ = int((tensor != outputs[argument]).sum())
                print(f"OTHER BITS {name} {argument} {tile}: {differ} of {tensor.numel()}")
    return outputs, others


def needed(target: Target) -> Iterator[Call]:
    """Every kernel call that `record` makes on ``target``."""
    for name, case in small_cases():
        outputs = {n: torch.empty(s, dtype=d, device="meta") for n, (s, d) in case.outputs.items()}
        tensors = {n: t.to("meta") for n, t in case.given.items()} | outputs
        if case.alias is not None:
            tensors[case.alias] = tensors["out"]
        for tile in (None, *tiles_of(name, case)):
            with by_tile(tile) if tile else nullcontext():
                yield from OPERATORS[case.op].calls(target, **tensors, **case.scalars)


if __name__ == "__main__":
    sys.exit(record(Path(sys.argv[1])))
