"""A loaded checkpoint and its calls; `Model` and `load` are the public names."""

from vitrail.model.model import Model as Model
from vitrail.model.model import load as load
