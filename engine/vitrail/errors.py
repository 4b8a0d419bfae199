"""The errors that users meet, and how their messages show values and paths."""

import reprlib
from pathlib import Path

_REPR = reprlib.Repr()
_REPR.maxstring = 78


class VitrailError(Exception):
    """Base of every error that Vitrail raises on purpose."""


class CheckpointError(VitrailError):
    """A checkpoint, its configuration or its weights cannot be used."""


class ImageError(VitrailError):
    """An image cannot be read, or its pixels cannot be used."""


class InputError(VitrailError, ValueError):
    """An argument has the wrong type, shape, range or value."""


class DeviceError(VitrailError):
    """The GPU or its driver failed. If a kernel launch failed, the message names it."""


class OutOfMemoryError(DeviceError):
    """The GPU has too little memory left for the weights, or even for a single item."""


def show(value: object) -> str:
    """``repr(value)`` in at most 80 characters; never built in full for a large value."""
    text = _REPR.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def show_path(path: Path) -> str:
    """A path in at most 300 characters, printable: escaped or shortened if it has to be."""
    text = str(path) if str(path).isprintable() else ascii(str(path))
    return text if len(text) <= 300 else f"{text[:100]}...{text[-190:]}"


def refusal(location: str, got: str, wanted: str) -> CheckpointError:
    """The CheckpointError "LOCATION: got GOT, wanted WANTED", for the caller to raise."""
    return CheckpointError(f"{location}: got {got}, wanted {wanted}")
