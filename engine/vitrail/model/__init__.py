"""A loaded checkpoint and its calls. `vitrail.load` and `vitrail.Model` are the public names."""
