"""How like fp32's the embeddings of int8 are: `python benchmarks/similarity.py` (ten CPU minutes).

The real DINOv2-small is quantized with the default calibration, and embeds photographs, digits and
textiles in int8 and in fp32 on the CPU. The figures and every cosine go into similarity.json.
`--draw` draws docs/int8.png from that file; it needs matplotlib, which `make install` leaves out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from environment import ROOT, refuse_dirty
from harness import Results
from PIL import Image
from suite import results_folder, write
from torch import Tensor

import vitrail
from vitrail.int8.similarity import accuracy, centered_cosines, cosines
from vitrail.tools.quantize import quantize_model

PICTURE = ROOT / "docs/int8.png"
COLORS = {"photographs": "#1b7837", "handwritten digits": "#2166ac", "alike textiles": "#b2182b"}
GOOD, LOWEST = 1e-3, 3e-3
"""1 - mean centered cosine up to which the guard says good, and up to which it warns."""


def measure() -> Results:
    """The figures of every set of pictures, and 1 - cosine of each picture, sorted."""
    sys.path.append(str(ROOT / "tests"))
    from real_model import dinov2_small
    from real_pictures import digits, photographs, textiles

    source, results = dinov2_small(), {}
    sets = zip(COLORS, (photographs(128), digits()[0], textiles(300)[0]), strict=True)
    with tempfile.TemporaryDirectory() as folder:
        quantized = Path(folder) / "int8"
        quantize_model(source, quantized)
        for name, images in sets:
            reference, result = (_embed(path, images) for path in (source, quantized))
            results[name] = {
                "figures": accuracy(result, reference).to_dict(),
                "plain": _distances(cosines(result, reference)),
                "centered": _distances(centered_cosines(result, reference)),
            }
            print(f"{name}: {results[name]['figures']}", flush=True)
    return results


def _embed(folder: Path, images: Sequence[Image.Image]) -> Tensor:
    return vitrail.load(folder, device="cpu").encode_image(list(images), batch_size=32)


def _distances(cosines: Tensor) -> list[float]:
    return [float(f"{distance:.3g}") for distance in (1 - cosines).sort().values.tolist()]


def draw(results: Results, path: Path) -> None:
    """A panel for the plain and a panel for the centered cosines, as distances on a log scale."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    titles = {"plain": "plain cosine", "centered": "centered cosine: the mean, dotted, decides"}
    for panel, (key, title) in zip(panels, titles.items(), strict=True):
        for name, color in COLORS.items():
            distances = results[name][key]
            part = (np.arange(len(distances)) + 0.5) / len(distances)
            mean = float(np.mean(distances))
            label = f"{name}: mean {1 - mean:.5f}"
            panel.plot(part * 100, distances, color=color, linewidth=2, label=label)
            panel.axhline(mean, color=color, linewidth=1, linestyle=":")
        panel.set(yscale="log", title=title, xlabel="pictures, sorted by cosine (%)")
        panel.grid(alpha=0.3)
        panel.legend(loc="upper left", framealpha=1)
    panels[0].set_ylabel("1 - cosine of int8 and fp32 embedding")
    panels[1].axhspan(LOWEST, 1, color="#b2182b", alpha=0.08)
    panels[1].axhspan(GOOD, LOWEST, color="#fdb863", alpha=0.2)
    for height, word in ((1.25 * LOWEST, "the guard refuses"), (1.6 * GOOD, "the guard warns")):
        panels[1].text(-2, height, word, va="bottom")
    panels[0].set_ylim(1e-5, 1)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write, or draw the figures that were written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draw", action="store_true", help="docs/int8.png, from similarity.json")
    parser.add_argument("--allow-dirty", action="store_true", help="measure an uncommitted tree")
    options = parser.parse_args(argv)
    record = results_folder("cpu") / "similarity.json"
    if options.draw:
        draw(json.loads(record.read_text())["results"], PICTURE)
        return 0
    refuse_dirty(options.allow_dirty)
    write(record, measure())
    return 0


if __name__ == "__main__":
    sys.exit(main())
