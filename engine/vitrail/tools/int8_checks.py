"""The checks of ``vitrail verify`` on a folder of int8 weights.

The checkpoint that the folder was made from tells how accurate int8 is. Without it, integer sums,
codes and the record can still be checked.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from vitrail.errors import InputError, show_path
from vitrail.int8.calibration import stacked
from vitrail.int8.guard import (
    accuracy_lines,
    integrity_faults,
    integrity_text,
    judge,
    linears_text,
)
from vitrail.int8.integrity import check_integrity
from vitrail.int8.measure import Comparison
from vitrail.int8.record import Int8Record
from vitrail.model.loading import LoadedCheckpoint, read_model
from vitrail.model.model import Model
from vitrail.runtime import RUNNERS
from vitrail.runtime.torch_runner import TorchRunner
from vitrail.runtime.towers import VisionTower
from vitrail.tools.pictures import pixel_digest
from vitrail.tools.pixels import Pixels
from vitrail.tools.report import Check, Verdict

BATCH = 8
"""So many pictures are compared at once."""
VERDICTS: dict[str, Verdict] = {"good": "pass", "refused": "fail"}
"""The verdict on the check of accuracy; any other of the guard's is a note."""


def check_int8(
    model: Model,
    pixels: Sequence[Pixels],
    against: str | os.PathLike[str] | None,
    *,
    own: bool,
) -> Iterator[Check]:
    """Checks ``model``, a folder of int8 weights, on ``pixels`` (C, H, W) of each picture.

    ``against``: the checkpoint that the folder was made from; None if it is not at hand. ``own``:
    the pictures are the user's. Raises InputError if ``against`` is another checkpoint.
    """
    loaded = read_model(model.folder, model.dtype, local_files_only=True)
    record = loaded.int8
    assert record is not None, "the model is int8"
    assert loaded.spec.vision is not None, "an int8 model has an image tower"
    yield _check_record(record)
    pictures = _distinct(map(torch.from_numpy, pixels))
    runner = RUNNERS[model.backend](loaded.weights, model.dtype, model.device)
    tower = VisionTower(loaded.spec.vision, loaded.spec.head, runner)
    batches = list(stacked(pictures, lambda _: BATCH))
    if against is None:
        exact = check_integrity(tower, batches[0])
        faults = list(integrity_faults(exact, {}))
        text = "; ".join(faults) or integrity_text(exact)
        yield Check("integrity", "fail" if faults else "pass", text, exact.to_dict())
        hint = f"not compared: with --against give {record.source.name}, which it was made from"
        yield Check("accuracy", "note", hint)
        return
    if len(pictures) < 2:
        actual = f"{len(pixels)} pictures, all of them equal" if len(pixels) > 1 else "1 picture"
        raise InputError(f"verify: got {actual}, wanted at least 2 with --against")
    source = read_model(against, model.dtype)
    _check_source(source, loaded)
    assert source.spec.vision is not None, "the spec is that of the int8 model"
    reference = TorchRunner(source.weights, model.dtype, model.device)
    comparison = Comparison(VisionTower(source.spec.vision, source.spec.head, reference), batches)
    measurement = comparison.measure(tower)
    figures, exact, linears = measurement
    faults = list(integrity_faults(exact, linears))
    text = "; ".join((*faults, integrity_text(exact), linears_text(linears)))
    facts = exact.to_dict() | {"linears": {n: linears[n].to_dict() for n in linears}}
    yield Check("integrity", "fail" if faults else "pass", text, facts)
    verdict, reasons = judge(measurement, own=own)
    lines = (f"{topic} {text}" for topic, text in accuracy_lines(figures, own))
    text = "; ".join((verdict, *reasons, *lines))
    facts = figures.to_dict() | {"verdict": verdict, "reasons": list(reasons)}
    yield Check("accuracy", VERDICTS.get(verdict, "note"), text, facts)


def _distinct(images: Iterable[Tensor]) -> list[Tensor]:
    """The pictures without copies, which are neighbors of each other whatever int8 does."""
    return list({pixel_digest([image]): image for image in images}.values())


def _check_record(record: Int8Record) -> Check:
    """What int8.json says: calibration, verdict, fallbacks. The loader has compared its hash."""
    guard = record.guard
    fallen = f"; back in 16 bits: {', '.join(guard.fallbacks)}" if guard.fallbacks else ""
    text = (
        f"the tensors are those of int8.json, calibrated on {record.calibration.pictures} pictures "
        f"({record.calibration.origin}); when it was made: {guard.verdict}{fallen}"
    )
    facts = {"verdict": guard.verdict, "fallbacks": dict(guard.fallbacks)}
    return Check("record", "pass", text, facts)


def _check_source(source: LoadedCheckpoint, loaded: LoadedCheckpoint) -> None:
    """Refuse a checkpoint that the int8 folder was not made from."""
    record = loaded.int8
    assert record is not None, "the folder has a record"
    name, folder = show_path(source.checkpoint.folder), show_path(loaded.checkpoint.folder)
    wanted = f"{record.source.name}, which {folder} was made from"
    if source.spec.int8:
        raise InputError(f"against: got {name}, whose weights are int8, wanted {wanted}")
    if source.hash_weights() != record.source.weights:
        raise InputError(f"against: got {name} with other weights, wanted {wanted}")
    if source.spec != loaded.spec.with_int8(()):
        raise InputError(f"against: got {name} with another configuration, wanted {wanted}")
