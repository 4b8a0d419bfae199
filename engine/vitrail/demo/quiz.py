"""Asks a model about rendered scenes: multiple-choice questions, and the scores of its answers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from random import Random

import numpy as np
import numpy.typing as npt
from PIL import Image

from vitrail.demo.scenes import VALUES, Scene, render, sample

Floats = npt.NDArray[np.float32]

PAIRS = tuple((color, shape) for color in VALUES["color"] for shape in VALUES["shape"])
SIDE = 192  # pixels of a rendered scene's sides; the model's preprocessing makes it smaller
CHUNK = 256  # scenes rendered at once


@dataclass(frozen=True, slots=True)
class Question:
    """``texts[i]`` describes a scene whose answer is ``answers[i]``; ``truth`` gives a scene's."""

    name: str
    texts: tuple[str, ...]
    answers: tuple[object, ...]
    truth: Callable[[Scene], object]


def _question(field: str, text: Callable[[str], str]) -> Question:
    return Question(field, tuple(map(text, VALUES[field])), VALUES[field], attrgetter(field))


QUESTIONS = (
    Question("color and shape", tuple(map(" ".join, PAIRS)), PAIRS, attrgetter("color", "shape")),
    _question("count", lambda count: "one thing" if count == "one" else f"{count} things"),
    _question("position", lambda position: f"thing {position}"),
    _question("size", lambda size: f"{size} thing"),
    _question("background", lambda color: f"thing on a {color} background"),
)


@dataclass(frozen=True, slots=True)
class Score:
    """``correct`` answers of ``n``."""

    correct: int
    n: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.n

    @property
    def lower_bound(self) -> float:
        """Lower end of the accuracy's 95 % interval (Wilson, Journal of the ASA 22, 1927)."""
        p, n, z = self.accuracy, self.n, 1.96
        spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (p + z * z / (2 * n) - spread) / (1 + z * z / n)


def judge(
    encode_images: Callable[[Sequence[Image.Image]], Floats],
    encode_texts: Callable[[Sequence[str]], Floats],
    n: int,
    seed: int,
) -> dict[str, Score]:
    """Each question's score over ``n`` random scenes with color-shape pairs not seen in training.

    The encoders give (N, D) embeddings of unit length. The model's answer is the text of the
    question (for example, one of 64 for color and shape) with the highest cosine.
    """
    dice = Random(f"judge {seed}")
    scenes = [sample(dice, held_out=True) for _ in range(n)]
    embedded = np.concatenate(
        [
            encode_images([render(scene, SIDE) for scene in scenes[start : start + CHUNK]])
            for start in range(0, n, CHUNK)
        ]
    )
    scores = {}
    for question in QUESTIONS:
        best = (embedded @ encode_texts(question.texts).T).argmax(axis=1)
        correct = sum(
            question.truth(scene) == question.answers[i]
            for scene, i in zip(scenes, best, strict=True)
        )
        scores[question.name] = Score(correct, n)
    return scores
