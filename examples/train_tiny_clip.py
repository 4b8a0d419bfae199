"""Trains the CLIP that Vitrail bundles: shapes and colors, from rendered scenes with captions.

    python examples/train_tiny_clip.py out/            about an hour on two cores
    python examples/train_tiny_clip.py out/ --judge    only measures what out/ holds

Needs transformers. ``out/`` becomes a checkpoint folder as transformers saves it, in fp16, with
``training.json``: settings, accuracies and the SHA-256 of the weights. Training may be stopped at
any time; the same command goes on. What a step shows depends on the seed and the step alone.

The loss is CLIP's, both ways, with three changes. A caption that is also true of another picture of
the batch is no negative for it: what captions claim is known. The batch has captions in which one
claim was changed, so that every word counts. And while it trains, a linear head for each attribute
reads the image tower's output, which makes it learn shapes and places several times faster.

A quarter of the pairs of color and shape (`scenes.HELD_OUT`) is in no picture and in no caption.
That alone would teach that what is red is no star, if red stars are held out: so no shape, or
color, that makes such a pair with a picture's own is a negative for it.
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
ASIDE = 2.0  # the heads' part of the loss
SAVE_EVERY, SAY_EVERY = 200, 50
JUDGED = 4000


# -- what a step shows -----------------------------------------------------------------------------


def numbers(claims: Claims) -> list[int]:
    """Indices into VALUES; -1 claims nothing."""
    return [VALUES[f].index(c) if c else -1 for f, c in zip(FIELDS, claims, strict=True)]


def facts(scene: Scene) -> list[int]:
    """Indices into VALUES; -2 has no name, which no claim equals."""
    return [VALUES[f].index(v) if (v := getattr(scene, f)) else -2 for f in FIELDS]


def held_out() -> Tensor:
    """(colors + 2, shapes + 2) bool; indices -1 and -2 find False."""
    pairs = torch.zeros(len(VALUES["color"]) + 2, len(VALUES["shape"]) + 2, dtype=torch.bool)
    for color, shape in HELD_OUT:
        pairs[VALUES["color"].index(color), VALUES["shape"].index(shape)] = True
    return pairs


OPEN = held_out()


def changed(dice: Random, claims: Claims) -> Claims:
    """The claims with one of them another, color and shape most often; never a held-out pair."""
    told = [k for k, claim in enumerate(claims) if claim]
    while True:
        k = dice.choice(told)
        other = list(claims)
        other[k] = dice.choice([value for value in VALUES[FIELDS[k]] if value != claims[k]])
        if (other[1], other[0]) not in HELD_OUT:
            return tuple(other)


def batch(step: int, tokenizer: CLIPTokenizer) -> tuple[Tensor, ...]:
    """What a step shows, of pictures B, texts T and attributes F.

    uint8 pictures (B, 56, 56, 3), ids (T, L) and mask, which texts are true or must be left open
    (B, T) bool, and the attributes (B, F) as `facts`.
    """
    dice = Random(f"{SEED}-{step}")
    shown = [scenes.sample(dice, nameless=True) for _ in range(BATCH)]
    pictures = np.stack([np.asarray(scenes.render(scene, SIDE)) for scene in shown])
    own = [caption(dice, scene) for scene in shown]
    hard = [changed(dice, claims) for _, claims in own for _ in range(HARD)]
    texts = [text for text, _ in own] + [words(dice, claims) for claims in hard]
    claimed = torch.tensor([numbers(claims) for claims in [c for _, c in own] + hard])
    real = torch.tensor([facts(scene) for scene in shown])
    true = ((claimed == real[:, None]) | (claimed == -1)).all(-1)
    true |= OPEN[real[:, None, 1], claimed[:, 0]] | OPEN[claimed[:, 1], real[:, None, 0]]
    ids = tokenizer(texts, padding=True, return_tensors="pt")
    return torch.from_numpy(pictures), ids["input_ids"], ids["attention_mask"], true, real


def loss_of(scores: Tensor, true: Tensor) -> Tensor:
    """CLIP's loss over (B, T) scores: text i is picture i's own, what else is true no negative."""
    own = torch.arange(len(scores))
    others = true.clone()
    others[own, own] = False
    scores = scores.masked_fill(others, -torch.inf)
    return F.cross_entropy(scores, own) + F.cross_entropy(scores[:, : len(scores)].T, own)


# -- model -----------------------------------------------------------------------------------------


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE over the words that captions are made of."""
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
    place_patches(model)
    return model


@torch.no_grad()
def place_patches(model: CLIPModel) -> None:
    """Positions begin as sines and cosines of row and column, as strong as the patches.

    At the usual 0.02 they drown in the patches, and places are learnt several times slower.
    """
    embeddings = model.vision_model.embeddings
    side, quarter = SIDE // PATCH, VISION["hidden_size"] // 4
    at = torch.arange(side).float()[:, None] / side * math.pi * torch.logspace(0, 0.8, quarter)
    waves = torch.cat([at.sin(), at.cos()], dim=1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    embeddings.position_embedding.weight[1:] = 0.4 * torch.cat([rows, columns], -1).flatten(0, 1)


def scaled(pictures: Tensor) -> Tensor:
    """uint8 (B, 56, 56, 3) to pixel_values (B, 3, 48, 48)."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pictures.permute(0, 3, 1, 2).float() / 255 - mean) / std


# -- training --------------------------------------------------------------------------------------


class Training:
    """The model, AdamW and the step, kept in a file so that a later run goes on."""

    def __init__(self, file: Path, model: CLIPModel, steps: int) -> None:
        self.file, self.model, self.steps, self.step = file, model, steps, 0
        self.heads = nn.Linear(VISION["hidden_size"], sum(map(len, VALUES.values())))
        self.named = dict(model.named_parameters())
        self.named |= {f"heads.{name}": p for name, p in self.heads.named_parameters()}
        decayed = [p for p in self.named.values() if p.ndim > 1]
        plain = [p for p in self.named.values() if p.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": DECAY},
            {"params": plain, "weight_decay": 0.0},
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
        kept = {name: p.detach() for name, p in self.named.items()}
        for name, p in self.named.items():
            kept |= {f"{key}/{name}": self.adam.state[p][key] for key in ("exp_avg", "exp_avg_sq")}
        draft = self.file.with_suffix(".tmp")
        save_file(kept | {"step": torch.tensor(self.step)}, draft)
        os.replace(draft, self.file)

    def _restore(self) -> None:
        kept = load_file(self.file)
        self.step = int(kept["step"])
        for name, p in self.named.items():
            p.data.copy_(kept[name])
            state = {key: kept[f"{key}/{name}"] for key in ("exp_avg", "exp_avg_sq")}
            self.adam.state[p] = state | {"step": torch.tensor(float(self.step))}

    def advance(
        self, pictures: Tensor, ids: Tensor, mask: Tensor, true: Tensor, real: Tensor
    ) -> tuple[float, float]:
        """One step; CLIP's loss and the heads' mean one."""
        for group in self.adam.param_groups:
            group["lr"] = self.rate()
        out = self.model(input_ids=ids, attention_mask=mask, pixel_values=scaled(pictures))
        loss = loss_of(out.logits_per_image, true)
        aside = self.told(out.vision_model_output.pooler_output, real)
        self.adam.zero_grad(set_to_none=True)
        (loss + ASIDE * aside).backward()
        nn.utils.clip_grad_norm_(self.named.values(), 1.0)
        self.adam.step()
        self.model.logit_scale.data.clamp_(max=math.log(100))
        self.step += 1
        return loss.item(), aside.item()

    def told(self, pooled: Tensor, real: Tensor) -> Tensor:
        """The heads' mean cross-entropy over attributes that have names; shapes count thrice."""
        sizes = [len(values) for values in VALUES.values()]
        shape, color, *others = self.heads(pooled).split(sizes, 1)
        shape = shape.masked_fill(OPEN[real[:, 1], : sizes[0]], -torch.inf)
        color = color.masked_fill(OPEN[: sizes[1], real[:, 0]].T, -torch.inf)
        losses = [
            F.cross_entropy(scores, real[:, k], ignore_index=-2)
            for k, scores in enumerate([shape, color, *others])
        ]
        return (2 * losses[0] + torch.stack(losses).sum()) / (2 + len(losses))


def train(training: Training, tokenizer: CLIPTokenizer) -> None:
    start, first, mean = time.monotonic(), training.step, None
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(batch, training.step, tokenizer)
        while training.step < training.steps:
            made = coming.result()
            coming = pool.submit(batch, training.step + 1, tokenizer)
            losses = np.array(training.advance(*made))
            mean = 0.95 * mean + 0.05 * losses if mean is not None else losses
            if training.step % SAY_EVERY == 0:
                each = (time.monotonic() - start) / (training.step - first)
                losses = f"loss {mean[0]:.3f}, heads {mean[1]:.3f}"
                print(f"step {training.step}: {losses}, {each:.2f} s a step", flush=True)
            if training.step % SAVE_EVERY == 0 or training.step == training.steps:
                training.save()


# -- the checkpoint --------------------------------------------------------------------------------


def export(folder: Path, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    """The folder as transformers saves it, in fp16."""
    pixels = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    CLIPProcessor(image_processor=pixels, tokenizer=tokenizer).save_pretrained(folder)
    model.half().save_pretrained(folder)


def measure(folder: Path) -> dict[str, object]:
    """What the checkpoint scores in Vitrail on scenes that it never saw."""
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
    given = parser.parse_args()
    if not given.judge:
        given.out.mkdir(parents=True, exist_ok=True)
        tokenizer = make_tokenizer()
        model = make_model(tokenizer)
        train(Training(given.out / "training.safetensors", model, given.steps), tokenizer)
        export(given.out, model, tokenizer)
    weights = (given.out / "model.safetensors").read_bytes()
    record = {
        "made by": "examples/train_tiny_clip.py",
        "steps": given.steps,
        "seed": SEED,
        "batch": BATCH,
        "changed captions a picture": HARD,
        "rate": RATE,
        "weight decay": DECAY,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sha256 of model.safetensors": hashlib.sha256(weights).hexdigest(),
        "scenes of held-out pairs": measure(given.out),
    }
    text = json.dumps(record, indent=2)
    print(text)
    if not given.judge:
        (given.out / "training.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
