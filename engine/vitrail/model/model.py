"""`Model`, the users' class: images and texts in; embeddings, class scores and features out."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

from torch import Tensor

from vitrail import fork
from vitrail.checkpoint.files import Checkpoint
from vitrail.dtypes import dtype_name
from vitrail.errors import InputError
from vitrail.image.decoding import SixteenBit
from vitrail.model import arguments
from vitrail.model.advice import ModuleAdvice
from vitrail.model.arguments import Resize
from vitrail.model.encoding import EncodingCalls
from vitrail.model.fingerprint import Fingerprint, fingerprint
from vitrail.model.forward import forward_pair, forward_text, forward_vision
from vitrail.model.images import ImageEncoder
from vitrail.model.layers import intermediate_layers
from vitrail.model.load_arguments import LoadArguments
from vitrail.model.loaded_towers import LoadedTowers
from vitrail.model.module import ImageModule, TextModule
from vitrail.model.outputs import Output
from vitrail.model.texts import LabelCache, TextEncoder
from vitrail.runtime.runner import Runner
from vitrail.runtime.towers import TextTower, VisionTower
from vitrail.spec import ModelSpec
from vitrail.text.tokenizer_files import load_tokenizer
from vitrail.torch_modes import public_call
from vitrail.tower_operators import add_model


class Model(EncodingCalls, ModuleAdvice):
    """A loaded checkpoint. Any number of threads may call it at once.

    Attributes: ``spec`` (`ModelSpec`: architecture, sizes, preprocessing), ``source`` (the path or
    hub id that was loaded), ``name`` (the hub id, or the folder's own name: what leaves the machine
    holds no path of it), ``revision`` (the commit of a hub id), ``folder`` (its files), ``device``,
    ``dtype`` (of the computation), ``precision`` ("int8" if the weights are, else the dtype's
    name), ``backend`` ("native", "triton" or "torch"), ``weight_bytes`` (on the device), ``resize``
    (the place and the kernels that resize images), ``memory_limit`` (bytes that it may hold beyond
    the weights; None: no limit), ``load_arguments`` (`LoadArguments`: what `load_again` needs; None
    if `load` did not make the model).
    """

    _images: ImageEncoder | None
    _texts: TextEncoder | None

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        hash_weights: Callable[[], str],
        runner: Runner,
        sixteen_bit: SixteenBit = "scale",
        resize: Resize = "host",
        load_arguments: LoadArguments | None = None,
    ) -> None:
        """Users call `vitrail.load`. ``runner`` holds the weights that ``hash_weights`` hashes."""
        self.load_arguments = load_arguments
        self.spec, self.source, self.folder = spec, checkpoint.source, checkpoint.folder
        self.name, self.revision = checkpoint.name, checkpoint.revision
        self.device, self.dtype, self.backend = runner.device, runner.dtype, runner.name
        self.precision = "int8" if spec.int8 else dtype_name(runner.dtype)
        self.weight_bytes = runner.weights.arena.numel()
        self.memory_limit = runner.budget.limit
        self.resize = "host" if resize == "host" else f"device, by {runner.resizer}"
        identity, version = runner.identity, runner.version
        self._runner, self._sixteen_bit = runner, sixteen_bit
        self._make_fingerprint: Callable[[], Fingerprint] = lambda: fingerprint(
            checkpoint, spec, hash_weights(), runner.dtype, identity, version, sixteen_bit
        )
        self._vision = VisionTower(spec.vision, spec.head, runner) if spec.vision else None
        self._text = TextTower(spec.text, runner) if spec.text else None
        self._images, self._texts, self._labels = None, None, None
        if self._vision is not None:
            resizer = None if resize == "host" else runner
            self._images = ImageEncoder(
                self._vision, spec.image, resizer, sixteen_bit, checkpoint.folder
            )
        if self._text is not None:
            tokenizer = functools.partial(load_tokenizer, checkpoint, self._text.spec)
            self._texts = TextEncoder(self._text, tokenizer)
            self._labels = LabelCache(self._texts)
        self._logit_scale = runner.weights.logit_scale
        add_model(self)

    def __repr__(self) -> str:
        return (
            f"<vitrail.Model {self.spec.architecture} from {str(self.source)!r}: "
            f"{self.spec.parameters / 1e6:.1f} M parameters, {self.precision} on "
            f"{self.device}, {self.backend} backend>"
        )

    @property
    def held_bytes(self) -> int:
        """Bytes that the model holds on its device beyond its weights: position tables, and on the
        CPU the activation arenas that wait for its next call. With a memory limit, calls under way
        count too, and no arena waits. On a GPU PyTorch's allocator keeps freed memory for all."""
        return self._runner.held_bytes

    def trim(self) -> int:
        """Give memory back that the next call would use again; returns the bytes.

        That is `held_bytes`, but for calls under way and position tables that a CUDA graph was
        captured with; on the CPU the idle arenas of all models of the process; on a GPU all memory
        of the process that PyTorch keeps unused. Later calls give the same bits. Embeddings of
        labels stay: they are results, and lie on the CPU.
        """
        return self._runner.trim()

    @property
    def fingerprint(self) -> str:
        """64 hex digits: models with equal fingerprints give the same bits.

        On a CPU that is in the same batches with the same number of PyTorch's threads.

        A hash of the weights, the spec with its preprocessing, the tokenizer files, the dtype, the
        backend and the version of Vitrail. The version is this one; for an exported folder on the
        native backend, whose own plans and kernels compute, it is the version that exported. So
        such a folder keeps its fingerprint in later versions, as in C++. The first use reads all
        weights. Raises CheckpointError if the files have changed since loading.
        """
        return self.fingerprint_content.digits

    @fork.CachedProperty
    def fingerprint_content(self) -> Fingerprint:
        """The fingerprint with what it was computed from, part by part. Errors: as there."""
        return self._make_fingerprint()

    @fork.CachedProperty
    def towers(self) -> LoadedTowers:
        """The towers under the model's fingerprint, for modules. Errors: see `fingerprint`."""
        return LoadedTowers(
            self._vision,
            self._text,
            self._runner,
            self.fingerprint_content,
            self._load_call(),
            self.load_arguments,
        )

    def _load_call(self) -> str:
        """See `vitrail.tower_operators.embed_image`."""
        options = {
            "revision": self.revision,
            "device": "{device}",
            "dtype": self.precision,
            "backend": None if self.device.type == "cpu" else self.backend,
            "sixteen_bit": None if self._sixteen_bit == "scale" else self._sixteen_bit,
            "memory_limit": self.memory_limit,
        }
        words = [repr(self.name)]
        words += [f"{name}={value!r}" for name, value in options.items() if value is not None]
        version = self.fingerprint_content.parts["version"]
        return f"vitrail.load({', '.join(words)}) of Vitrail {version}"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # nothing about a model can change

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as the arguments that load the model again and the fingerprint it must have.

        The first time reads all weights. Raises InputError if `load` did not make the model.
        """
        from vitrail.model import pickled

        return pickled.load_model, pickled.state(self.load_arguments, self.fingerprint_content)

    @public_call
    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
    ) -> Output:
        """The output fields of the checkpoint's transformers class, on the model's device.

        ``pixel_values`` (B, C, H, W): floats of any size from one patch up; positions are
        interpolated, and pixels beyond the last whole patch are dropped. ``input_ids`` (B, T):
        int32 or int64; a row without an end token is pooled at its first token, as in transformers.
        ``attention_mask`` (B, T): ones, then zeros. A CLIPModel also takes a single input.
        ``output_hidden_states``: also return the residual stream of every block.

        `Output.status` tells which items are finite. The values of pixels on a GPU are not checked,
        because the check would wait for the GPU. Raises InputError for a wrong argument.
        """
        if pixel_values is None and input_ids is None:
            raise InputError("forward: got neither pixel_values nor input_ids")
        if attention_mask is not None and input_ids is None:
            raise InputError("forward: got attention_mask without input_ids")
        vision = text = None
        if pixel_values is not None:
            tower = self._image_encoder("pixel_values").tower
            pixels = arguments.required_pixels(
                "pixel_values", pixel_values, tower.spec, self.spec.image, wait=False
            )
            vision = forward_vision(tower, self.spec, pixels, output_hidden_states)
        if input_ids is not None:
            text_tower = self._text_encoder("input_ids").tower
            ids = arguments.check_id_tensor(input_ids, text_tower.spec)
            kv_lens = None
            if attention_mask is not None:
                kv_lens = arguments.mask_lengths(attention_mask, ids)
            text = forward_text(text_tower, self.spec, ids, kv_lens, output_hidden_states)
        if self._logit_scale is not None:
            return forward_pair(vision, text, self._logit_scale)
        output = vision or text
        assert output is not None, "one tower ran"
        return output

    __call__ = forward

    @public_call
    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
        """Patch tokens after some of the blocks, with the signature and the values of DINOv2.

        ``x`` (B, channels, H, W): preprocessed floats. ``n``: the number of last blocks, or block
        numbers from 0, ascending. Returns for each block the patch tokens (B, h w, C), or
        (B, C, h, w) with ``reshape``; with ``return_class_token`` the pair of patch tokens and
        class token (B, C). ``norm``: apply the final LayerNorm.
        Source: `get_intermediate_layers` of facebookresearch/dinov2, vision_transformer.py.

        Raises InputError: a wrong argument. VitrailError: an item that is not finite.
        """
        tower = self._image_encoder("get_intermediate_layers").tower
        pixels = arguments.required_pixels("x", x, tower.spec, self.spec.image)
        return intermediate_layers(tower, pixels, n, reshape, return_class_token, norm)

    def as_module(self, tower: Literal["image", "text"] = "image") -> ImageModule | TextModule:
        """A tower as a torch.nn.Module, for torch.compile and CUDA graphs (`vitrail.model.module`).

        The module computes by the model's fingerprint, so the first call reads all weights. The
        text module computes every token that it is given; `encode_text` stops at the end token.
        Raises InputError if the checkpoint has no such tower; CheckpointError as `fingerprint`.
        """
        if tower == "image":
            return ImageModule(self.towers, self._image_encoder("as_module").tower)
        if tower == "text":
            return TextModule(self.towers, self._text_encoder("as_module").tower)
        raise InputError(f"tower: got {tower!r}, wanted 'image' or 'text'")
