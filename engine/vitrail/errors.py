"""The errors users meet. Each message says what was got, what was wanted and where."""


class VitrailError(Exception):
    """Base of every error Vitrail raises on purpose."""


class CheckpointError(VitrailError):
    """A checkpoint, its configuration or its weights cannot be used."""


class ImageError(VitrailError):
    """An image cannot be read, or its pixels cannot be used."""


class InputError(VitrailError, ValueError):
    """An argument has the wrong type, shape, range or value."""


class DeviceError(VitrailError):
    """The GPU or its driver failed; the message names the launch where there was one."""


class OutOfMemoryError(DeviceError):
    """The GPU has too little memory left, for the weights or even for one item."""
