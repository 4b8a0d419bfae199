from __future__ import annotations

from vitrail.cli import main

main()
