"""The build backend: setuptools, plus a CUDA compiler as a requirement if VITRAIL_CUDA=1."""

from __future__ import annotations

from typing import Any

from cuda_binaries import requirements
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *requirements()]


get_requires_for_build_editable = get_requires_for_build_wheel
