"""The operators ``vitrail::embed_image`` and ``vitrail::embed_text``, and the towers they run.

An operator names its model by the fingerprint, so that a program that torch.export, torch.jit or
torch.compile has saved runs that model in any process, or refuses. ``import vitrail`` registers the
operators (`vitrail.torch_import`). This module imports no more of Vitrail than its errors.
"""

import math
import weakref
from typing import Protocol

import torch
from torch import Tensor

from vitrail.errors import CheckpointError, VitrailError


class LiveTowers(Protocol):
    """The towers of a model, with its weights on ``device``. ``source``: see `embed_image`."""

    fingerprint: str
    source: str
    device: torch.device
    memory_limit: int | None

    def embed_image(self, pixels: Tensor) -> Tensor: ...

    def embed_text(self, ids: Tensor) -> Tensor: ...


class LiveModel(Protocol):
    """A loaded model. ``towers`` computes the fingerprint, and calls `add_towers`."""

    @property
    def towers(self) -> LiveTowers: ...


# Weak references alone: a model or a module keeps its weights, a saved program does not. Sets are
# changed and copied by single calls, which need no lock that a fork could copy while it is held. A
# copy is safe even if the garbage collector drops models meanwhile; an iteration would not be.
_MODELS: set[weakref.ref[LiveModel]] = set()
_TOWERS: dict[tuple[str, torch.device], set[weakref.ref[LiveTowers]]] = {}


def add_model(model: LiveModel) -> None:
    """Let operators find ``model``. Its fingerprint is computed when one looks for it."""
    _MODELS.add(weakref.ref(model, _MODELS.discard))


def add_towers(towers: LiveTowers) -> None:
    """Let operators find ``towers`` by their fingerprint, as long as something keeps them."""
    references = _TOWERS.setdefault((towers.fingerprint, towers.device), set())
    references.add(weakref.ref(towers, references.discard))


def live_towers(fingerprint: str, device: torch.device) -> list[LiveTowers]:
    """All towers with this fingerprint on this device, of modules and of models."""
    references = _TOWERS.get((fingerprint, device), set()).copy()
    return [towers for reference in references if (towers := reference()) is not None]


def _choose(fingerprint: str, device: torch.device, source: str) -> LiveTowers | None:
    """Of several towers, those that the call ``source`` loaded, else the smallest memory limit.

    With PyTorch's operators on a CPU bits depend on the batch, which a memory limit cuts.
    """
    live = live_towers(fingerprint, device)
    alike = [towers for towers in live if towers.source == source]
    return min(alike or live, key=lambda towers: towers.memory_limit or math.inf, default=None)


@torch.library.custom_op("vitrail::embed_image", mutates_args=())
def embed_image(pixels: Tensor, fingerprint: str, source: str, width: int) -> Tensor:
    """Embeddings (B, ``width``) fp32 of pixels; NaN in the rows of items that are not finite.

    ``source``: the call that loads the model, with ``{device}`` for the device. Errors name it, and
    of several models with the fingerprint, one that was loaded by this call computes.
    """
    return _find("image", pixels, fingerprint, source).embed_image(pixels)


@torch.library.custom_op("vitrail::embed_text", mutates_args=())
def embed_text(ids: Tensor, fingerprint: str, source: str, width: int) -> Tensor:
    """The same for token ids (B, T)."""
    return _find("text", ids, fingerprint, source).embed_text(ids)


@embed_image.register_fake
@embed_text.register_fake
def _shape(items: Tensor, fingerprint: str, source: str, width: int) -> Tensor:
    return items.new_empty((items.shape[0], width), dtype=torch.float32)


def _find(tower: str, items: Tensor, fingerprint: str, source: str) -> LiveTowers:
    """Raises CheckpointError if no live model has this fingerprint on the device of ``items``."""
    device = items.device
    towers = _choose(fingerprint, device, source)
    if towers is not None:
        return towers
    models = [model for reference in _MODELS.copy() if (model := reference()) is not None]
    loaded = []
    for model in models:
        try:
            model.towers  # noqa: B018  its fingerprint is known from now on
        except VitrailError as error:
            loaded.append(f"a model whose fingerprint cannot be computed: {error}")
    towers = _choose(fingerprint, device, source)
    if towers is not None:
        return towers
    for (digits, _), references in _TOWERS.copy().items():
        for live in (reference() for reference in references.copy()):
            if live is not None:
                loaded.append(f"{digits}, by {_call(live.source, live.device)}")
    raise CheckpointError(
        f"{tower} tower of the model {fingerprint}: this model is not loaded on {device} (loaded: "
        f"{'; '.join(loaded) or 'no model'}); load it first, and keep it: "
        f"model = {_call(source, device)}"
    )


def _call(source: str, device: torch.device) -> str:
    return source.replace("{device}", str(device))
