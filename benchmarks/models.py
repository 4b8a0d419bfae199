"""Whole models against transformers in fp16, in the same run: eager, torch.compile, max-autotune.

`python benchmarks/models.py`, or with the beginning of some cases' names; writes models.json. Ours
and eager are timed and written before anything is compiled; max-autotune, which takes minutes,
compiles the models of `AUTOTUNED` alone.

Random weights, which cost the same as trained weights. Pixels are on the device and preprocessed:
float32 for ours, fp16 for the peers; "vitrail uint8" takes the bytes of a decoded image instead, as
`encode_image` does; "graph" is a CUDA graph of ours, as max-autotune replays its own.
Captions are lists of ids for ours, packed in the time that is measured; the peers' are padded
tensors on the device, and need no mask. Every peer returns all tokens, as its class does; ours
returns the embedding. Batch 1 is latency with a synchronization a call, the rest back-to-back runs.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from ceilings import ceilings
from harness import (
    OURS,
    Case,
    Keep,
    Results,
    Run,
    Timer,
    device_timer,
    host_timer,
    measure,
    tolerances,
)
from shapes import BOS, MODEL_CASES, TEXT, VISION, captions
from suite import arguments, results_folder, run_suite
from torch import Tensor

import vitrail
from vitrail.plan.text import text_dense, text_pooled
from vitrail.plan.vision import vision_dense, vision_pooled
from vitrail.spec import TextSpec, VisionSpec
from vitrail.text.tokens import TokenIds

CHECKED = 64
"""Items of a batch that are compared with fp32."""
AUTOTUNED = (("B/16", 256),)
SAMPLE_SECONDS = 0.1
"""Seconds that a sample of back-to-back runs should take."""

# -- checkpoints -----------------------------------------------------------------------------------


def architecture(spec: VisionSpec | TextSpec) -> tuple[Any, Any, dict[str, Any]]:
    """The transformers class with these shapes, its config, and options of its constructor."""
    blocks = spec.blocks
    common: dict[str, Any] = {
        "hidden_size": blocks.width,
        "num_hidden_layers": blocks.layers,
        "num_attention_heads": blocks.heads,
        "hidden_act": blocks.activation,
        "layer_norm_eps": blocks.eps,
    }
    if isinstance(spec, TextSpec):
        common |= {"eos_token_id": spec.eos, "pad_token_id": spec.eos}
        config: Any = transformers.CLIPTextConfig(
            **common,
            bos_token_id=min(BOS, spec.vocab - 1),
            intermediate_size=blocks.mlp,
            vocab_size=spec.vocab,
            max_position_embeddings=spec.context,
            projection_dim=spec.projection,
        )
        return transformers.CLIPTextModelWithProjection, config, {}
    common |= {"image_size": spec.image[0], "patch_size": spec.patch[0]}
    if blocks.layer_scale:
        config = transformers.Dinov2Config(**common, mlp_ratio=blocks.mlp // blocks.width)
        return transformers.Dinov2Model, config, {}
    common["intermediate_size"] = blocks.mlp
    if spec.projection is None:
        options = {"add_pooling_layer": False}
        return transformers.ViTModel, transformers.ViTConfig(**common), options
    config = transformers.CLIPVisionConfig(**common, projection_dim=spec.projection)
    return transformers.CLIPVisionModelWithProjection, config, {}


@functools.cache
def checkpoint(spec: VisionSpec | TextSpec) -> tempfile.TemporaryDirectory[str]:
    """A folder with a random model of these shapes; gone when the process ends."""
    folder = tempfile.TemporaryDirectory()
    torch.manual_seed(0)
    kind, config, options = architecture(spec)
    tolerances().perturb(kind(config, **options)).save_pretrained(folder.name)
    if isinstance(spec, VisionSpec):
        half = [0.5] * spec.channels
        pixels = {"size": spec.image[0], "crop_size": spec.image[0]}
        processor = json.dumps(pixels | {"image_mean": half, "image_std": half})
        (Path(folder.name) / "preprocessor_config.json").write_text(processor)
    return folder


# -- variants --------------------------------------------------------------------------------------


def _pick(output: Any) -> Tensor:
    """The tensor that Vitrail returns, from the output of a transformers class."""
    for name in ("image_embeds", "text_embeds"):
        if (found := getattr(output, name, None)) is not None:
            return found  # type: ignore[no-any-return]
    result: Tensor = output.last_hidden_state[:, 0]
    return result


def _called(function: Callable[..., Any], inputs: dict[str, Tensor]) -> Run:
    def run() -> Tensor:
        with torch.inference_mode():
            return _pick(function(**inputs))

    return run


def _peers(
    model: Any, inputs: dict[str, Tensor], modes: Sequence[str], label: str = ""
) -> dict[str, Run]:
    """PyTorch's ways to run ``model``: eager, then compiled by every mode of ``modes``."""
    peers = {f"eager{label}": _called(model, inputs)}
    for mode in modes:  # compiled at the first call
        compiled = torch.compile(model, mode=mode, dynamic=False)
        name = "compile" if mode == "default" else mode
        peers[name + label] = _called(compiled, inputs)
    return peers


def _modes(spec: VisionSpec | TextSpec, batch: int, device: str) -> tuple[str, ...]:
    """The modes of torch.compile that a model is compared with."""
    if device == "cpu":
        return ()
    autotuned = any(spec == VISION[name] and batch == each for name, each in AUTOTUNED)
    return ("default", "max-autotune") if autotuned else ("default",)


def graphed(run: Run) -> Run:
    """``run`` as a CUDA graph, captured at the first call."""

    @functools.cache
    def capture() -> tuple[torch.cuda.CUDAGraph, Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()
        return graph, result

    def replay() -> Tensor:
        graph, result = capture()
        graph.replay()
        return result

    return replay


def _theirs(spec: VisionSpec | TextSpec, device: str, dtype: torch.dtype, attention: str) -> Any:
    kind, _, options = architecture(spec)
    options |= {"dtype": dtype, "attn_implementation": attention}
    return kind.from_pretrained(checkpoint(spec).name, **options).to(device).eval()


def _ours(spec: VisionSpec | TextSpec, device: str) -> vitrail.Model:
    dtype = "float16" if device == "cuda" else "float32"
    model = vitrail.load(checkpoint(spec).name, device=device, dtype=dtype)
    if device == "cuda" and model.backend != "native":
        raise RuntimeError(f"the {model.backend} runner would serve, wanted the native one")
    return model


def _check(reference: Tensor, peer: Tensor | None) -> Callable[[str, Tensor], None]:
    def check(name: str, result: Tensor) -> None:
        rows = result[: len(reference)]
        tolerances().assert_close(rows, reference, peer, what="model", name=name)

    return check


def _numbers(
    spec: VisionSpec | TextSpec, given: dict[str, Tensor], device: str
) -> tuple[Any, Callable[[str, Tensor], None]]:
    """The peer in the dtype that is timed, and the check: fp32, and its own error in 16 bits."""
    few = {name: tensor[:CHECKED] for name, tensor in given.items()}
    rules = tolerances()
    with rules.reference_numbers():
        reference = _called(_theirs(spec, device, torch.float32, "eager"), few)()
    if device == "cpu":
        return _theirs(spec, device, torch.float32, "sdpa"), _check(reference, None)
    half = _theirs(spec, device, torch.float16, "sdpa")
    few = {name: t.half() if t.is_floating_point() else t for name, t in few.items()}
    with rules.reference_numbers():
        return half, _check(reference, _called(half, few)())


def vision_case(spec: VisionSpec, batch: int, device: str) -> Case:
    """An image tower: pixels on the device to embeddings."""
    torch.manual_seed(1)
    raw = torch.randint(256, (batch, *spec.image, spec.channels), device=device).to(torch.uint8)
    pixels = ((raw.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5).contiguous()
    theirs, check = _numbers(spec, {"pixel_values": pixels}, device)
    tower = _ours(spec, device)._vision
    assert tower is not None, "the checkpoint has an image tower"

    def embed(pixels: Tensor) -> Tensor:
        return tower.embeddings(pixels)["vision.embedding"]

    variants: dict[str, Run] = {
        OURS: functools.partial(embed, pixels),
        f"{OURS} uint8": functools.partial(embed, raw),
    }
    if device == "cuda":
        variants["graph"] = graphed(variants[OURS])
    given = pixels.half() if device == "cuda" else pixels
    peers = _peers(theirs, {"pixel_values": given}, _modes(spec, batch, device))
    variants |= peers
    lengths = [spec.tokens_at(spec.image)] * batch
    pooled = vision_pooled(spec, uint8=False).flops(lengths)
    dense = vision_dense(spec).flops(lengths)
    ours = (OURS, f"{OURS} uint8", "graph")
    flops = {name: pooled if name in ours else dense for name in variants}
    items = dict.fromkeys(variants, batch)
    late = [name for name in peers if name != "eager"]
    return Case(variants, check, frozenset({"graph"}), late, flops, items=items)


def _ids(spec: TextSpec, lengths: Sequence[int]) -> list[list[int]]:
    """Random ids, each with the end token last."""
    assert spec.eos is not None, "the end token is known"
    dice = torch.Generator().manual_seed(2)
    return [
        [*torch.randint(spec.eos, (n - 1,), generator=dice).tolist(), spec.eos] for n in lengths
    ]


def text_case(spec: TextSpec, batch: int, device: str) -> Case:
    """A text tower: captions of 5 to 40 tokens; the peers pad to the context and to the longest."""
    lengths = captions(batch)
    ids = _ids(spec, lengths)
    rows = torch.full((batch, spec.context), ids[0][-1])
    for row, tokens in zip(rows, ids, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    rows = rows.to(device)
    theirs, check = _numbers(spec, {"input_ids": rows}, device)
    tower = _ours(spec, device)._text
    assert tower is not None, "the checkpoint has a text tower"
    variants: dict[str, Run] = {OURS: lambda: tower.embeddings(TokenIds.of(ids))["text.embedding"]}
    flops = {OURS: text_pooled(spec).flops(lengths)}
    for padded in (spec.context, max(lengths)):
        given = {"input_ids": rows[:, :padded].contiguous()}
        peers = _peers(theirs, given, _modes(spec, batch, device), f" at {padded}")
        variants |= peers
        flops |= dict.fromkeys(peers, text_dense(spec).flops([padded] * batch))
    late = [name for name in variants if not name.startswith((OURS, "eager"))]
    items = dict.fromkeys(variants, batch)
    return Case(variants, check, late=late, flops=flops, items=items)


# -- the suite -------------------------------------------------------------------------------------


def timing(case: Case, batch: int, device: str) -> tuple[Timer, int]:
    """The timer and the rounds: latency for an item, else back-to-back runs that fill a sample."""
    if device == "cpu":
        return host_timer(), 3
    if batch == 1:
        return host_timer(torch.cuda.synchronize), 50
    eager = next(run for name, run in case.variants.items() if name.startswith("eager"))
    eager()
    once = device_timer(flush=False)(eager)
    return device_timer(max(3, min(100, round(SAMPLE_SECONDS / once))), flush=False), 11


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write ``models.json``."""
    builds: dict[str, tuple[Callable[[str], Case], int]] = {}
    for model, batch in MODEL_CASES:
        if model in VISION:
            build = functools.partial(vision_case, VISION[model], batch)
        else:
            build = functools.partial(text_case, TEXT[model], batch)
        builds[f"{model}, batch {batch}"] = build, batch
    options = arguments(__doc__, list(builds), argv)
    transformers.logging.disable_progress_bar()
    bounds, limits = ceilings(options.device)

    def run(name: str, keep: Keep) -> Results:
        build, batch = builds[name]
        case = build(options.device)
        timer, rounds = timing(case, batch, options.device)
        return measure(case, timer, rounds, 3, limits, keep)

    cases = {name: functools.partial(run, name) for name in options.cases}
    path = results_folder(options.device) / "models.json"
    return run_suite(path, cases, options.device, options.resume, options.seconds, ceilings=bounds)


if __name__ == "__main__":
    sys.exit(main())
