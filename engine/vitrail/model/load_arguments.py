"""`LoadArguments`: enough to load a model again, in this process or in another."""

from dataclasses import asdict, dataclass
from typing import Any

from vitrail.image.decoding import SixteenBit
from vitrail.model.arguments import Resize


@dataclass(frozen=True, slots=True)
class LoadArguments:
    """The arguments of `vitrail.load` after it has resolved them.

    ``source``: an absolute path, or a hub id with its commit in ``revision``. ``device``: "cpu", or
    a GPU with its number, such as "cuda:0". ``dtype``: a dtype's name, or "int8". ``backend``:
    "native", "triton" or "torch". ``memory_limit``: in bytes.
    """

    source: str
    revision: str | None
    local_files_only: bool
    device: str
    dtype: str
    backend: str
    sixteen_bit: SixteenBit
    resize: Resize
    memory_limit: int | None = None

    def keywords(self) -> dict[str, Any]:
        """Every argument of `load` but ``source``, by name."""
        keywords = asdict(self)
        del keywords["source"]
        return keywords
