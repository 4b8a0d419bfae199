"""How well a model knows the scenes of `scenes`: questions with all their answers, and scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import numpy.typing as npt
from PIL import Image

from vitrail.demo.scenes import VALUES, Scene, render, sample

Floats = npt.NDArray[np.float32]

PAIRS = tuple((colour, shape) for colour in VALUES["colour"] for shape in VALUES["shape"])
SIDE = 192  # of a rendered scene, in pixels; a model's own preprocessing makes it smaller
CHUNK = 256


@dataclass(frozen=True, slots=True)
class Question:
    """``texts[i]`` says that the answer is ``answers[i]``; ``truth`` reads it off a scene."""

    name: str
    texts: tuple[str, ...]
    answers: tuple[object, ...]
    truth: Callable[[Scene], object]


def _things(count: str) -> str:
    return "one thing" if count == "one" else f"{count} things"


QUESTIONS = (
    Question(
        "colour and shape",
        tuple(f"{colour} {shape}" for colour, shape in PAIRS),
        PAIRS,
        lambda scene: (scene.colour, scene.shape),
    ),
    Question("count", tuple(map(_things, VALUES["count"])), VALUES["count"], lambda s: s.count),
    Question(
        "position",
        tuple(f"thing {where}" for where in VALUES["position"]),
        VALUES["position"],
        lambda scene: scene.position,
    ),
    Question("size", tuple(f"{s} thing" for s in VALUES["size"]), VALUES["size"], lambda s: s.size),
    Question(
        "background",
        tuple(f"thing on a {colour} background" for colour in VALUES["background"]),
        VALUES["background"],
        lambda scene: scene.background,
    ),
)


@dataclass(frozen=True, slots=True)
class Score:
    right: int
    n: int

    @property
    def accuracy(self) -> float:
        return self.right / self.n

    @property
    def lower_bound(self) -> float:
        """Of the accuracy, 95 %, by Wilson's interval (Journal of the ASA 22, 1927)."""
        p, n, z = self.accuracy, self.n, 1.96
        spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (p + z * z / (2 * n) - spread) / (1 + z * z / n)


def judge(
    encode_images: Callable[[Sequence[Image.Image]], Floats],
    encode_texts: Callable[[Sequence[str]], Floats],
    n: int,
    seed: int,
) -> dict[str, Score]:
    """Each question's score over ``n`` fresh scenes, all of pairs that training never shows.

    The encoders give (N, D) embeddings of unit length. An answer is the text with the highest
    cosine among all of its question's: 64 for colour and shape.
    """
    dice = Random(f"judge {seed}")
    shown = [sample(dice, held_out=True) for _ in range(n)]
    embedded = np.concatenate(
        [
            encode_images([render(scene, SIDE) for scene in shown[start : start + CHUNK]])
            for start in range(0, n, CHUNK)
        ]
    )
    scores = {}
    for question in QUESTIONS:
        best = (embedded @ encode_texts(question.texts).T).argmax(axis=1)
        right = sum(
            question.truth(scene) == question.answers[i]
            for scene, i in zip(shown, best, strict=True)
        )
        scores[question.name] = Score(right, n)
    return scores
