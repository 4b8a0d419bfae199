"""Bytes that PyTorch's operators allocate within a step, found on tensors without memory."""

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitrail.dtypes import dtype_name
from vitrail.plan.plan import Plan
from vitrail_kernels import OPERATORS

STATISTICS = {"stats", "x_stats", "row_sums"}
"""Arguments that only kernels need: a reference computes LayerNorm from the row itself."""
MANY = 1024


def workspace_bytes(plan: Plan, batch: int, longest: int, dtype: torch.dtype) -> int:
    """An upper bound of the temporaries that the references of ``plan`` allocate at once, for
    ``batch`` sequences of ``longest`` tokens or fewer.

    The largest step decides, and each step's bytes are affine in the batch: so they are convex, and
    lie below the line through two batches.
    """
    if batch <= 1:
        return _largest_step(plan, 1, longest, dtype)
    one = _largest_step(plan, 1, longest, dtype)
    slope = -(-(_largest_step(plan, MANY, longest, dtype) - one) // (MANY - 1))
    return one + slope * (batch - 1)


# a plan is hashed by its steps: that is nothing beside the search it saves
@functools.lru_cache(maxsize=1024)
def _largest_step(plan: Plan, batch: int, longest: int, dtype: torch.dtype) -> int:
    largest = 0
    inputs = _pixels(plan, batch, longest)
    for step, tensors, scalars in plan.bind([longest] * batch, dtype_name(dtype), inputs):
        arguments = {name: t for name, t in tensors.items() if name not in STATISTICS}
        with _Attention(), LiveBytes("meta") as live:
            OPERATORS[step.op].reference(**arguments, **scalars)
        largest = max(largest, live.peak + _padding(step.op, scalars, arguments))
    return largest


def _padding(op: str, scalars: Mapping[str, Any], arguments: Mapping[str, Tensor]) -> int:
    """What attention allocates for texts of different lengths besides: they are padded first."""
    if op != "attention" or not scalars["causal"]:
        return 0
    qkv, out = arguments["qkv"], arguments["out"]
    return int(qkv.nbytes + 2 * out.nbytes + 6 * 8 * qkv.shape[0])


def _pixels(plan: Plan, batch: int, longest: int) -> dict[str, Tensor]:
    """Pixels in a shape of their own that make ``longest`` tokens, a row of patches each."""
    for step in plan.steps:
        if step.op == "patch_embed":
            scalars = dict(step.scalars)
            rows, columns = scalars["patch"]
            channels, width = scalars["channels"], columns * (longest - scalars["prefix"])
            uint8 = any(b.name == "pixels" and b.dtype == "uint8" for b in plan.buffers)
            shape = (batch, rows, width, channels) if uint8 else (batch, channels, rows, width)
            dtype = torch.uint8 if uint8 else torch.float32
            return {"pixels": torch.empty(shape, dtype=dtype, device="meta")}
    return {}


class _Attention(TorchFunctionMode):
    """PyTorch's attention allocates no scores on the devices that compute; on "meta" it would."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            query = args[0]
            sums = query.new_empty(query.shape[:3], dtype=torch.float32)  # of each row of scores
            out = torch.empty_like(query, memory_format=torch.contiguous_format)
            del sums
            return out
        return func(*args, **(kwargs or {}))


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # of torch
    """Counts the bytes of the tensors that operators allocate on devices of ``kind``: ``now``, and
    at most (``peak``)."""

    def __init__(self, kind: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.now = self.peak = 0
        self._kind = kind
        self._live = set[int]()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            address = storage._cdata
            new = address not in given and address not in self._live
            if new and tensor.device.type == self._kind:
                self._live.add(address)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, address, storage.nbytes())
        return result

    def _freed(self, address: int, nbytes: int) -> None:
        self._live.discard(address)
        self.now -= nbytes


def _tensors(values: object) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]
