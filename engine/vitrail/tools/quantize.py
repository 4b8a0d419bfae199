"""`vitrail quantize`: a checkpoint -> a folder whose image tower has int8 weights.

The blocks are quantized one after the other (`vitrail.int8`), and the finished ones are kept beside
the output until it is written. The guard then compares the model with the one it was made from, on
pictures that did not calibrate, and decides which linears stay in int8.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from vitrail._version import __version__
from vitrail.checkpoint.contents import INT8
from vitrail.checkpoint.files import Checkpoint, open_checkpoint
from vitrail.checkpoint.tensors import Source
from vitrail.durable import writing
from vitrail.errors import CheckpointError, InputError
from vitrail.image.normalize import linear_scale
from vitrail.int8 import guard
from vitrail.int8.blocks import quantize_block
from vitrail.int8.calibration import Calibration, batched
from vitrail.int8.folder import write_folder
from vitrail.int8.guard import GuardReport, Measurement
from vitrail.int8.measure import Comparison
from vitrail.int8.partial import PartialFolder
from vitrail.int8.recipe import Recipe, float_linears, int8_linears
from vitrail.int8.record import CalibrationRecord, Int8Record, Quantized
from vitrail.jobs.listing import Source as Picture
from vitrail.model.arguments import check_device, check_dtype
from vitrail.runtime import RUNNERS, choose
from vitrail.runtime.towers import VisionTower
from vitrail.spec import ImageSpec, ModelSpec, VisionSpec
from vitrail.tools.pictures import CALIBRATED, CHECKED, CROPS, Pictures, own_pictures, sample_pictures
from vitrail.torch_modes import default_modes
from vitrail.weights.folding import load_weights
from vitrail.weights.layout import Weights
from vitrail.weights.loader import hash_weights
from vitrail.zoo import map_tensors, read_spec
from vitrail_kernels.ops.linear_int8 import group_columns

Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Called with the number of blocks. Its context manager gives a function, which is called with the
number of blocks finished so far."""


@dataclass(frozen=True, slots=True)
class Summary:
    """The result: ``record`` is that of the written folder, or None if the guard refused, in which
    case nothing was written. ``source_bytes`` and ``bytes``: of all tensors and files."""

    folder: Path
    spec: ModelSpec
    guard: GuardReport
    float_linears: Mapping[str, str]
    pictures: Pictures
    source_bytes: int
    bytes: int
    record: Int8Record | None
