"""Trains the CLIP that Vitrail bundles: shapes and colors, from rendered scenes with captions.

    python examples/train_tiny_clip.py out/            about an hour on two cores
    python examples/train_tiny_clip.py out/ --judge    only measures the checkpoint in out/

Needs transformers. ``out/`` becomes a checkpoint folder in transformers' format, in fp16, with
``training.json``: settings, accuracies and the SHA-256 of the weights. Training may be interrupted
at any time; the same command resumes. The data of a step depends only on the seed and the step.

The loss is CLIP's symmetric loss with three changes. First, a caption that is also true of another
picture of the batch is no negative for that picture; the claims of captions are known. Second, the
batch has captions with one changed claim, so that every word counts. Third, a linear head for each
attribute reads the image tower's output during training; the tower then learns shapes and positions
several times faster.

A quarter of the color-shape pairs (`scenes.HELD_OUT`) appears in no picture and no caption. That
alone would teach, for example, that a red thing is never a star. Therefore a caption is no negative
for a picture if the color of one and the shape of the other form a held-out pair.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from scene_captions import Claims, caption, words
from tokenizers import models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

import vitrail
from vitrail.demo import scenes
from vitrail.demo.demo import encoders
from vitrail.demo.quiz import judge
from vitrail.demo.scenes import FIELDS, HELD_OUT, VALUES, Scene

SIDE, PATCH, CONTEXT, PROJECTION = 56, 8, 24, 128
VISION = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
}
TEXT = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 384,
}
SEED, BATCH, HARD = 20261124, 128, 1
STEPS, RATE, DECAY, WARM = 4800, 1.5e-3, 0.05, 300
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
HEADS_WEIGHT = 2.0  # of the heads' loss
SAVE_EVERY, SAY_EVERY = 200, 50
JUDGED = 4000


# -- data ------------------------------------------------------------------------------------------


def numbers(claims: Claims) -> list[int]:
    """Indices into VALUES; -1: no claim."""
    return [VALUES[f].index(c) if c else -1 for f, c in zip(FIELDS, claims, strict=True)]


def facts(scene: Scene) -> list[int]:
    """Indices into VALUES; -2: nameless, which equals no claim."""
    return [VALUES[f].index(v) if (v := getattr(scene, f)) else -2 for f in FIELDS]


def held_out() -> Tensor:
    """(colors + 2, shapes + 2) bool; at the indices -1 and -2 all is False."""
    pairs = torch.zeros(len(VALUES["color"]) + 2, len(VALUES["shape"]) + 2, dtype=torch.bool)
    for color, shape in HELD_OUT:
        pairs[VALUES["color"].index(color), VALUES["shape"].index(shape)] = True
    return pairs


OPEN = held_out()


def changed(dice: Random, claims: Claims) -> Claims:
    """The claims with another value for a random claim; never a held-out pair."""
    indices = [k for k, claim in enumerate(claims) if claim]
    while True:
        k = dice.choice(indices)
        negative = list(claims)
        negative[k] = dice.choice([value for value in VALUES[FIELDS[k]] if value != claims[k]])
        if (negative[1], negative[0]) not in HELD_OUT:
            return tuple(negative)


def batch(step: int, tokenizer: CLIPTokenizer) -> tuple[Tensor, ...]:
    """The data of a step: B pictures, T texts of L tokens, F attributes.

    uint8 pictures (B, 56, 56, 3); ids (T, L) and mask; (B, T) bool, whether a text is true of a
    picture, or no negative for it; the attributes (B, F) as `facts`.
    """
    dice = Random(f"{SEED}-{step}")
    samples = [scenes.sample(dice, nameless=True) for _ in range(BATCH)]
    pictures = np.stack([np.asarray(scenes.render(scene, SIDE)) for scene in samples])
    captions = [caption(dice, scene) for scene in samples]
    hard = [changed(dice, claims) for _, claims in captions for _ in range(HARD)]
    texts = [text for text, _ in captions] + [words(dice, claims) for claims in hard]
    claimed = torch.tensor([numbers(claims) for claims in [c for _, c in captions] + hard])
    real = torch.tensor([facts(scene) for scene in samples])
    true = ((claimed == real[:, None]) | (claimed == -1)).all(-1)
    true |= OPEN[real[:, None, 1], claimed[:, 0]] | OPEN[claimed[:, 1], real[:, None, 0]]
    ids = tokenizer(texts, padding=True, return_tensors="pt")
    return torch.from_numpy(pictures), ids["input_ids"], ids["attention_mask"], true, real


def loss_of(scores: Tensor, true: Tensor) -> Tensor:
    """CLIP's loss over (B, T) scores; text i belongs to picture i, other true texts are masked."""
    diagonal = torch.arange(len(scores))
    masked = true.clone()
    masked[diagonal, diagonal] = False
    scores = scores.masked_fill(masked, -torch.inf)
    return F.cross_entropy(scores, diagonal) + F.cross_entropy(scores[:, : len(scores)].T, diagonal)


# -- model -----------------------------------------------------------------------------------------


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE, trained on captions."""
    dice = Random(SEED)
    corpus = [caption(dice, scenes.sample(dice))[0] for _ in range(4000)]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = [*letters, *(f"{letter}</w>" for letter in letters)]
    ends = ["<|startoftext|>", "<|endoftext|>"]
    empty = CLIPTokenizer(vocab={n: i for i, n in enumerate(base + ends)}, merges=[])
    backend = empty.backend_tokenizer
    backend.model = models.BPE(end_of_word_suffix="</w>")
    trainer = trainers.BpeTrainer(vocab_size=320, end_of_word_suffix="</w>", show_progress=False)
    backend.train_from_iterator(corpus, trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    names = dict.fromkeys([*base, *map("".join, merges), *ends])
    vocab = {name: number for number, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT)


def make_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    torch.manual_seed(SEED)
    text = TEXT | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = VISION | {"image_size": SIDE, "patch_size": PATCH}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION))
    initialize_positions(model)
    return model


@torch.no_grad()
def initialize_positions(model: CLIPModel) -> None:
    """Sets position embeddings to sines and cosines of row and column, as large as the patches'.

    With the usual scale of 0.02 the model learns positions several times slower.
    """
    embeddings = model.vision_model.embeddings
    side, quarter = SIDE // PATCH, VISION["hidden_size"] // 4
    angles = torch.arange(side).float()[:, None] / side * math.pi * torch.logspace(0, 0.8, quarter)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    embeddings.position_embedding.weight[1:] = 0.4 * torch.cat([rows, columns], -1).flatten(0, 1)


def scaled(pictures: Tensor) -> Tensor:
    """uint8 (B, 56, 56, 3) to pixel_values (B, 3, 56, 56)."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pictures.permute(0, 3, 1, 2).float() / 255 - mean) / std


# -- training --------------------------------------------------------------------------------------


class Training:
    """The model, AdamW and the step, saved to a file so that a later run can resume."""

    def __init__(self, file: Path, model: CLIPModel, steps: int) -> None:
        self.file, self.model, self.steps, self.step = file, model, steps, 0
        self.heads = nn.Linear(VISION["hidden_size"], sum(map(len, VALUES.values())))
        self.named = dict(model.named_parameters())
        self.named |= {f"heads.{name}": p for name, p in self.heads.named_parameters()}
        matrices = [p for p in self.named.values() if p.ndim > 1]
        vectors = [p for p in self.named.values() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": DECAY},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98))
        if self.file.exists():
            self._restore()

    def rate(self) -> float:
        done = max(0, self.step - WARM) / max(1, self.steps - WARM)
        return (
            RATE
            * min(1.0, (self.step + 1) / WARM)
            * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
        )

    def save(self) -> None:
        tensors = {name: p.detach() for name, p in self.named.items()}
        for name, p in self.named.items():
            tensors |= {
                f"{key}/{name}": self.adam.state[p][key] for key in ("exp_avg", "exp_avg_sq")
            }
        draft = self.file.with_suffix(".tmp")
        save_file(tensors | {"step": torch.tensor(self.step)}, draft)
        os.replace(draft, self.file)

    def _restore(self) -> None:
        tensors = load_file(self.file)
        self.step = int(tensors["step"])
        for name, p in self.named.items():
            p.data.copy_(tensors[name])
            state = {key: tensors[f"{key}/{name}"] for key in ("exp_avg", "exp_avg_sq")}
            self.adam.state[p] = state | {"step": torch.tensor(float(self.step))}

    def advance(
        self, pictures: Tensor, ids: Tensor, mask: Tensor, true: Tensor, real: Tensor
    ) -> tuple[float, float]:
        """Makes a step; returns CLIP's loss and the heads' mean loss."""
        for group in self.adam.param_groups:
            group["lr"] = self.rate()
        out = self.model(input_ids=ids, attention_mask=mask, pixel_values=scaled(pictures))
        loss = loss_of(out.logits_per_image, true)
        heads_loss = self.heads_loss(out.vision_model_output.pooler_output, real)
        self.adam.zero_grad(set_to_none=True)
        (loss + HEADS_WEIGHT * heads_loss).backward()
        nn.utils.clip_grad_norm_(self.named.values(), 1.0)
        self.adam.step()
        self.model.logit_scale.data.clamp_(max=math.log(100))
        self.step += 1
        return loss.item(), heads_loss.item()

    def heads_loss(self, pooled: Tensor, real: Tensor) -> Tensor:
        """The heads' mean cross-entropy over named attributes; shapes count three times."""
        sizes = [len(values) for values in VALUES.values()]
        shape, color, *attributes = self.heads(pooled).split(sizes, 1)
        shape = shape.masked_fill(OPEN[real[:, 1], : sizes[0]], -torch.inf)
        color = color.masked_fill(OPEN[: sizes[1], real[:, 0]].T, -torch.inf)
        losses = [
            F.cross_entropy(scores, real[:, k], ignore_index=-2)
            for k, scores in enumerate([shape, color, *attributes])
        ]
        return (2 * losses[0] + torch.stack(losses).sum()) / (2 + len(losses))


def train(training: Training, tokenizer: CLIPTokenizer) -> None:
    start, first_step, mean = time.monotonic(), training.step, None
    with ThreadPoolExecutor(1) as pool:
        next_batch = pool.submit(batch, training.step, tokenizer)
        while training.step < training.steps:
            data = next_batch.result()
            next_batch = pool.submit(batch, training.step + 1, tokenizer)
            losses = np.array(training.advance(*data))
            mean = 0.95 * mean + 0.05 * losses if mean is not None else losses
            if training.step % SAY_EVERY == 0:
                seconds = (time.monotonic() - start) / (training.step - first_step)
                losses = f"loss {mean[0]:.3f}, heads {mean[1]:.3f}"
                print(f"step {training.step}: {losses}, {seconds:.2f} s a step", flush=True)
            if training.step % SAVE_EVERY == 0 or training.step == training.steps:
                training.save()


# -- the checkpoint --------------------------------------------------------------------------------


def export(folder: Path, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    """Writes the folder in transformers' format, in fp16."""
    pixels = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    CLIPProcessor(image_processor=pixels, tokenizer=tokenizer).save_pretrained(folder)
    model.half().save_pretrained(folder)


def measure(folder: Path) -> dict[str, object]:
    """The checkpoint's scores in Vitrail on scenes not seen in training."""
    scores = judge(*encoders(vitrail.load(folder)), JUDGED, SEED)
    return {
        name: {"right": score.correct, "of": score.n, "lower_bound_95": round(score.lower_bound, 4)}
        for name, score in scores.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--judge", action="store_true", help="measure only")
    arguments = parser.parse_args()
    if not arguments.judge:
        arguments.out.mkdir(parents=True, exist_ok=True)
        tokenizer = make_tokenizer()
        model = make_model(tokenizer)
        train(Training(arguments.out / "training.safetensors", model, arguments.steps), tokenizer)
        export(arguments.out, model, tokenizer)
    weights = (arguments.out / "model.safetensors").read_bytes()
    record = {
        "made by": "examples/train_tiny_clip.py",
        "steps": arguments.steps,
        "seed": SEED,
        "batch": BATCH,
        "changed captions a picture": HARD,
        "rate": RATE,
        "weight decay": DECAY,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sha256 of model.safetensors": hashlib.sha256(weights).hexdigest(),
        "scenes of held-out pairs": measure(arguments.out),
    }
    text = json.dumps(record, indent=2)
    print(text)
    if not arguments.judge:
        (arguments.out / "training.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
