"""Search a folder of photos by words: `python examples/search.py MODEL FOLDER "a rocket at night"`.

MODEL is a CLIP checkpoint folder or hub id. Prints the best photos with their cosine similarity;
names the photos that cannot be read, and leaves them out.
"""

from __future__ import annotations

import sys

import vitrail
from vitrail.jobs.listing import find_images


def main(source: str, folder: str, words: str, best: int = 5) -> None:
    """Embeds every photo and the words, and ranks the photos by cosine."""
    model = vitrail.load(source)
    photos = find_images([folder]).sources
    result = model.encode_image(photos, normalize=True, on_error="skip")
    for position, reason in result.errors.items():
        print(f"left out: {photos[position]}: {reason}", file=sys.stderr)
    scores = (result.embeddings @ model.encode_text(words, normalize=True).T).flatten()
    for row in scores.argsort(descending=True)[:best].tolist():
        print(f"{scores[row]:.3f}  {photos[result.index[row]]}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
