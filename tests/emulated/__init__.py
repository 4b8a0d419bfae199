"""Compiled kernels in the emulator: fixtures that run the project's own tests on them."""
