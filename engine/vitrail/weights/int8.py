"""Packs int8 linears: stored codes and scales, and the corrections that follow from them."""

import torch
from torch import Tensor

from vitrail.errors import CheckpointError
from vitrail.spec import BlockSpec
from vitrail.weights.loader import WeightLoader
from vitrail_kernels.ops.linear_int8 import OFFSET, group_columns, is_unsigned
from vitrail_kernels.ops.linear_int8_grouped import FLOAT_OF_INTEGER


def pack_int8(load: WeightLoader, linear: str) -> None:
    """Pack a linear after a LayerNorm. Rows that pad the outputs are zero."""
    _pack_codes(load, linear)
    stored = load.read(f"{linear}.folded_bias")
    load.packed[f"{linear}.bias"].zero_()[: len(stored)] = stored
    smooth = load.packed[f"{linear}.smooth"]
    smooth.copy_(load.read(f"{linear}.smooth"))
    _check_positive(load, f"{linear}.smooth", smooth)


def pack_int8_down(load: WeightLoader, spec: BlockSpec, linear: str) -> None:
    """Pack a down projection. Columns that pad its inputs are zero.

    If the inputs are unsigned, they are (q + 128) s - OFFSET for a code q and its scale s. Then
    ``shift`` adds 128 times the sum of each group of weights, and the bias takes OFFSET times the
    sum of all weights of a row.
    """
    codes = _pack_codes(load, linear).double()
    columns = group_columns(spec.gated)
    group_sums = codes.view(len(codes), -1, columns).sum(dim=2)
    unsigned = is_unsigned(spec.activation, spec.gated)
    shift = FLOAT_OF_INTEGER - 128 * group_sums.t() * unsigned
    load.packed[f"{linear}.shift"].copy_(shift)
    row_sums = group_sums.sum(dim=1) * load.packed[f"{linear}.weight_scale"].double()
    bias = load.read(f"{linear}.bias").double()
    load.packed[f"{linear}.bias"].copy_(bias - OFFSET * row_sums * unsigned)


def _pack_codes(load: WeightLoader, linear: str) -> Tensor:
    """Pack the codes and scales of a linear; returns the packed codes."""
    name = f"{linear}.codes"
    rows, columns = load.shapes[name]
    codes, scale = load.packed[name].zero_(), load.packed[f"{linear}.weight_scale"].zero_()
    stored = load.read_codes(name)
    if int(stored.min()) < -127:
        raise CheckpointError(f"{load.locate(name)}: got the code -128, wanted -127 to 127")
    codes[:rows, :columns] = stored
    scale[:rows] = load.read(f"{linear}.scale")
    _check_positive(load, f"{linear}.scale", scale[:rows])
    return codes


def _check_positive(load: WeightLoader, name: str, values: Tensor) -> None:
    smallest = values.min().item()
    if not smallest > 0:
        location = load.locate(name)
        raise CheckpointError(f"{location}: got {smallest:.4g}, wanted numbers over 0")
    # a scale that is subnormal, or nearly so, loses its bits when it is multiplied
    if smallest < torch.finfo(torch.float32).tiny:
        raise CheckpointError(f"{load.locate(name)}: got {smallest:.4g}, wanted normal numbers")
