"""Captions of rendered scenes, to train the bundled CLIP."""

from __future__ import annotations

from random import Random

from vitrail.demo.scenes import FIELDS, Scene

PREFIXES = ("", "", "", "a picture of ", "a photo of ")

Claims = tuple[str | None, ...]
"""The attributes that a text names, in the order of ``FIELDS``; None: the text leaves it out."""


def caption(dice: Random, scene: Scene, keep: float = 0.7) -> tuple[str, Claims]:
    """A text that is true of the scene, and the claims that it makes.

    It claims each named attribute with probability ``keep``, and at least one.
    """
    named = [field for field in FIELDS if getattr(scene, field) is not None]
    chosen = [field for field in named if dice.random() < keep] or [dice.choice(named)]
    claims = tuple(getattr(scene, field) if field in chosen else None for field in FIELDS)
    return words(dice, claims), claims


def words(dice: Random, claims: Claims) -> str:
    """A text that makes the claims, such as "a photo of two small red stars on the left"."""
    shape, color, count, position, size, background = claims
    noun = " ".join(word for word in (size, color, shape or "thing") if word)
    if count == "one":
        noun = f"{dice.choice(('a', 'one'))} {noun}"
    elif count:
        noun = f"{count} {noun}{'es' if noun.endswith('s') else 's'}"
    phrases = (noun, position, f"on a {background} background" if background else None)
    text = " ".join(phrase for phrase in phrases if phrase)
    return f"{dice.choice(PREFIXES)}{text}"
