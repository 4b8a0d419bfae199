"""A checkpoint on disk or on the hub: its configurations, and where each of its tensors lies."""
