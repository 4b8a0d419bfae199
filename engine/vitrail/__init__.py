"""Vitrail: ViT, DeiT, CLIP and DINOv2 checkpoints to embeddings, class scores and features.

``vitrail.load(folder_or_hub_id)`` gives a `Model`. Nothing heavy is imported before it is needed.
"""

from typing import TYPE_CHECKING, Any

from vitrail import fork as fork  # from here on forks are noticed
from vitrail._version import __version__
from vitrail.errors import CheckpointError, ImageError, InputError, VitrailError
from vitrail.torch_import import import_after_torch

if TYPE_CHECKING:
    from vitrail.jobs.manifest import Embeddings, read_embeddings
    from vitrail.model.loading import load, load_replicas
    from vitrail.model.model import Model
    from vitrail.model.outputs import Classification, EncodeResult, Output, PreprocessResult
    from vitrail.model.preprocessor import Preprocessor
    from vitrail.model.replicas import Replicas

_LAZY = {
    "Embeddings": "vitrail.jobs.manifest",
    "load": "vitrail.model.loading",
    "load_replicas": "vitrail.model.loading",
    "read_embeddings": "vitrail.jobs.manifest",
    "Model": "vitrail.model.model",
    "Classification": "vitrail.model.outputs",
    "EncodeResult": "vitrail.model.outputs",
    "Output": "vitrail.model.outputs",
    "PreprocessResult": "vitrail.model.outputs",
    "Preprocessor": "vitrail.model.preprocessor",
    "Replicas": "vitrail.model.replicas",
}

__all__ = [
    "CheckpointError",
    "Classification",
    "Embeddings",
    "EncodeResult",
    "ImageError",
    "InputError",
    "Model",
    "Output",
    "PreprocessResult",
    "Preprocessor",
    "Replicas",
    "VitrailError",
    "__version__",
    "load",
    "load_replicas",
    "read_embeddings",
]

import_after_torch("vitrail.tower_operators")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'vitrail' has no attribute {name!r}")
