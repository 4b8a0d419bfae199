"""The C++ extension, or why it cannot be used."""

import importlib
from pathlib import Path
from types import ModuleType

from vitrail._version import __version__

NAME, FOLDER = "vitrail._C", Path(__file__).parents[1]


def load_extension() -> ModuleType:
    """`vitrail._C`. Raises ImportError with a reason that can be shown to users.

    An extension of another version is refused: it might not read this version's records.
    """
    try:
        extension = importlib.import_module(NAME)
    except ModuleNotFoundError as error:
        if error.name != NAME:
            raise ImportError(f"{NAME} does not load: {error}") from error
        raise ImportError(_absent()) from error
    except ImportError as error:
        raise ImportError(f"{NAME} does not load: {error}") from error
    version = extension.version()
    if version != __version__:
        raise ImportError(
            f"{NAME} was built for vitrail {version}, and this is {__version__}: install it again"
        )
    return extension


def _absent() -> str:
    builds = sorted(file.name for file in FOLDER.glob("_C.*.so"))
    if builds:
        return f"{NAME} was built for another Python: {', '.join(builds)}"
    return f"{NAME} is not built (vitrail {__version__} is installed in pure Python)"
