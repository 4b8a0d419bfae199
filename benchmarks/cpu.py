"""Vitrail against transformers on the same CPU, in the same run: `python benchmarks/cpu.py`.

The suite "int8" compares Vitrail's int8 with its fp32. Results of every pair are compared first,
then the pair is timed in turn. Models have random weights, which cost the same as trained weights.
The record goes to benchmarks/results/cpu/<suite>.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from environment import ROOT, refuse_dirty
from harness import Run, interleave, ratio, summary
from int8_towers import image_towers
from PIL import Image
from suite import write
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import vitrail
from vitrail.runtime.host_int8 import instructions

RESULTS = ROOT / "benchmarks" / "results" / "cpu"
EOS, BOS = 49407, 49406
Results = dict[str, Any]


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Refuse results that differ by over 1e-4 of the largest value, as for whole fp32 models."""
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    if not error <= 1e-4:
        sys.exit(f"results differ by {error:.2e} of the largest value, wanted at most 1e-4")


def compare(
    what: str, theirs: Callable[[], torch.Tensor], ours: Callable[[], torch.Tensor], goal: float
) -> Results:
    """Check, time in turn, and report the ratio beside its goal."""
    close(ours(), theirs())
    seconds = interleave({"transformers": theirs, "vitrail": ours})
    times = ratio(seconds, "transformers", "vitrail")
    print(f"{what:52s} {times:6.2f}x  (goal {goal}x)", flush=True)
    return {
        "ratio": times,
        "goal": goal,
        **{name: summary(values) for name, values in seconds.items()},
    }


def clip_text(folder: Path) -> Results:
    """CLIP B/32's text tower, batches of 64 captions, token ids in both."""
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig()
    theirs = transformers.CLIPTextModelWithProjection(config).eval()
    theirs.save_pretrained(folder)
    ours = vitrail.load(folder)
    random = np.random.default_rng(0)

    def captions(lengths: list[int]) -> list[list[int]]:
        words = [random.integers(0, BOS, length - 2).tolist() for length in lengths]
        return [[BOS, *word, EOS] for word in words]

    def padded(ids: list[list[int]], to: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.full((len(ids), to), EOS)
        mask = torch.zeros(len(ids), to, dtype=torch.int64)
        for row, tokens in enumerate(ids):
            rows[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return rows, mask

    def pair(what: str, ids: list[list[int]], to: int, goal: float) -> Results:
        rows, mask = padded(ids, to)
        return compare(
            what,
            lambda: theirs(input_ids=rows, attention_mask=mask).text_embeds,
            lambda: ours.encode_text(ids),
            goal,
        )

    equal, mixed = captions([12] * 64), captions(random.integers(5, 41, 64).tolist())
    with torch.no_grad():
        return {
            "12 tokens against padding to 77": pair(
                "CLIP text, 12 tokens, theirs padded to 77", equal, 77, 5.0
            ),
            "12 tokens against padding=True": pair(
                "CLIP text, 12 tokens, theirs padding=True", equal, 12, 1.0
            ),
            "5 to 40 tokens against padding=True": pair(
                "CLIP text, 5..40 tokens, theirs padding=True", mixed, max(map(len, mixed)), 1.3
            ),
        }


def vit_pooled(folder: Path) -> Results:
    """ViT-B/16 class token of 8 images, preprocessed pixels in both."""
    torch.manual_seed(0)
    config = transformers.ViTConfig()
    theirs = transformers.ViTModel(config, add_pooling_layer=False).eval()
    theirs.save_pretrained(folder)
    ours = vitrail.load(folder)
    results = {}
    for batch in (1, 8, 32):
        pixels = torch.randn(batch, 3, 224, 224)
        with torch.no_grad():
            results[f"batch {batch}"] = compare(
                f"ViT-B/16 pooled, batch {batch}",
                lambda pixels=pixels: theirs(pixels).last_hidden_state[:, 0],
                lambda pixels=pixels: ours.encode_image(pixels),
                1.03,
            )
    return results


def photos() -> list[Image.Image]:
    """Decoded photos of usual sizes, made from scikit-image's pictures."""
    import skimage.data

    sources = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee()]
    sizes = [(640, 480), (1024, 768), (800, 600), (480, 640), (1280, 960), (600, 800)]
    images = [Image.fromarray(source) for source in sources]
    return [images[i % 3].resize(sizes[i % 6]) for i in range(48)]


def pixels(folder: Path) -> Results:
    """Decoded photo -> pixel_values, CLIP's processor, same bits in both."""
    torch.manual_seed(0)
    processor = CLIPImageProcessorPil()
    config = transformers.CLIPVisionConfig(
        num_hidden_layers=1, hidden_size=64, num_attention_heads=1
    )
    transformers.CLIPVisionModel(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    ours, images = vitrail.load(folder), photos()

    def theirs() -> torch.Tensor:
        values: torch.Tensor = processor(images, return_tensors="pt")["pixel_values"]
        return values

    if not torch.equal(ours.preprocess(images), theirs()):
        sys.exit("pixels differ from transformers' PIL processor")
    return {
        "48 photos": compare(
            "photo to pixels, CLIP processor", theirs, lambda: ours.preprocess(images), 2.0
        )
    }


def int8(folder: Path) -> Results:
    """Image towers in int8 against fp32, preprocessed pixels in both, on one thread and on all.

    CPU time is what decides on a machine that others use; wall time stands beside it.
    """
    torch.manual_seed(0)
    dinov2 = transformers.Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14
    )
    cases: dict[str, tuple[type, Any, int, float]] = {
        "ViT-B/16, batch 8": (transformers.ViTModel, transformers.ViTConfig(), 8, 2.2),
        "CLIP B/32 image, batch 16": (
            transformers.CLIPVisionModelWithProjection,
            transformers.CLIPVisionConfig(),
            16,
            2.2,
        ),
        "DINOv2-small at 224, batch 8": (transformers.Dinov2Model, dinov2, 8, 1.8),
    }
    results: Results = {"instructions": instructions()}
    threads = torch.get_num_threads()
    for name, (model, config, batch, goal) in cases.items():
        model(config).eval().save_pretrained(folder / name)
        fp32, coded = image_towers(folder / name)
        pixels = torch.randn(batch, 3, 224, 224)
        variants = {
            tower: lambda run=run, pixels=pixels: run.embeddings(pixels)["vision.embedding"]
            for tower, run in (("fp32", fp32), ("int8", coded))
        }
        similarity = F.cosine_similarity(variants["int8"](), variants["fp32"]()).min()
        if not similarity >= 0.95:  # random weights amplify noise; trained ones reach 0.9997
            sys.exit(f"{name}: the lowest cosine is {similarity:.3f}, wanted at least 0.95")
        for count in sorted({1, threads}):
            torch.set_num_threads(count)
            clocks = Clocks()
            interleave(variants, timer=clocks)
            times = {
                clock: {
                    "ratio": ratio(seconds, "fp32", "int8"),
                    **{tower: summary(values) for tower, values in seconds.items()},
                }
                for clock, seconds in clocks.seconds(variants).items()
            }
            results[f"{name}, {count} threads"] = {"goal": goal, **times}
            print(
                f"{name}, {count} threads".ljust(52),
                f"{times['cpu']['ratio']:6.2f}x CPU, {times['wall']['ratio']:.2f}x wall"
                f"  (goal {goal}x)",
                flush=True,
            )
        torch.set_num_threads(threads)
    return results


class Clocks:
    """A timer of `interleave` that keeps the CPU time of the process and the wall time."""

    def __init__(self) -> None:
        self._samples: dict[Run, list[tuple[float, float]]] = {}

    def __call__(self, run: Run) -> float:
        cpu, wall = time.process_time(), time.perf_counter()
        run()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        self._samples.setdefault(run, []).append((cpu, wall))
        return cpu

    def seconds(self, variants: Mapping[str, Run]) -> dict[str, dict[str, list[float]]]:
        """By clock and variant."""
        return {
            clock: {
                name: [pair[at] for pair in self._samples[run]] for name, run in variants.items()
            }
            for at, clock in enumerate(("cpu", "wall"))
        }


FIRST = """
import sys, time
import torch, vitrail, PIL.Image, vitrail.model
start = time.perf_counter()
model = vitrail.load(sys.argv[1])
model.encode_image(PIL.Image.new("RGB", (640, 480)))
print(time.perf_counter() - start)
"""

GROWTH = """
import json, sys
import torch, vitrail, vitrail.model
def resident():
    lines = open("/proc/self/status").read().splitlines()
    values = {l.split(":")[0]: l.split()[1] for l in lines if l.startswith(("VmRSS", "VmHWM"))}
    return {name: int(value) * 1024 for name, value in values.items()}
torch.empty(1).add_(1)
before = resident()["VmRSS"]
model = vitrail.load(sys.argv[1])
after = resident()
arena = model.weight_bytes
growth = {"peak": after["VmHWM"] - before, "after": after["VmRSS"] - before}
print(json.dumps({"arena": arena, **growth}))
"""


def loading(folder: Path) -> Results:
    """CLIP B/32 to its first embedding, and the resident memory that loading CLIP L/14 adds."""
    torch.manual_seed(0)
    transformers.CLIPModel(transformers.CLIPConfig()).save_pretrained(folder / "b32")
    CLIPImageProcessorPil().save_pretrained(folder / "b32")
    run = [sys.executable, "-c"]
    seconds = []
    for _ in range(5):
        done = subprocess.run([*run, FIRST, str(folder / "b32")], capture_output=True, check=True)
        seconds.append(float(done.stdout))
    print(f"{'CLIP B/32, load to first embedding':52s} {sorted(seconds)[2]:6.2f} s  (goal 3 s)")
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    large = transformers.CLIPConfig(
        vision_config={**vision, "num_attention_heads": 16, "patch_size": 14},
        text_config=text,
        projection_dim=768,
    )
    transformers.CLIPModel(large).save_pretrained(folder / "l14")
    done = subprocess.run([*run, GROWTH, str(folder / "l14")], capture_output=True, check=True)
    memory = json.loads(done.stdout)
    growth = round(memory["peak"] / memory["arena"], 3)
    print(f"{'CLIP L/14, peak resident growth over the arena':52s} {growth:6.2f}x  (goal 1.3x)")
    return {
        "CLIP B/32 load to first embedding": {**summary(seconds), "goal_ms": 3000},
        "CLIP L/14 resident growth": {**memory, "ratio": growth, "goal": 1.3},
    }


SUITES: dict[str, Callable[[Path], Results]] = {
    "text": clip_text,
    "vision": vit_pooled,
    "int8": int8,
    "pixels": pixels,
    "loading": loading,
}


def main() -> None:
    """Run the named suites, all of them by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}")
    parser.add_argument("--allow-dirty", action="store_true", help="measure an uncommitted tree")
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.suites if name not in SUITES]
    if unknown:
        parser.error(f"got {unknown}, wanted suites of {list(SUITES)}")
    refuse_dirty(arguments.allow_dirty or arguments.no_record)
    transformers.logging.disable_progress_bar()
    for name in arguments.suites or SUITES:
        with tempfile.TemporaryDirectory() as folder:
            results = SUITES[name](Path(folder))
        if not arguments.no_record:
            write(RESULTS / f"{name}.json", results)


if __name__ == "__main__":
    main()
