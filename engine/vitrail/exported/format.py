"""What `vitrail export` writes and `vitrail.load` reads: names, places and digests.

    vitrail.json          for Python: what the folder is, and the digest of every other file
    model.vitrail         for C++: the same in its own encoding (csrc/package.hpp)
    weights.safetensors   one tensor "arena": packed weights, then position tables
    sm_90/*.plan          programs (`vitrail.plan.lowering`), a folder for each architecture
    sm_90/*.image         the kernels they launch, by key
    tokenizer.json, ...   the checkpoint's own, copied

A digest is SHA-256 over the SHA-256 of every 4 MiB of a file, so that threads can share the work.
Digests tell damage, not forgery: kernels are code, and a folder is trusted as a program is.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail._version import __version__
from vitrail.checkpoint.contents import PREPROCESSOR, PROCESSOR, TOKENIZER_CONFIG, TOKENIZER_FILES
from vitrail.checkpoint.regular import open_regular, read_exactly, reading
from vitrail.errors import refusal, show_path
from vitrail.plan.plan import Plan
from vitrail.plan.record import items, string
from vitrail.plan.text import text_pooled
from vitrail.plan.vision import vision_pooled, vision_scores
from vitrail.spec import ModelSpec, VisionSpec
from vitrail.weights.layout import ALIGNMENT, arena_bytes

FORMAT = 1
NATIVE, WEIGHTS = "model.vitrail", "weights.safetensors"
COPIED = (PREPROCESSOR, PROCESSOR, TOKENIZER_CONFIG, *TOKENIZER_FILES)
CHUNK_BYTES = 4 << 20
THREADS = 16
NATIVE_MAGIC = b"vitrail model 1\n"


# -- what the folder holds, by the spec ------------------------------------------------------------


def exported_plans(spec: ModelSpec) -> dict[str, Plan]:
    """The plans that are exported, by name. Pixels of uint8 need an image processor."""
    found: dict[str, Plan] = {}
    if spec.vision is not None:
        for kind in pixel_kinds(spec):
            uint8 = kind == "uint8"
            found[f"image.{kind}"] = vision_pooled(spec.vision, uint8=uint8)
            if spec.head is not None:
                scores = vision_scores(spec.vision, spec.head, uint8=uint8)
                found[f"scores.{kind}"] = scores
    if spec.text is not None:
        found["text"] = text_pooled(spec.text)
    return found


def pixel_kinds(spec: ModelSpec) -> tuple[str, ...]:
    """Kinds of pixels that the image tower takes, in the order of their position tables."""
    if spec.vision is None:
        return ()
    return ("float",) if spec.image is None else ("float", "uint8")


def pixel_batch(vision: VisionSpec, kind: str, size: tuple[int, int]) -> Tensor:
    """One image of ``size`` on the meta device, shaped as plans take ``kind``."""
    if kind == "uint8":
        return torch.empty(1, *size, vision.channels, dtype=torch.uint8, device="meta")
    return torch.empty(1, vision.channels, *size, dtype=torch.float32, device="meta")


def table_places(
    spec: ModelSpec, dtype: torch.dtype, size: tuple[int, int] | None
) -> tuple[dict[str, tuple[int, int]], int]:
    """First and last byte of each kind's position table in the arena, and the arena's bytes."""
    at = arena_bytes(spec, dtype)
    places = {}
    if spec.vision is not None and size is not None:
        nbytes = spec.vision.tokens_at(size) * spec.vision.blocks.width * 4
        for kind in pixel_kinds(spec):
            places[kind] = at, at + nbytes
            at += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return places, at


def weights_header(nbytes: int) -> bytes:
    """All of a weights file before its ``nbytes`` of arena, which starts at an `ALIGNMENT`."""
    entry = {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}
    text = json.dumps({"arena": entry}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


# -- bytes and digests -----------------------------------------------------------------------------


def read_digest(path: Path, out: memoryview | None = None) -> tuple[str, int]:
    """Digest and bytes of a file, which is read into ``out`` where that is given.

    Raises CheckpointError: not a regular file of as many bytes, or one that cannot be read.
    """
    descriptor = open_regular(path)
    try:
        with reading(path):
            size = os.fstat(descriptor).st_size
        if out is not None and size != len(out):
            raise refusal(show_path(path), f"{size:,} bytes", f"{len(out):,}")

        def part(start: int) -> bytes:
            stop = min(start + CHUNK_BYTES, size)
            chunk = memoryview(bytearray(stop - start)) if out is None else out[start:stop]
            read_exactly(descriptor, start, chunk, path)
            return hashlib.sha256(chunk).digest()

        with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
            digests = pool.map(part, range(0, size, CHUNK_BYTES))
            return hashlib.sha256(b"".join(digests)).hexdigest(), size
    finally:
        os.close(descriptor)


def manifest_bytes(content: Mapping[str, Any]) -> bytes:
    """vitrail.json: ``content`` and its own digest, in the one way in which it is written."""
    digest = hashlib.sha256(_canonical(content)).hexdigest()
    return _canonical({**content, "digest": digest})


def _canonical(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


# -- for C++ ---------------------------------------------------------------------------------------


def native_record(
    spec: ModelSpec,
    dtype: torch.dtype,
    size: tuple[int, int] | None,
    files: Mapping[str, tuple[str, int]],
    builds: Mapping[int, tuple[str, Sequence[str], Sequence[str]]],
) -> bytes:
    """model.vitrail, in the encoding of csrc/reader.hpp.

    ``files``: digest and bytes of all that C++ reads; ``builds``: fingerprint, names of programs
    and keys of images by architecture.
    """
    numbers = {name: number for number, name in enumerate(files)}
    places, total = table_places(spec, dtype, size)
    listed = [
        string(name) + struct.pack("<Q", nbytes) + bytes.fromhex(digest)
        for name, (digest, nbytes) in files.items()
    ]
    built = []
    for arch, (fingerprint, programs, keys) in builds.items():
        named = []
        for name in programs:
            table = places.get(name.partition(".")[2], (-1, 0))[0]
            named.append(
                string(name) + struct.pack("<Iq", numbers[f"sm_{arch}/{name}.plan"], table)
            )
        images = [struct.pack("<I", numbers[f"sm_{arch}/{key}.image"]) for key in keys]
        head = struct.pack("<I", arch) + string(fingerprint)
        built.append(head + items(named) + items(images))
    arena = len(weights_header(total)), total, arena_bytes(spec, dtype)
    return (
        NATIVE_MAGIC
        + string(__version__)
        + items(listed)
        + struct.pack("<IQQQ", numbers[WEIGHTS], *arena)
        + _towers(spec, size)
        + items(built)
    )


def _towers(spec: ModelSpec, size: tuple[int, int] | None) -> bytes:
    found = b"\0"
    if (vision := spec.vision) is not None and size is not None:
        facts = *size, vision.channels, vision.embedding, vision.tokens_at(size)
        found = b"\1" + struct.pack("<5I", *facts)
        labels = () if spec.head is None else spec.head.labels
        found += items([string(label) for label in labels])
        found += string("" if spec.head is None else spec.head.scores)
    if (text := spec.text) is None:
        return found + b"\0"
    eos = -1 if text.eos is None else text.eos
    return found + b"\1" + struct.pack("<IIIi", text.vocab, text.context, text.embedding, eos)
