"""The fingerprint of a model: a hash of everything that its results depend on."""

import hashlib
import json

import torch

from vitrail.checkpoint.contents import TOKENIZER_FILES
from vitrail.checkpoint.files import Checkpoint
from vitrail.image.decoding import SixteenBit
from vitrail.spec import ModelSpec


def fingerprint(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    weights: str,
    dtype: torch.dtype,
    runner: str,
    version: str,
    sixteen_bit: SixteenBit = "scale",
) -> str:
    """See `Model.fingerprint`.

    ``weights``: their hash; ``runner``, ``version``: `Runner.identity` and `Runner.version`. An
    exported folder keeps its fingerprint in later versions of Vitrail, so another formula needs
    another `vitrail.plan.record.PLAN_GRAMMAR`.
    """
    tokenizer = {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name in TOKENIZER_FILES
        if spec.text is not None and (path := checkpoint.file(name)) is not None
    }
    content = {
        "weights": weights,
        "spec": spec.to_dict(),
        "tokenizer": tokenizer,
        "sixteen_bit": sixteen_bit,
        "dtype": str(dtype),
        "runner": runner,
        "version": version,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
