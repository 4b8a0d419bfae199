"""Write goldens.json: the pixels of transformers' PIL processors under Pillow 12.

Pillow 12, because it is the last whose resize goes across first at every size, which is what the
published checkpoints were trained with. `make pixels-golden` runs this in an environment of its
own: Pillow 12, everything else as in constraints.txt. By hand:

    python3.11 -m venv .venv-pillow12
    .venv-pillow12/bin/pip install 'pillow==12.*' numpy==2.4.6 torch==2.13.0 transformers==5.23.0
    .venv-pillow12/bin/python tests/pixels/make_goldens.py
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import cases
import numpy as np
import PIL
import transformers
from PIL import Image
from theirs import processor


def golden(case: cases.Case) -> str:
    made = case.reference() if case.reference else case.make()
    image = Image.open(io.BytesIO(made)) if isinstance(made, bytes) else made
    pixels = processor(case.steps, case.channels)(image, return_tensors="np")["pixel_values"][0]
    return cases.summary(pixels.astype(np.float32))


def main() -> None:
    if PIL.__version__.partition(".")[0] != "12":
        raise SystemExit(f"got Pillow {PIL.__version__}, wanted 12")
    found = {case.id: golden(case) for case in cases.all_cases()}
    versions = {
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "transformers": transformers.__version__,
    }
    text = json.dumps({"versions": versions, "cases": found}, indent=1)
    Path(__file__).with_name("goldens.json").write_text(text + "\n", encoding="utf-8")
    print(f"{len(found)} cases")


if __name__ == "__main__":
    main()
