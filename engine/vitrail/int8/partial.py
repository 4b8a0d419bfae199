"""FOLDER.partial: the finished blocks of a quantization, which the same command takes up again.

A file of tensors for each block, and ``partial.json``, the digest of all that the blocks depend on.
Blocks of another digest are deleted.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from vitrail.checkpoint.header import read_header
from vitrail.checkpoint.tensors import Source
from vitrail.durable import put_file, writing
from vitrail.errors import InputError

KEY = "partial.json"


class PartialFolder:
    """The partial folder of the output ``folder``. ``key``: plain values that blocks depend on.

    Raises InputError if another folder has its name, or if it cannot be written.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.path = folder.with_name(f"{folder.name}.partial")
        text = json.dumps(key, sort_keys=True).encode()
        content = json.dumps({"digest": hashlib.sha256(text).hexdigest()}).encode()
        with writing(self.path):
            if self.path.exists() and any(self.path.iterdir()):
                if not (self.path / KEY).is_file():
                    raise InputError(
                        f"{self.path}: got a folder without {KEY}, wanted nothing there, or the "
                        "folder of an earlier vitrail quantize: move it away"
                    )
                if (self.path / KEY).read_bytes() != content:
                    shutil.rmtree(self.path)
            self.path.mkdir(exist_ok=True)
            put_file(self.path / KEY, content)

    def has(self, layer: int) -> bool:
        """Whether the block is finished."""
        return self._file(layer).is_file()

    def put(self, layer: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a block, by canonical names."""
        with writing(self.path):
            put_file(self._file(layer), safetensors.torch.save(dict(tensors)))

    def sources(self) -> dict[str, Source]:
        """The tensors of all finished blocks by name."""
        files = sorted(self.path.glob("block-*.safetensors"))
        entries = {name: entry for file in files for name, entry in read_header(file).items()}
        return {name: Source(entry) for name, entry in entries.items()}

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, layer: int) -> Path:
        return self.path / f"block-{layer:03}.safetensors"
