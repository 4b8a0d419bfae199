"""Vitrail: ViT, CLIP and DINOv2 checkpoints to embeddings, class scores and features.

``vitrail.load(folder_or_hub_id)`` gives a `Model`. Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vitrail._version import __version__
from vitrail.errors import CheckpointError, ImageError, InputError, VitrailError

if TYPE_CHECKING:
    from vitrail.manifest import Embeddings, read_embeddings
    from vitrail.model import Model, load
    from vitrail.outputs import Classification, EncodeResult, Output

_LAZY = {
    "Embeddings": "vitrail.manifest",
    "load": "vitrail.model",
    "read_embeddings": "vitrail.manifest",
    "Model": "vitrail.model",
    "Classification": "vitrail.outputs",
    "EncodeResult": "vitrail.outputs",
    "Output": "vitrail.outputs",
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
    "VitrailError",
    "__version__",
    "load",
    "read_embeddings",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'vitrail' has no attribute {name!r}")
