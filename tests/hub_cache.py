"""A cache of huggingface_hub with models of the documentation's examples, small and random."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PHOTOS = ROOT / "engine" / "vitrail" / "assets" / "photos"


def snapshot(hub: Path, repo: str) -> Path:
    """An empty snapshot of ``repo`` in the cache ``hub``."""
    home = hub / f"models--{repo.replace('/', '--')}"
    revision = "0123456789abcdef0123456789abcdef01234567"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(revision)
    folder = home / "snapshots" / revision
    folder.mkdir(parents=True)
    return folder


def desk(folder: Path) -> dict[str, str]:
    """Copies the photos to ``folder``. Returns an environment whose cache is ``folder``/hub."""
    shutil.copytree(PHOTOS, folder / "photos")
    scripts = Path(sys.executable).parent
    return {
        **os.environ,
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
    }
