"""Images to pixels: decode, resize, crop and normalize, with the bits of transformers."""
