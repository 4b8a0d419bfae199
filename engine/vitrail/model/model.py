"""`Model`: what users hold. Images and texts in, embeddings, scores and features out."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple, TypeVar, cast, overload

import numpy as np
import torch
from torch import Tensor

from vitrail._version import __version__
from vitrail.checkpoint.contents import TOKENIZER_FILES
from vitrail.checkpoint.files import Checkpoint, open_checkpoint
from vitrail.dtypes import dtype_name, parse_dtype
from vitrail.errors import (
    CheckpointError,
    ImageError,
    InputError,
    OutOfMemoryError,
    VitrailError,
)
from vitrail.exported.folder import Exported, open_exported
from vitrail.image import preprocess as pixels_of
from vitrail.image.decoding import PixelInput, SixteenBit
from vitrail.image.resize import spec_at
from vitrail.model.arguments import (
    Images,
    OnError,
    Texts,
    any_string,
    check_device,
    check_id_tensor,
    check_options,
    check_pixels,
    floats,
    listed,
    mask_lengths,
    token_ids,
)
from vitrail.model.crops import Batch, device_batch, host_batch
from vitrail.model.forward import forward_pair, forward_text, forward_vision, unit
from vitrail.model.module import ImageModule, TextModule
from vitrail.model.outputs import Classification, EncodeResult, Output
from vitrail.runtime import RUNNERS, choose
from vitrail.runtime.native import NativeRunner
from vitrail.runtime.runner import Runner
from vitrail.runtime.towers import TextTower, VisionTower
from vitrail.spec import ImageSpec, ModelSpec
from vitrail.text.tokenizer import Overflow, Tokenizer, load_tokenizer, pad
from vitrail.text.tokens import Ints, TokenIds
from vitrail.torch_modes import plain
from vitrail.weights.folding import Weights, hash_weights, load_weights
from vitrail.zoo import map_tensors, read_spec

ACTIVATION_BYTES = 256 << 20
"""The activation arena of a call where the caller names no batch size."""
CPU_TEXT_BYTES = 32 << 20
"""The same for texts on the CPU, which are slower by 6 % in arenas that leave its caches."""
DECODED_IMAGES = 64
"""Images decoded ahead at once where the caller names no batch size."""
DECODED_BYTES = 256 << 20
"""Bytes of decoded images, and of what they become, that a device resizes at once."""
LABEL_SETS = 16

Resize = Literal["host", "device"]


def load(
    path_or_id: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    local_files_only: bool = False,
    sixteen_bit: SixteenBit = "scale",
    runner: str = "auto",
    resize: Resize = "host",
) -> Model:
    """Open a checkpoint folder, a hub id such as ``laion/CLIP-ViT-B-32-laion2B-s34B-b79K``, or a
    folder that ``vitrail export`` wrote, whose dtype is fixed.

    ``device``: "auto" is CUDA where there is one, else the CPU. ``dtype``: "float32", "float16",
    "bfloat16" or the torch dtype; "auto" is float32 on the CPU and float16 on CUDA. ``revision``
    and ``local_files_only`` are the hub's. A folder is read without any network. ``sixteen_bit``:
    16-bit greys are scaled to 8 bits, or clipped ("clip") as transformers does. ``runner``: "auto"
    is Vitrail's own kernels in float16 and bfloat16 on CUDA, launched from C++ ("native") or, where
    the extension is not built, from Python ("triton"), else PyTorch's operators ("reference");
    ``Model.runner`` says which serves. ``resize``: images are decoded on the host's threads, and
    resized and cropped there ("host") or by the runner on its device ("device"), to the same bits;
    which is faster has not been measured on a GPU.

    Raises CheckpointError: not a checkpoint Vitrail can serve exactly, or files that are damaged.
    InputError: an unknown device, dtype, runner or place to resize, or one that cannot serve here.
    OutOfMemoryError: the GPU has no room for the weights.
    """
    place = check_device(device)
    kind = _dtype(dtype, place)
    if sixteen_bit not in ("scale", "clip"):
        raise InputError(f"sixteen_bit: got {sixteen_bit!r}, wanted 'scale' or 'clip'")
    if resize not in ("host", "device"):
        raise InputError(f"resize: got {resize!r}, wanted 'host' or 'device'")
    exported = open_exported(path_or_id, revision)
    if exported is not None:
        if dtype != "auto" and kind != exported.dtype:
            raise InputError(
                f"dtype: got {dtype_name(kind)}, wanted {dtype_name(exported.dtype)}, in which "
                f"{exported.folder} was exported; load the checkpoint itself, or export it again"
            )
        return _load_exported(exported, place, sixteen_bit, runner, resize)
    runner_class = RUNNERS[choose(runner, kind, place)]
    found = read_model(path_or_id, kind, revision=revision, local_files_only=local_files_only)
    serving = runner_class(found.weights, kind, place)
    return Model(found.checkpoint, found.spec, found.hash_weights, serving, sixteen_bit, resize)


class Found(NamedTuple):
    """A checkpoint as read: its weights are packed, on the CPU, and not yet hashed."""

    checkpoint: Checkpoint
    spec: ModelSpec
    weights: Weights
    hash_weights: Callable[[], str]


def read_model(
    path_or_id: str | os.PathLike[str],
    dtype: torch.dtype,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Found:
    """All of a checkpoint that a model is made of. Arguments and errors as of `load`."""
    checkpoint = open_checkpoint(path_or_id, revision=revision, local_files_only=local_files_only)
    spec = read_spec(checkpoint)
    sources = map_tensors(checkpoint, spec)
    scale = None
    if spec.vision is not None and spec.image is not None:
        a, b = pixels_of.linear_scale(spec.image, spec.vision.channels)
        scale = torch.from_numpy(a), torch.from_numpy(b)
    weights = load_weights(spec, sources, dtype, scale)
    return Found(checkpoint, spec, weights, functools.partial(hash_weights, spec, sources))


def _load_exported(
    exported: Exported,
    place: torch.device,
    sixteen_bit: SixteenBit,
    wanted: str,
    resize: Resize,
) -> Model:
    name, kind = choose(wanted, exported.dtype, place, exported), exported.dtype
    weights = exported.load()
    runner = (
        NativeRunner(weights, kind, place, exported=exported)
        if name == NativeRunner.name
        else RUNNERS[name](weights, kind, place)
    )
    digest = exported.weights_hash
    return Model(exported.checkpoint(), exported.spec, lambda: digest, runner, sixteen_bit, resize)


def fingerprint(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    weights: str,
    dtype: torch.dtype,
    runner: str,
    sixteen_bit: SixteenBit = "scale",
) -> str:
    """64 hex digits: see `Model.fingerprint`. ``weights``: their hash; ``runner``: its identity."""
    files = {name: checkpoint.file(name) for name in TOKENIZER_FILES}
    tokenizer = {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in files.items()
        if path is not None and spec.text is not None
    }
    parts = {
        "weights": weights,
        "spec": spec.to_dict(),
        "tokenizer": tokenizer,
        "sixteen_bit": sixteen_bit,
        "dtype": str(dtype),
        "runner": runner,
        "version": __version__,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(dtype, str) and dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    return parse_dtype(dtype, auto=True)


class Model:
    """A loaded checkpoint. May be called from many threads at once.

    ``spec`` says what the checkpoint is, ``source`` what it was loaded from and ``folder`` where
    its files are, ``device`` and ``dtype`` where and in what it computes, ``runner`` which runner
    serves it, ``weight_bytes`` what its weights take up there, ``resize`` where its images are
    resized, and by what.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        hash_weights: Callable[[], str],
        runner: Runner,
        sixteen_bit: SixteenBit = "scale",
        resize: Resize = "host",
    ) -> None:
        self.spec, self.source, self.folder = spec, checkpoint.source, checkpoint.folder
        self.revision = checkpoint.revision
        self.device, self.dtype, self.runner = runner.device, runner.dtype, runner.name
        self._identity = runner.identity
        self.weight_bytes = runner.weights.arena.numel()
        self._checkpoint, self._hash_weights = checkpoint, hash_weights
        self._sixteen_bit: SixteenBit = sixteen_bit
        self.resize = "host" if resize == "host" else f"device, by {runner.resizer}"
        self._resizer = None if resize == "host" else runner
        self._vision = VisionTower(spec.vision, spec.head, runner) if spec.vision else None
        self._text = TextTower(spec.text, runner) if spec.text else None
        self._logit_scale = runner.weights.logit_scale
        self._lock = threading.Lock()
        self._labels: dict[tuple[tuple[str, ...], tuple[str, ...], Overflow], Tensor] = {}

    def __repr__(self) -> str:
        dtype = dtype_name(self.dtype)
        return (
            f"<vitrail.Model {self.spec.architecture} from {str(self.source)!r}: "
            f"{self.spec.parameters / 1e6:.1f} M parameters, {dtype} on {self.device}, "
            f"{self.runner} runner>"
        )

    # -- what it is ------------------------------------------------------------------------------

    @functools.cached_property
    def fingerprint(self) -> str:
        """64 hex digits: weights, spec, preprocessing, tokenizer files, dtype, runner, version.

        Equal where all of these are. Reads all weights on first use.
        """
        return fingerprint(
            self._checkpoint,
            self.spec,
            self._hash_weights(),
            self.dtype,
            self._identity,
            self._sixteen_bit,
        )

    def _vision_tower(self, call: str) -> VisionTower:
        if self._vision is None:
            raise InputError(f"{call}: {self.spec.architecture} has no image tower")
        return self._vision

    def _text_tower(self, call: str) -> TextTower:
        if self._text is None:
            raise InputError(f"{call}: {self.spec.architecture} has no text tower")
        return self._text

    def _image_spec(self, call: str) -> ImageSpec:
        if self.spec.image is None:
            raise CheckpointError(
                f"{self._checkpoint.folder}: {call} needs preprocessor_config.json (or "
                "processor_config.json), which the folder lacks; preprocessed float pixels work"
            )
        return self.spec.image

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self._checkpoint, self._text_tower("tokenize").spec)

    # -- preparing inputs --------------------------------------------------------------------------

    @plain()
    def preprocess(self, images: Images, *, size: tuple[int, int] | None = None) -> Tensor:
        """Images -> ``pixel_values`` (N, channels, H, W) float32, bit for bit the processor's.

        ``images`` and ``size`` as in `encode_image`. Raises ImageError naming the image that fails,
        InputError where the images come out in different sizes.
        """
        check_options(None, size, "raise")
        tower, spec = self._vision_tower("preprocess").spec, self._image_spec("preprocess")
        arrays = []
        for position, pixels in enumerate(
            pixels_of.preprocess_float(
                listed(images),
                spec=spec,
                channels=tower.channels,
                size=size,
                sixteen_bit=self._sixteen_bit,
            )
        ):
            if isinstance(pixels, VitrailError):
                raise _at(position, pixels)
            arrays.append(pixels)
        if len({array.shape for array in arrays}) > 1:
            shapes = sorted({array.shape[1:] for array in arrays})
            raise InputError(f"preprocess: got images of sizes {shapes}, wanted one size a batch")
        if not arrays:
            sized = spec_at(spec, size)
            exact = sized.resize[1:] if sized.resize and sized.resize[0] == "exact" else tower.image
            shape = (0, tower.channels, *(sized.crop or exact))
            return torch.empty(shape, dtype=torch.float32, device="cpu")
        return torch.from_numpy(np.stack(arrays))

    @plain()
    def tokenize(self, texts: str | Sequence[str], *, overflow: Overflow = "error") -> Tensor:
        """Texts -> ids (N, context) int64 with the family's begin, end and padding tokens.

        ``overflow``: a text too long raises ("error"), is cut with a warning ("warn") or is cut
        ("truncate"); the end token stays last.
        """
        tower = self._text_tower("tokenize")
        tokens = self._tokenizer.encode(texts, overflow)
        return torch.from_numpy(pad(tokens, tower.spec, self._tokenizer.pad_id)[0])

    def _crops(self, items: Sequence[PixelInput], size: tuple[int, int] | None) -> Batch:
        """uint8 crops of the first items, one or more: for the device as many as
        `DECODED_BYTES` allow."""
        spec, channels = self._image_spec("images"), self._vision_tower("images").spec.channels
        kind: SixteenBit = self._sixteen_bit
        if self._resizer is None:
            return host_batch(
                pixels_of.preprocess_uint8(items, spec, channels, size=size, sixteen_bit=kind)
            )
        framed = pixels_of.preprocess_framed(
            items, spec, channels, enough=DECODED_BYTES, size=size, sixteen_bit=kind
        )
        return device_batch(framed, self._resizer, DECODED_BYTES)

    # -- embeddings --------------------------------------------------------------------------------

    @overload
    def encode_image(
        self,
        images: Images,
        *,
        normalize: bool = ...,
        batch_size: int | None = ...,
        size: tuple[int, int] | None = ...,
        on_error: Literal["raise"] = ...,
        output_device: str | torch.device = ...,
    ) -> Tensor: ...

    @overload
    def encode_image(
        self,
        images: Images,
        *,
        normalize: bool = ...,
        batch_size: int | None = ...,
        size: tuple[int, int] | None = ...,
        on_error: Literal["skip"],
        output_device: str | torch.device = ...,
    ) -> EncodeResult: ...

    @plain()
    def encode_image(
        self,
        images: Images,
        *,
        normalize: bool = False,
        batch_size: int | None = None,
        size: tuple[int, int] | None = None,
        on_error: OnError = "raise",
        output_device: str | torch.device = "cpu",
    ) -> Tensor | EncodeResult:
        """Images -> embeddings (N, D) float32: one image gives (1, D), none (0, D).

        ``images``: one or a list of path, encoded bytes, PIL image, uint8 array or tensor (H, W,
        C); or uint8 (N, H, W, C); or float (N, C, H, W), taken as already preprocessed. CLIP: the
        projected embedding, not of unit length unless ``normalize``. ViT and DINOv2: the class
        token after the final LayerNorm, never the tanh pooler. ``size`` (H, W): another size than
        the processor's; positions are interpolated. ``on_error="skip"`` gives an `EncodeResult`, in
        which one bad image never costs another.

        Raises ImageError for an image that cannot be read, InputError for a wrong argument.
        """
        check_options(batch_size, size, on_error)
        place = check_device(output_device, "output_device")
        width = self._vision_tower("encode_image").spec.embedding
        strict = on_error == "raise"
        rows, errors = self._each_image(images, batch_size, size, strict, logits=False)
        out = _in_order(rows, width, normalize).to(place)
        if on_error == "raise":
            return out
        reasons = {position: str(errors[position]) for position in sorted(errors)}
        return EncodeResult(out, tuple(sorted(rows)), reasons)

    def _each_image(
        self,
        images: Images,
        batch_size: int | None,
        size: tuple[int, int] | None,
        strict: bool,
        logits: bool,
    ) -> _Rows:
        """The embedding or the class scores of every image by position, and what failed.

        ``strict``: the first failure is raised with its batch, whatever is still to come.
        """
        tower = self._vision_tower("images")
        if isinstance(images, Iterator) and not isinstance(images, io.IOBase):
            images = list(images)
        values = floats(images)
        if values is None:
            return self._each_item(listed(images), batch_size, size, strict, logits)
        errors = check_pixels(values, tower.spec, self.spec.image, strict)
        if size is not None and tuple(size) != tower.size(values):
            raise InputError(
                f"size: got {tuple(size)} with preprocessed pixels of {tower.size(values)}; "
                "floats are taken as they are, so leave it out"
            )
        step = batch_size or tower.batch(tower.size(values), ACTIVATION_BYTES)
        rows: dict[int, Tensor] = {}
        positions = [p for p in range(values.shape[0]) if p not in errors]
        for start in range(0, len(positions), step):
            chosen = positions[start : start + step]
            whole = chosen == list(range(chosen[0], chosen[-1] + 1))
            batch = values[chosen[0] : chosen[-1] + 1] if whole else values[chosen]
            good, bad = self._compute(batch, chosen, logits)
            rows |= good
            errors |= bad
            _raise_first(errors, strict)
        return rows, errors

    def _each_item(
        self,
        items: Sequence[PixelInput],
        batch_size: int | None,
        size: tuple[int, int] | None,
        strict: bool,
        logits: bool,
    ) -> _Rows:
        if not items:
            return {}, {}
        tower, spec = self._vision_tower("images"), self._image_spec("images")
        fitting = tower.batch(size or spec.crop or tower.spec.image, ACTIVATION_BYTES)
        step = batch_size or min(fitting, DECODED_IMAGES)
        rows: dict[int, Tensor] = {}
        errors: dict[int, VitrailError] = {}
        for start, ready in self._batches(items, step, size):
            errors |= {start + i: _at(start + i, error) for i, error in ready.errors.items()}
            for crops in ready.crops:
                positions = [start + member for member in crops.members]
                down, across = tower.spec.patch
                if crops.size[0] < down or crops.size[1] < across:
                    got = f"got {crops.size[1]}x{crops.size[0]} pixels after preprocessing"
                    bad = ImageError(f"{got}, wanted at least one patch of {across}x{down}")
                    errors |= {position: _at(position, bad) for position in positions}
                    continue
                # a processor without a crop gives sizes that were not known before
                most = batch_size or tower.batch(crops.size, ACTIVATION_BYTES)
                for first in range(0, len(positions), most):
                    part = slice(first, first + most)
                    good, failed = self._compute(crops[part], positions[part], logits)
                    rows |= good
                    errors |= failed
            _raise_first(errors, strict)
        return rows, errors

    def _batches(
        self, items: Sequence[PixelInput], step: int, size: tuple[int, int] | None
    ) -> Iterator[tuple[int, Batch]]:
        """Crops of ``step`` items or fewer, the next ones in the making while the caller works on
        these."""
        # a pool of the call's own: one kept in the model would be dead in a forked process
        pool = ThreadPoolExecutor(1, "vitrail-prefetch")
        start, ready = 0, self._crops(items[:step], size)
        try:
            while True:
                following = start + ready.taken
                ahead = None
                if following < len(items):
                    ahead = pool.submit(self._crops, items[following : following + step], size)
                yield start, ready
                if ahead is None:
                    return
                start, ready = following, ahead.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _compute(self, batch: Tensor, positions: Sequence[int], logits: bool) -> _Rows:
        """Rows of one batch of pixels by input position, and the items that are not finite.

        A batch that the GPU has no memory for goes through in halves, to the same bits.
        """
        try:
            return self._compute_at_once(batch, positions, logits)
        except (OutOfMemoryError, torch.OutOfMemoryError):
            half = len(positions) // 2
            if half == 0:
                raise
        left, right = (
            self._compute(batch[part], positions[part], logits)
            for part in (slice(half), slice(half, None))
        )
        return left[0] | right[0], left[1] | right[1]

    def _compute_at_once(self, batch: Tensor, positions: Sequence[int], logits: bool) -> _Rows:
        tower = self._vision_tower("images")
        found = tower.scores(batch) if logits else tower.embed(batch)["vision.embedding"]
        finite = torch.isfinite(found).all(dim=1).tolist()
        rows: dict[int, Tensor] = {}
        errors: dict[int, VitrailError] = {}
        for offset, (position, good) in enumerate(zip(positions, finite, strict=True)):
            if good:
                rows[position] = found[offset]
            else:
                where = self._first_bad_block(batch[offset : offset + 1])
                errors[position] = VitrailError(f"image {position}: {where}")
        return rows, errors

    def _first_bad_block(self, pixels: Tensor) -> str:
        """Where the numbers of one image stop being finite, in words."""
        tower = self._vision_tower("encode_image")
        layers = tower.spec.blocks.layers
        try:
            out = tower.dense(pixels, tuple(range(layers + 1)))
        except InputError:  # an export where triton is missing has no plan that looks into it
            return f"the result {self._not_finite()}"
        for layer in range(layers + 1):
            if not torch.isfinite(out[f"vision.hidden.{layer}"]).all():
                place = f"block {layer - 1}" if layer else "the patch embedding"
                return f"{place} {self._not_finite()}"
        return f"the final projection {self._not_finite()}"

    def _not_finite(self) -> str:
        kind = dtype_name(self.dtype)
        advice = {"float16": "; load with dtype='bfloat16' or 'float32'"}.get(kind, "")
        return f"holds numbers that are not finite in {kind}{advice}"

    @plain()
    def encode_text(
        self,
        texts: Texts,
        *,
        normalize: bool = False,
        batch_size: int | None = None,
        overflow: Overflow = "error",
        output_device: str | torch.device = "cpu",
    ) -> Tensor:
        """Texts, or token ids (N, T), -> embeddings (N, D) float32; none give (0, D).

        Only the tokens up to the pooled one are computed: later ones cannot reach it. ``overflow``
        as in `tokenize`. Raises InputError: a text too long, ids out of range or without an end
        token.
        """
        tower = self._text_tower("encode_text")
        check_options(batch_size, None, "raise")
        place = check_device(output_device, "output_device")
        tokens = self._cut_ids(texts, overflow)
        out = torch.empty(len(tokens), tower.spec.embedding, dtype=torch.float32, device="cpu")
        budget = CPU_TEXT_BYTES if self.device.type == "cpu" else ACTIVATION_BYTES
        batches = tower.batches(tokens.lengths, batch_size, budget)
        # the device computes a batch while the host makes the next one ready
        for chosen, result in _one_behind(self._embed_ids(tokens, batches)):
            out[torch.from_numpy(chosen)] = result["text.embedding"].cpu()
            if (status := result["text.status"].cpu()).any():
                text = int(chosen[status.nonzero().flatten().numpy()].min())
                raise VitrailError(f"text {text}: the embedding {self._not_finite()}")
        return (unit(out) if normalize else out).to(place)

    def _embed_ids(
        self, tokens: TokenIds, batches: Iterable[Ints]
    ) -> Iterator[tuple[Ints, dict[str, Tensor]]]:
        """(positions, outputs) of the texts of each batch: in halves where memory lacks."""
        tower = self._text_tower("encode_text")
        for chosen in batches:
            try:
                result = tower.embed(tokens.take(chosen))
            except (OutOfMemoryError, torch.OutOfMemoryError):
                half = len(chosen) // 2
                if half == 0:
                    raise
            else:
                yield chosen, result
                continue
            yield from self._embed_ids(tokens, (chosen[:half], chosen[half:]))

    def _cut_ids(self, texts: Texts, overflow: Overflow) -> TokenIds:
        """Ids that end at the pooled token."""
        tower = self._text_tower("encode_text")
        if isinstance(texts, bytes | bytearray | memoryview):
            raise InputError("texts: got bytes, wanted strings or token ids")
        if isinstance(texts, Sequence) and not len(texts) and not isinstance(texts, str):
            return TokenIds.of([])
        if isinstance(texts, str) or (isinstance(texts, Sequence) and any_string(texts)):
            tokens = self._tokenizer.encode(cast("str | Sequence[str]", texts), overflow)
        else:
            tokens = token_ids(texts, tower.spec.vocab, tower.spec.context)
        return tokens.cut_at_end(tower.spec.eos)

    # -- classes -----------------------------------------------------------------------------------

    @plain()
    def classify(
        self,
        images: Images,
        labels: Sequence[str] | None = None,
        templates: Sequence[str] = ("a photo of a {}",),
        *,
        batch_size: int | None = None,
        size: tuple[int, int] | None = None,
        overflow: Overflow = "error",
    ) -> Classification:
        """Probabilities (N, L) over ``labels`` (zero-shot), or over the checkpoint's own.

        Zero-shot: each label fills every template, the normalised embeddings are averaged and
        normalised, and compared with the image's under the learnt temperature. Label embeddings are
        cached. ``overflow``: what becomes of a label too long for the tower, as in `tokenize`.
        Without ``labels``: the checkpoint's classification head.
        """
        check_options(batch_size, size, "raise")
        if labels is None:
            head = self.spec.head
            if head is None:
                raise InputError(
                    f"classify: {self.spec.architecture} has no classification head; "
                    "give labels to a CLIP checkpoint, or load one that was fine-tuned"
                )
            rows, _ = self._each_image(images, batch_size, size, strict=True, logits=True)
            logits = _in_order(rows, len(head.labels))
            kinds = {"softmax": logits.softmax(dim=1), "sigmoid": logits.sigmoid(), "none": logits}
            return Classification(head.labels, kinds[head.scores], logits)
        if self._logit_scale is None:
            raise InputError(
                f"classify: {self.spec.architecture} has no image and text tower to compare "
                "labels with; leave labels out to use the checkpoint's own head"
            )
        names = _strings("labels", labels)
        matrix = self._label_embeddings(names, _strings("templates", templates), overflow)
        found = self.encode_image(images, normalize=True, batch_size=batch_size, size=size)
        logits = self._logit_scale * found @ matrix.t()
        return Classification(names, logits.softmax(dim=1), logits)

    def _label_embeddings(
        self, labels: tuple[str, ...], templates: tuple[str, ...], overflow: Overflow
    ) -> Tensor:
        if any("{}" not in template for template in templates):
            raise InputError(
                f"templates: got {templates!r}, wanted strings with {{}} for the label"
            )
        key = (labels, templates, overflow)
        with self._lock:
            if key in self._labels:
                return self._labels[key]
        texts = [t.replace("{}", label) for label in labels for t in templates]
        each = self.encode_text(texts, normalize=True, overflow=overflow).view(
            len(labels), len(templates), -1
        )
        matrix = unit(each.mean(dim=1)) if len(templates) > 1 else each[:, 0]
        with self._lock:
            while len(self._labels) >= LABEL_SETS:
                self._labels.pop(next(iter(self._labels)))
            self._labels[key] = matrix
        return matrix

    # -- everything, as transformers gives it ------------------------------------------------------

    @plain()
    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
    ) -> Output:
        """The fields of the checkpoint's transformers class, on the model's device.

        ``pixel_values`` (B, C, H, W) floats, any size of at least a patch: positions are
        interpolated, remainder pixels dropped. ``input_ids`` (B, T) integers; ``attention_mask``
        (B, T) with 1 for the tokens that may be attended to, right padding only. Of a CLIPModel
        either tower alone is allowed. A row of ids without an end token is pooled at its first
        token, as transformers does. Pixels on a GPU are taken without a look at their values, which
        would wait for it: ``status`` says which items are finite. Ids and masks are looked at.
        """
        if pixel_values is None and input_ids is None:
            raise InputError("forward: got neither pixel_values nor input_ids")
        if attention_mask is not None and input_ids is None:
            raise InputError("forward: got attention_mask without input_ids")
        vision = text = None
        if pixel_values is not None:
            tower = self._vision_tower("pixel_values")
            values = floats(pixel_values)
            if values is None:
                raise InputError("pixel_values: wanted a float tensor (B, C, height, width)")
            check_pixels(values, tower.spec, self.spec.image, wait=False)
            vision = forward_vision(tower, self.spec, values, output_hidden_states)
        if input_ids is not None:
            text_tower = self._text_tower("input_ids")
            ids = check_id_tensor(input_ids, text_tower.spec.vocab, text_tower.spec.context)
            kv_lens = None if attention_mask is None else mask_lengths(attention_mask, ids)
            text = forward_text(text_tower, self.spec, ids, kv_lens, output_hidden_states)
        if self._logit_scale is not None:
            return forward_pair(vision, text, self._logit_scale)
        result = vision or text
        assert result is not None, "one tower ran"
        return result

    @plain()
    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
        """DINOv2's method, its signature and values: patch tokens after some of the blocks.

        ``x`` (B, C, H, W) preprocessed floats; ``n``: the last n blocks, or these block numbers.
        Patch tokens (B, h w, C), or (B, C, h, w) with ``reshape``; with ``return_class_token``
        pairs of (patch tokens, class token (B, C)); with ``norm`` after the final LayerNorm.
        Source: `get_intermediate_layers` of facebookresearch/dinov2, vision_transformer.py.
        """
        tower = self._vision_tower("get_intermediate_layers")
        values = floats(x)
        if values is None:
            raise InputError("x: wanted a float tensor (B, C, height, width)")
        check_pixels(values, tower.spec, self.spec.image)
        layers = tower.spec.blocks.layers
        numbers = range(layers - n, layers) if isinstance(n, int) else n
        taps = tuple(numbers) if isinstance(numbers, Sequence) else ()
        if not taps or any(not isinstance(t, int) or not 0 <= t < layers for t in taps):
            raise InputError(f"n: got {n!r}, wanted 1 to {layers}, or block numbers below {layers}")
        if list(taps) != sorted(set(taps)):
            raise InputError(f"n: got block numbers {n!r}, wanted them ascending and once each")
        outs = tower.layers(values, taps, norm)
        finite = torch.stack([torch.isfinite(out).flatten(1).all(dim=1) for out in outs]).all(dim=0)
        if not bool(finite.all()):
            item = int(finite.logical_not().nonzero()[0])
            where = self._first_bad_block(values[item : item + 1])
            raise VitrailError(f"get_intermediate_layers: image {item}: {where}")
        patches = [out[:, tower.spec.prefix :] for out in outs]
        if reshape:
            h, w = tower.spec.grid_at(tower.size(values))
            patches = [
                p.reshape(p.shape[0], h, w, p.shape[2]).permute(0, 3, 1, 2).contiguous()
                for p in patches
            ]
        if return_class_token:
            return tuple((p, out[:, 0]) for p, out in zip(patches, outs, strict=True))
        return tuple(patches)

    def as_module(self, tower: Literal["image", "text"] = "image") -> ImageModule | TextModule:
        """A tower as a torch.nn.Module, to stand inside a model that is compiled by torch.compile
        or captured into a CUDA graph; see `vitrail.model.module`.

        The text module takes every token that it is given, where `encode_text` takes those up to
        the pooled one. Raises InputError for a tower that the checkpoint has not.
        """
        if tower == "image":
            return ImageModule(self._vision_tower("as_module"))
        if tower == "text":
            return TextModule(self._text_tower("as_module"))
        raise InputError(f"tower: got {tower!r}, wanted 'image' or 'text'")


_Item = TypeVar("_Item")
_Rows = tuple[dict[int, Tensor], dict[int, VitrailError]]


def _at(position: int, error: VitrailError) -> VitrailError:
    """The same error, saying which image of the call it is about."""
    return type(error)(f"image {position}: {error}")


def _one_behind(items: Iterable[_Item]) -> Iterator[_Item]:
    """The items, each once the next one has been made."""
    previous: list[_Item] = []
    for item in items:
        yield from previous
        previous = [item]
    yield from previous


def _strings(what: str, values: Sequence[str]) -> tuple[str, ...]:
    if isinstance(values, str) or not values or not all(isinstance(v, str) for v in values):
        raise InputError(f"{what}: got {values!r:.80}, wanted a list of one string or more")
    return tuple(values)


def _raise_first(errors: Mapping[int, VitrailError], strict: bool) -> None:
    if errors and strict:
        raise errors[min(errors)]


def _in_order(rows: Mapping[int, Tensor], width: int, normalize: bool = False) -> Tensor:
    """Rows by position as one fp32 tensor (N, width) on the CPU, of unit length if wanted."""
    if not rows:
        return torch.empty(0, width, dtype=torch.float32, device="cpu")
    out = torch.stack([rows[position] for position in sorted(rows)]).cpu()
    return unit(out) if normalize else out
