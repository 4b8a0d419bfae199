"""A loaded checkpoint and its calls; `Model` and `load` are the public names."""

from vitrail.model.loading import load as load
from vitrail.model.model import Model as Model
