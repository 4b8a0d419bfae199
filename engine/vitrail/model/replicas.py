"""`Replicas`: a model on several devices, each call spread over them."""

from collections.abc import Sequence
from typing import Any, Self

import torch

from vitrail.model.encoding import EncodingCalls
from vitrail.model.model import Model
from vitrail.model.spreading import Crew, SpreadImages, SpreadTexts
from vitrail.model.texts import LabelCache

BATCH_INVARIANT = ("native", "triton")
"""The backends that give an item the same bits in any batch."""


class Replicas(EncodingCalls):
    """A checkpoint on several devices. Any number of threads may call it at once.

    `encode_image`, `encode_text` and `classify` spread their items over the devices, in the order
    of the input and with the bits of one model. Each device takes the next items when it is free.
    On the backend "torch", bits depend on the batch: there a device takes a whole batch of one
    model, so a call needs more batches than one (a smaller ``batch_size``) to be spread.

    An error of a device names the replica. Other errors are those of one model.

    Pickled as a `Model` is: by the arguments that load it again and the fingerprint.

    Attributes: ``models`` (one `Model` for each device), ``devices``, ``device`` (the first);
    ``spec``, ``source``, ``dtype``, ``precision``, ``backend`` and ``memory_limit`` (of each
    replica) as those of a `Model`.
    """

    def __init__(self, models: Sequence[Model]) -> None:
        """Users call `vitrail.load_replicas`. ``models``: of one checkpoint, at least one."""
        self.models = tuple(models)
        first = self.models[0]
        self.devices: tuple[torch.device, ...] = tuple(model.device for model in models)
        self.device = first.device
        self.spec, self.source, self.precision = first.spec, first.source, first.precision
        self.dtype, self.backend = first.dtype, first.backend
        self.memory_limit = first.memory_limit
        crew = Crew([f"replica {number} on {device}" for number, device in enumerate(self.devices)])
        any_batch = first.backend in BATCH_INVARIANT
        self._images, self._texts, self._labels = None, None, None
        images = [model._images for model in models if model._images is not None]
        texts = [model._texts for model in models if model._texts is not None]
        if images:
            self._images = SpreadImages(images, crew, any_batch)
        if texts:
            self._texts = SpreadTexts(texts, crew, any_batch)
            self._labels = LabelCache(self._texts)
        self._logit_scale = first._logit_scale

    @property
    def held_bytes(self) -> int:
        """The sum of `Model.held_bytes` of all replicas."""
        return sum(model.held_bytes for model in self.models)

    def trim(self) -> int:
        """`Model.trim` of every replica; returns the bytes on all devices."""
        gpus = {device for device in self.devices if device.type == "cuda"}
        # each trim frees PyTorch's unused memory on all GPUs, so only the first would count it
        before = sum(torch.cuda.memory_reserved(gpu) for gpu in gpus)
        freed = sum(model.trim() for model in self.models)
        after = sum(torch.cuda.memory_reserved(gpu) for gpu in gpus)
        return max(0, before - after) if gpus else freed

    @property
    def fingerprint(self) -> str:
        """The fingerprint of each model; see `Model.fingerprint`."""
        return self.models[0].fingerprint

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # nothing about replicas can change

    def __reduce__(self) -> tuple[Any, ...]:
        """As `Model.__reduce__`; unpickling loads the checkpoint once for all devices."""
        from vitrail.model import pickled

        first, devices = self.models[0], [str(device) for device in self.devices]
        state = pickled.state(first.load_arguments, first.fingerprint_content)
        return pickled.load_replicas, (*state, devices)

    def __len__(self) -> int:
        return len(self.models)

    def __repr__(self) -> str:
        devices = ", ".join(map(str, self.devices))
        return (
            f"<vitrail.Replicas {self.spec.architecture} from {str(self.source)!r}: "
            f"{self.spec.parameters / 1e6:.1f} M parameters, {self.precision} on {devices}, "
            f"{self.backend} backend>"
        )
