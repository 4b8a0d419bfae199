"""transformers' version of a model, the oracle of ``vitrail verify``.

This is the only module that may import transformers, and only if it is installed.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vitrail.errors import InputError

if TYPE_CHECKING:
    from vitrail.model.model import Model
    from vitrail.spec import BlockSpec, ModelSpec

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": nn.functional.silu,
    "relu": nn.functional.relu,
}


def import_transformers() -> ModuleType | None:
    """The package, told to print nothing; None if it is not installed."""
    try:
        module = importlib.import_module("transformers")
    except ImportError:
        return None
    module.utils.logging.set_verbosity_error()
    module.utils.logging.disable_progress_bar()
    return module


def load_oracle(transformers: ModuleType, model: Model) -> Any:
    """transformers' model of the same folder, in float32 on the CPU."""
    architecture = getattr(transformers, model.spec.architecture, None)
    if architecture is None:
        raise InputError(
            f"transformers {transformers.__version__} has no {model.spec.architecture}; a newer "
            "version may have it"
        )
    folder = str(model.folder)
    return architecture.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def load_processor(transformers: ModuleType, model: Model) -> Any:
    """The image processor that uses Pillow, as checkpoints were made with it."""
    version = int(transformers.__version__.split(".")[0])
    options: dict[str, Any] = {"backend": "pil"} if version >= 5 else {"use_fast": False}
    return transformers.AutoImageProcessor.from_pretrained(
        str(model.folder), local_files_only=True, **options
    )


# -- facts of the modules that embeddings may be too coarse to show --------------------------------


def spec_faults(spec: ModelSpec, oracle: Any) -> Iterator[str]:
    """Where LayerNorm eps, activations or heads of the spec differ from the oracle's modules."""
    for name, tower, attribute in (
        ("image", spec.vision, "vision_model"),
        ("text", spec.text, "text_model"),
    ):
        if tower is not None:
            module = getattr(oracle, attribute, oracle)
            yield from (f"{name} {fault}" for fault in _block_faults(tower.blocks, module))


def _block_faults(blocks: BlockSpec, module: nn.Module) -> Iterator[str]:
    eps = {m.eps for m in module.modules() if isinstance(m, nn.LayerNorm)}
    if eps != {blocks.eps}:
        yield f"LayerNorm eps: Vitrail {blocks.eps:g}, transformers {sorted(eps)}"
    x = torch.linspace(-6, 6, 121)
    expected = FORMULAS[blocks.activation](x)
    for owner in module.modules():
        for attribute in ("activation_fn", "intermediate_act_fn", "activation"):
            function: Any = getattr(owner, attribute, None)
            in_block = callable(function) and "Pooler" not in type(owner).__name__
            if in_block and not torch.allclose(function(x), expected, atol=1e-6):
                name = type(function).__name__
                yield f"activation: Vitrail {blocks.activation}, transformers {name}"
                return
    heads = {
        getattr(m, name)
        for m in module.modules()
        for name in ("num_heads", "num_attention_heads")
        if isinstance(getattr(m, name, None), int)
    }
    if heads and heads != {blocks.heads}:
        yield f"heads: Vitrail {blocks.heads}, transformers {sorted(heads)}"


# -- the embeddings that encode_image and encode_text compute, by transformers class ---------------


def image_embedding(oracle: Any, pixels: Tensor) -> Any:
    name = type(oracle).__name__
    resizable = "interpolate_pos_encoding" in inspect.signature(oracle.forward).parameters
    options = {"interpolate_pos_encoding": True} if resizable else {}
    if name == "CLIPModel":
        out = oracle.get_image_features(pixels, **options)
        return getattr(out, "pooler_output", out)
    if name.startswith("CLIP"):
        out = oracle(pixels, **options)
        return out.image_embeds if "WithProjection" in name else out.pooler_output
    return oracle.base_model(pixels, **options).last_hidden_state[:, 0]


def text_embedding(oracle: Any, ids: Tensor) -> Any:
    name = type(oracle).__name__
    if name == "CLIPModel":
        out = oracle.get_text_features(ids)
        return getattr(out, "pooler_output", out)
    out = oracle(ids)
    return out.text_embeds if "WithProjection" in name else out.pooler_output
