"""The stored tensors of the int8 linears of a block, from folded weights and measured inputs."""

from collections.abc import Mapping

import torch
from torch import Tensor

from vitrail.errors import VitrailError
from vitrail.int8.calibration import Moments
from vitrail.int8.gptq import round_gptq, round_nearest, row_scales
from vitrail.int8.recipe import Recipe
from vitrail.int8.smoothing import smooth_factors
from vitrail.weights.layout import Weights


def quantize_block(
    weights: Weights, layer: int, moments: Mapping[str, Moments], recipe: Recipe
) -> dict[str, Tensor]:
    """Canonical tensors (see `BlockSpec.tensor_shapes`) of the linears that ``moments`` names.

    ``weights``: of the model without int8 linears, in fp32, with gamma, beta, softmax scale and
    log2(e) folded in. Raises VitrailError if an input was not finite.
    """
    tensors: dict[str, Tensor] = {}
    for linear, inputs in moments.items():
        name = f"vision.blocks.{layer}.{linear}"
        weight, hessian = weights[f"{name}.weight"], inputs.hessian
        if not torch.isfinite(inputs.top).all():
            raise VitrailError(
                f"{name}: got inputs that are not finite on the calibration pictures, wanted a "
                "model that is finite in float32"
            )
        if linear != "down":
            smooth = smooth_factors(inputs.top, weight, recipe.alpha)
            weight = weight.double() / smooth
            if hessian is not None:
                hessian = smooth.double()[:, None] * hessian * smooth
            tensors |= {f"{name}.smooth": smooth, f"{name}.folded_bias": weights[f"{name}.bias"]}
        scale = row_scales(weight)
        if hessian is None:
            codes = round_nearest(weight, scale)
        else:
            codes = round_gptq(weight, scale, hessian)
        tensors |= {f"{name}.codes": codes, f"{name}.scale": scale}
    return tensors
