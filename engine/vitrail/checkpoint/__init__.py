"""A checkpoint on disk or on the hub: its configurations and the positions of its tensors."""
