"""Runs calibration images block by block, and measures the inputs of the linears of a block.

Between blocks only the residual streams of the images are in memory, and within a block its moments
and the activations of one batch. Everything is computed in fp32, from the weights of a model in
fp32: the blocks before do not use their codes, so that the codes of a block depend on no other.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.errors import InputError
from vitrail.plan.plan import Step
from vitrail.plan.vision import vision_dense
from vitrail.runtime.memory import activations
from vitrail.runtime.torch_runner import TorchRunner
from vitrail.spec import VisionSpec
from vitrail.torch_modes import default_modes
from vitrail.weights.layout import Weights

BATCH_TOKENS = 4096
"""About as many tokens are computed at once."""
DTYPES = {"compute": torch.float32, "float32": torch.float32}
"""Of the plan's buffers."""


class Moments:
    """Of the inputs (M, K) of a linear: ``top`` (K,) fp32, the largest magnitude of each column;
    ``hessian`` (K, K) fp64, the sum of x^T x, or None if it is not needed."""

    def __init__(self, columns: int, *, hessian: bool) -> None:
        self.top = torch.zeros(columns, device="cpu")
        self.hessian: Tensor | None = None
        if hessian:
            self.hessian = torch.zeros(columns, columns, dtype=torch.float64, device="cpu")

    def add(self, x: Tensor) -> None:
        """Add the rows of ``x`` (M, K) fp32."""
        torch.maximum(self.top, x.abs().amax(dim=0), out=self.top)
        if self.hessian is not None:
            self.hessian += x.t() @ x


class Calibration:
    """The residual streams of calibration images, which advance a block at a time.

    ``weights``: of a model without int8 linears, in fp32 on the CPU. ``pixels``: uint8
    (H, W, channels) of each image; images of one size in a row are computed together.
    """

    def __init__(self, spec: VisionSpec, weights: Weights, pixels: Iterable[Tensor]) -> None:
        self.spec, self.layer = spec, 0
        self._runner = TorchRunner(weights, torch.float32, torch.device("cpu"))
        self._plan = vision_dense(spec, uint8=True)
        self._arena = torch.empty(0, dtype=torch.uint8, device="cpu")
        batches = list(batched(spec, pixels))
        if not batches:
            raise InputError("calibration: got no images, wanted at least one")
        first = next(i for i, step in enumerate(self._plan.steps) if ".blocks." in step.label)
        self._shapes = [batch.shape for batch in batches]
        self._streams = [self._embed(batch, self._plan.steps[:first]) for batch in batches]

    @property
    def tokens(self) -> int:
        """How many tokens the images have in all."""
        return sum(len(stream) for stream in self._streams)

    def advance(
        self, measured: Collection[str] = (), *, hessian: bool = True
    ) -> dict[str, Moments]:
        """Compute the next block. Returns the moments of the inputs of each linear that is
        ``measured``, of "qkv", "up" and "down"."""
        prefix = f"vision.blocks.{self.layer}."
        steps = [step for step in self._plan.steps if step.label.startswith(prefix)]
        moments: dict[str, Moments] = {}
        with default_modes():
            for shape, stream in zip(self._shapes, self._streams, strict=True):
                tensors = self._tensors(shape) | {"vision.stream.0": stream}
                for step in steps:
                    linear = step.label.removeprefix(prefix)
                    if linear in measured:
                        x = self._input(step, tensors)
                        if linear not in moments:
                            moments[linear] = Moments(x.shape[1], hessian=hessian)
                        moments[linear].add(x)
                    self._runner.run_steps(
                        [step], tensors, self.spec.tokens_at((shape[1], shape[2]))
                    )
        self.layer += 1
        return moments

    def _input(self, step: Step, tensors: Mapping[str, Tensor]) -> Tensor:
        """The rows that the weight of ``step`` multiplies: normalized, if the step does that."""
        x, eps = tensors[dict(step.buffers)["x"]], dict(step.scalars).get("norm_eps")
        return x if eps is None else F.layer_norm(x, x.shape[1:], eps=eps)

    def _embed(self, pixels: Tensor, steps: Sequence[Step]) -> Tensor:
        """The residual stream (M, C) before the first block."""
        spec, size = self.spec, pixels.shape[1:3]
        table = self._runner.position_table(spec, spec.grid_at((size[0], size[1])), "uint8")
        tensors = self._tensors(pixels.shape) | {"pixels": pixels, "table": table}
        with default_modes():
            self._runner.run_steps(steps, tensors, spec.tokens_at((size[0], size[1])))
        return tensors["vision.stream.0"].clone()

    def _tensors(self, shape: Sequence[int]) -> dict[str, Tensor]:
        """The buffers of the plan for pixels (B, H, W, channels), not yet written."""
        batch, length = shape[0], self.spec.tokens_at((shape[1], shape[2]))
        sizes = self._plan.slot_bytes(batch, batch * length, torch.float32.itemsize)
        if self._arena.numel() < sum(sizes):
            self._arena = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu")
        tensors = activations(self._plan, sizes, self._arena, batch, batch * length, DTYPES)
        tensors["cu_seqlens"] = torch.arange(batch + 1, dtype=torch.int32, device="cpu") * length
        tensors |= {  # the last block may write to an output of the plan, which has no slot
            buffer.name: torch.empty(buffer.shape(batch, batch * length), device="cpu")
            for buffer in self._plan.buffers
            if buffer.name in self._plan.token_outputs
        }
        return tensors


def batched(spec: VisionSpec, pixels: Iterable[Tensor]) -> Iterator[Tensor]:
    """uint8 (B, H, W, channels): images of one size in a row, of about `BATCH_TOKENS` tokens."""

    def most(image: Tensor) -> int:
        return -(-BATCH_TOKENS // spec.tokens_at((image.shape[0], image.shape[1])))

    return stacked(pixels, most)


def stacked(images: Iterable[Tensor], most: Callable[[Tensor], int]) -> Iterator[Tensor]:
    """Batches of images of one shape in a row, at most as many as ``most`` says for an image."""
    waiting: list[Tensor] = []
    for image in images:
        if waiting and (len(waiting) >= most(image) or waiting[0].shape != image.shape):
            yield torch.stack(waiting)
            waiting = []
        waiting.append(image)
    if waiting:
        yield torch.stack(waiting)
