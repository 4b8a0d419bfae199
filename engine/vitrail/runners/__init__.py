"""Runners walk a plan: `reference` with PyTorch on any device."""
