"""The calls from images and texts to embeddings and class scores that users' objects share."""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from vitrail.errors import InputError
from vitrail.model import arguments
from vitrail.model.arguments import Images, OnError, Size, Texts, sort_images
from vitrail.model.images import ImageEncoder
from vitrail.model.outputs import Classification, EncodeResult, PreprocessResult
from vitrail.model.preprocessor import Preprocessor
from vitrail.model.spreading import SpreadImages, SpreadTexts
from vitrail.model.texts import LabelCache, TextEncoder
from vitrail.spec import ModelSpec
from vitrail.text.tokenizer import Overflow
from vitrail.torch_modes import default_modes, public_call


class EncodingCalls:
    """The base of `Model` and `Replicas`, which set its attributes; an encoder is None without its
    tower."""

    spec: ModelSpec
    _images: ImageEncoder | SpreadImages | None
    _texts: TextEncoder | SpreadTexts | None
    _labels: LabelCache | None
    _logit_scale: float | None

    def _image_encoder(self, call: str) -> ImageEncoder | SpreadImages:
        if self._images is None:
            raise InputError(f"{call}: {self.spec.architecture} has no image tower")
        return self._images

    def _text_encoder(self, call: str) -> TextEncoder | SpreadTexts:
        if self._texts is None:
            raise InputError(f"{call}: {self.spec.architecture} has no text tower")
        return self._texts

    @property
    def preprocessor(self) -> Preprocessor:
        """`preprocess` as an object that pickles without weights, for workers that load images.

        Raises InputError: there is no image tower. CheckpointError: no preprocessor configuration.
        """
        return self._image_encoder("preprocess").preprocessor

    @overload
    def preprocess(
        self, images: Images, *, size: Size | None = ..., on_error: Literal["raise"] = ...
    ) -> Tensor: ...

    @overload
    def preprocess(
        self, images: Images, *, size: Size | None = ..., on_error: Literal["skip"]
    ) -> PreprocessResult: ...

    def preprocess(
        self, images: Images, *, size: Size | None = None, on_error: OnError = "raise"
    ) -> Tensor | PreprocessResult:
        """Images to ``pixel_values`` (N, channels, H, W) float32, bit for bit as the processor.

        ``images`` and ``size``: see `encode_image`; preprocessed floats are refused.
        ``on_error="skip"``: return a `PreprocessResult` of the images that succeed.

        Raises ImageError: an image cannot be read. InputError: a wrong argument, or images that
        come out in several sizes. CheckpointError: there is no preprocessor configuration.
        """
        return self.preprocessor(images, size=size, on_error=on_error)

    @default_modes()
    def tokenize(self, texts: str | Sequence[str], *, overflow: Overflow = "error") -> Tensor:
        """Texts to token ids (N, context) int64: begin token, text, end token, padding.

        ``overflow``: a text with too many tokens raises InputError ("error"), is cut with a warning
        ("warn"), or is cut silently ("truncate"). The end token is kept.
        """
        return self._text_encoder("tokenize").tokenize(texts, overflow)

    @overload
    def encode_image(
        self,
        images: Images,
        *,
        normalize: bool = ...,
        batch_size: int | None = ...,
        size: Size | None = ...,
        on_error: Literal["raise"] = ...,
        output_device: str | int | torch.device = ...,
    ) -> Tensor: ...

    @overload
    def encode_image(
        self,
        images: Images,
        *,
        normalize: bool = ...,
        batch_size: int | None = ...,
        size: Size | None = ...,
        on_error: Literal["skip"],
        output_device: str | int | torch.device = ...,
    ) -> EncodeResult: ...

    @public_call
    def encode_image(
        self,
        images: Images,
        *,
        normalize: bool = False,
        batch_size: int | None = None,
        size: Size | None = None,
        on_error: OnError = "raise",
        output_device: str | int | torch.device = "cpu",
    ) -> Tensor | EncodeResult:
        """Images to embeddings (N, D) float32. A single image gives (1, D), an empty list (0, D).

        ``images``: one image or a list of images, each a path, encoded bytes, a PIL image, or a
        uint8 array or tensor (H, W, C); or one uint8 array (N, H, W, C); or preprocessed floats
        (N, C, H, W). CLIP: the projected embedding. Other families: the class token after the final
        LayerNorm, never the tanh pooler.

        ``normalize``: to unit length. ``batch_size``: images computed at once; None: as many as the
        memory budget allows. ``size`` (H, W): preprocess to this size instead of the processor's;
        positions are interpolated. ``on_error="skip"``: return an `EncodeResult` of the images that
        succeed.

        Raises ImageError: an image cannot be read. InputError: a wrong argument. VitrailError: an
        embedding is not finite. CheckpointError: there is no preprocessor configuration.
        """
        arguments.check_options(batch_size, size, on_error)
        device = arguments.check_device(output_device, "output_device")
        encoder = self._image_encoder("encode_image")
        result = encoder.encode(sort_images(images), batch_size, size, on_error == "raise")
        embeddings = result.stacked(encoder.tower.spec.embedding, normalize=normalize).to(device)
        if on_error == "raise":
            return embeddings
        return EncodeResult(embeddings, result.index, result.reasons)

    @public_call
    def encode_text(
        self,
        texts: Texts,
        *,
        normalize: bool = False,
        batch_size: int | None = None,
        overflow: Overflow = "error",
        output_device: str | int | torch.device = "cpu",
    ) -> Tensor:
        """Texts to embeddings (N, D) float32. A single text gives (1, D), an empty list (0, D).

        ``texts``: a string or a list of strings; or token ids (N, T), or lists of ids of any
        lengths. ``normalize``, ``batch_size``: see `encode_image`. ``overflow``: see `tokenize`.
        Tokens after the end token are not computed, because the embedding cannot depend on them.

        Raises InputError: a text that is too long, ids out of range, or ids without an end token.
        VitrailError: an embedding is not finite.
        """
        encoder = self._text_encoder("encode_text")
        arguments.check_options(batch_size, None, "raise")
        device = arguments.check_device(output_device, "output_device")
        embeddings = encoder.encode(texts, normalize, batch_size, overflow)
        return embeddings.to(device)

    @public_call
    def classify(
        self,
        images: Images,
        labels: Sequence[str] | None = None,
        templates: Sequence[str] = ("a photo of a {}",),
        *,
        batch_size: int | None = None,
        size: Size | None = None,
        on_error: OnError = "raise",
        overflow: Overflow = "error",
    ) -> Classification:
        """Probabilities (N, L) over ``labels`` (zero-shot), or over the checkpoint's own labels.

        Zero-shot, for CLIP: each label is put into every template, for example "a photo of a cat".
        The unit-length text embeddings of a label are averaged and normalized again. Logits are
        their cosines with the image embedding, times the learned temperature. Label embeddings are
        cached. ``overflow`` is for labels with too many tokens, see `tokenize`.

        Without ``labels``: the classification head of the checkpoint. ``on_error="skip"``: the
        result lists the images that it has rows for. For the other arguments see `encode_image`.
        """
        arguments.check_options(batch_size, size, on_error)
        label_embeddings, scale = None, self._logit_scale
        if labels is None:
            if self.spec.head is None:
                raise InputError(
                    f"classify: {self.spec.architecture} has no classification head; "
                    "give labels to a CLIP checkpoint, or load one that was fine-tuned"
                )
            names, scores = self.spec.head.labels, self.spec.head.scores
        elif self._labels is None or scale is None:
            raise InputError(
                f"classify: {self.spec.architecture} has no image and text tower to compare "
                "labels with; leave labels out to use the checkpoint's own head"
            )
        else:
            names, scores = arguments.check_strings("labels", labels), "softmax"
            templates = arguments.check_strings("templates", templates)
            label_embeddings = self._labels.embeddings(names, templates, overflow)
        strict, encoder = on_error == "raise", self._image_encoder("classify")
        if label_embeddings is None or scale is None:
            result = encoder.encode(sort_images(images), batch_size, size, strict, scores=True)
            logits = result.stacked(len(names))
        else:
            result = encoder.encode(sort_images(images), batch_size, size, strict)
            embeddings = result.stacked(encoder.tower.spec.embedding, normalize=True)
            logits = scale * embeddings @ label_embeddings.t()
        probs = {"softmax": logits.softmax(dim=1), "sigmoid": logits.sigmoid(), "none": logits}
        return Classification(names, probs[scores], logits, result.index, result.reasons)
