"""The fingerprint of a model: a hash of everything that its results depend on."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vitrail.checkpoint.contents import TOKENIZER_CONFIG, TOKENIZER_FILES
from vitrail.checkpoint.files import Checkpoint
from vitrail.image.decoding import SixteenBit
from vitrail.spec import ModelSpec
from vitrail.text.tokenizer_files import config_fields


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """``digits``: see `Model.fingerprint`.

    ``parts``: the value, or the hash, of each part of the content by name, so that two fingerprints
    can say what differs.
    """

    digits: str
    parts: Mapping[str, str]

    def differences(self, wanted: "Fingerprint") -> str:
        """The parts that differ, in words, for example "dtype (got float32, wanted float16)"."""
        names = [name for name in wanted.parts if self.parts.get(name) != wanted.parts[name]]
        return ", ".join(
            f"{name} (got {self.parts.get(name)}, wanted {wanted.parts[name]})" for name in names
        )


def fingerprint(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    weights: str,
    dtype: torch.dtype,
    runner: str,
    version: str,
    sixteen_bit: SixteenBit = "scale",
) -> Fingerprint:
    """The fingerprint of a model.

    ``weights``: their hash; ``runner``, ``version``: `Runner.identity` and `Runner.version`. An
    exported folder keeps its fingerprint in later versions of Vitrail, so another formula needs
    another `vitrail.plan.record.PLAN_GRAMMAR`.
    """
    tokenizer = {}
    if spec.text is not None:
        tokenizer = {
            name: hashlib.sha256(path.read_bytes()).hexdigest()
            for name in TOKENIZER_FILES
            if (path := checkpoint.file(name)) is not None
        }
        tokenizer[TOKENIZER_CONFIG] = _hash(config_fields(checkpoint))
    content = {
        "weights": weights,
        "spec": spec.to_dict(),
        "tokenizer": tokenizer,
        "sixteen_bit": sixteen_bit,
        "dtype": str(dtype),
        "runner": runner,
        "version": version,
    }
    parts = {
        "backend" if name == "runner" else name: part if isinstance(part, str) else _hash(part)
        for name, part in content.items()
    }
    return Fingerprint(_hash(content), parts)


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
