"""The bundled CLIP: the accuracy that its record claims, on its committed weights, and no less."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vitrail
from vitrail.demo.demo import bundled, encoders
from vitrail.demo.quiz import QUESTIONS, Score, judge

N = 2000
SEED = 1
GOAL = {"color and shape": 0.95} | {q.name: 0.85 for q in QUESTIONS[1:]}
RECORD = json.loads((bundled() / "training.json").read_text())
MEGABYTE = 1_000_000


def _misses(scores: dict[str, Score]) -> dict[str, float]:
    """The questions whose accuracy may be below the goal, 95 % sure."""
    return {
        name: scores[name].lower_bound
        for name, goal in GOAL.items()
        if scores[name].lower_bound < goal
    }


@pytest.fixture(scope="module")
def scores() -> dict[str, Score]:
    return judge(*encoders(vitrail.load(bundled())), N, RECORD["seed"])


def test_it_knows_pairs_that_it_never_saw(scores: dict[str, Score]) -> None:
    assert len(QUESTIONS[0].answers) >= 48
    assert all(score.n == N for score in scores.values())
    assert not _misses(scores), scores


def test_the_record_is_of_these_weights_and_true(scores: dict[str, Score]) -> None:
    weights = (bundled() / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == RECORD["sha256 of model.safetensors"]
    claimed = RECORD["scenes of held-out pairs"]
    for name, score in scores.items():
        # The first half of the scenes that were judged: apart by what a sample of N is, at most.
        rate = claimed[name]["right"] / claimed[name]["of"]
        assert abs(score.accuracy - rate) < 4 * np.sqrt(max(rate * (1 - rate), 0.002) / N), name


@pytest.mark.parametrize("what", ["noise", "two blocks swapped", "words shuffled"])
def test_the_accuracy_test_notices_other_weights(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(bundled(), folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    dice = np.random.default_rng(0)
    if what == "noise":
        for name, values in tensors.items():
            if values.ndim > 1:
                spread = values.astype(np.float32).std()
                noise = dice.normal(0, 0.3 * spread, values.shape)
                tensors[name] = (values + noise).astype(values.dtype)
    elif what == "two blocks swapped":
        first, second = (f"vision_model.encoder.layers.{k}." for k in (0, 1))
        for name in [name for name in tensors if name.startswith(first)]:
            other = name.replace(first, second)
            tensors[name], tensors[other] = tensors[other], tensors[name]
    else:
        name = "text_model.embeddings.token_embedding.weight"
        tensors[name] = dice.permutation(tensors[name], axis=0)
    save_file(tensors, file, metadata={"format": "pt"})
    assert _misses(judge(*encoders(vitrail.load(folder)), 300, SEED))


def test_it_and_all_assets_are_small() -> None:
    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    assert size(bundled()) <= 4 * MEGABYTE
    assert size(bundled().parent) <= 6 * MEGABYTE
