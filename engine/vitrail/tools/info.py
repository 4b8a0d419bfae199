"""The facts that ``vitrail info`` prints, from configurations and headers (not from weights)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vitrail.checkpoint.contents import INT8
from vitrail.checkpoint.files import Checkpoint, open_checkpoint
from vitrail.dtypes import dtype_name
from vitrail.exported.contents import WEIGHTS
from vitrail.exported.folder import ExportFolder, open_exported
from vitrail.int8.record import parse_record, read_record
from vitrail.plan.record import KERNEL_ABI, PLAN_GRAMMAR
from vitrail.spec import BlockSpec, HeadSpec, ImageSpec, ModelSpec, TextSpec, VisionSpec
from vitrail.zoo import map_tensors, read_spec

if TYPE_CHECKING:
    import torch

INTERPRETER = "TRITON_INTERPRET=1 runs the kernels on the CPU, slowly: backend='triton'"
FEATURES = {
    "class": "the class token",
    "class_mean": "class token and mean of the patches",
    "class_distillation": "class token and distillation token",
}
FILTERS = ("nearest", "Lanczos", "bilinear", "bicubic", "box", "Hamming")


def read(
    name: str,
    revision: str | None = None,
    local_files_only: bool = False,
    memory_limit: int | str | None = None,
) -> tuple[ModelSpec, dict[str, Any]]:
    """The spec, and facts ready for JSON: files, stored dtypes, and the backend on this machine.

    ``memory_limit``: as `vitrail.load`. Raises CheckpointError, as loading would, if Vitrail does
    not support the checkpoint; InputError: a limit that is no number of bytes.
    """
    exported = open_exported(name, revision)
    if exported is not None:
        checkpoint, spec = exported.checkpoint(), exported.spec
        files, count = [WEIGHTS], exported.arena_bytes
        stored = {dtype_name(exported.dtype): 1}
    else:
        checkpoint = open_checkpoint(name, revision=revision, local_files_only=local_files_only)
        spec = read_spec(checkpoint)
        map_tensors(checkpoint, spec)
        entries = checkpoint.tensors.values()
        files, count = sorted({e.file.name for e in entries}), sum(e.nbytes for e in entries)
        stored = dict(Counter(entry.dtype for entry in entries).most_common())
    facts = {
        "source": checkpoint.source,
        "folder": str(checkpoint.folder),
        "revision": checkpoint.revision,
        "parameters": spec.parameters,
        "files": files,
        "bytes": count,
        "tensors": stored,
        "tokenizer": _tokenizer_files(checkpoint),
        "serving": _serving(exported, spec.int8),
        "memory": _memory(spec, exported, memory_limit),
        "spec": spec.to_dict(),
    }
    if checkpoint.int8 is not None:
        read_record(checkpoint)  # refuses a damaged record
        facts["int8"] = {key: value for key, value in checkpoint.int8.items() if key != "spec"}
    if exported is not None:
        record = exported.record
        facts["exported"] = (
            f"from {record.source} for {exported.architectures}: {exported.extent}; by Vitrail "
            f"{record.version}, plan grammar {PLAN_GRAMMAR}, kernel ABI {KERNEL_ABI}"
        )
    return spec, facts


def describe(spec: ModelSpec, facts: dict[str, Any]) -> str:
    """The spec and the facts in words, a line per topic."""
    lines = list(_lines(spec, facts))
    width = max(len(topic) for topic, _ in lines)
    return "\n".join(f"{topic:<{width}}  {text}" for topic, text in lines)


def _lines(spec: ModelSpec, facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    revision = f" at {facts['revision']}" if facts["revision"] else ""
    yield "model", f"{spec.architecture} (family {spec.family}), {spec.parameters:,} parameters"
    yield "source", f"{facts['source']}{revision}"
    stored = ", ".join(f"{count} {dtype}" for dtype, count in facts["tensors"].items())
    size = facts["bytes"] / 1e6
    yield "weights", f"{', '.join(facts['files'])}: {size:,.1f} MB, tensors: {stored}; complete"
    if "exported" in facts:
        yield "exported", facts["exported"]
    if spec.vision is not None:
        yield from _vision_lines(spec.vision)
        yield "images", _preprocessing(spec.image)
        yield from _int8_lines(spec.vision, facts)
    if spec.text is not None:
        yield from _text_lines(spec.text, facts["tokenizer"])
    if spec.head is not None:
        yield "head", _head(spec.head)
    yield from facts["serving"].items()
    yield "memory", _in_words(facts["memory"])
    if "fingerprint" in facts:
        yield "fingerprint", facts["fingerprint"]


def _blocks(blocks: BlockSpec) -> str:
    gate = "gated " if blocks.gated else ""
    extras = ", causal" * blocks.causal + ", LayerScale" * blocks.layer_scale
    return (
        f"{blocks.layers} layers, width {blocks.width}, {blocks.heads} heads of {blocks.head_dim}, "
        f"MLP {blocks.mlp} {gate}{blocks.activation}, LayerNorm eps {blocks.eps:g}"
        f"{extras}{'' if blocks.qkv_bias else ', no qkv bias'}"
    )


def _vision_lines(vision: VisionSpec) -> Iterator[tuple[str, str]]:
    rows, columns = vision.grid
    prefix = "class, distillation" if vision.distillation else "class"
    registers = f", {vision.registers} registers" if vision.registers else ""
    yield "image tower", _blocks(vision.blocks)
    yield (
        "tokens",
        f"{prefix}{registers}, {rows}x{columns} patches of {_sides(vision.patch)} from "
        f"{vision.channels}x{_sides(vision.image)} pixels{'; LayerNorm first' * vision.pre_norm}",
    )
    antialias = "with" if vision.position_antialias else "without"
    yield "positions", f"{vision.positions} learned; other sizes: bicubic {antialias} antialiasing"
    projected = f", projected to {vision.projection}" if vision.projection else ""
    yield (
        "embedding",
        f"class token after the final LayerNorm{projected}: {vision.embedding} numbers"
        f"{'; the pooler is left out' * (vision.pooler is not None)}",
    )


def _int8_lines(vision: VisionSpec, facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The linears that are int8, and the record of the folder; an exported folder has none."""
    count = len(vision.blocks.int8)
    if count == 0:
        return
    text = f"{count} of the {3 * vision.blocks.layers} qkv, up and down projections"
    if "int8" not in facts:
        yield "int8", text
        return
    record = parse_record(facts["int8"] | {"spec": facts["spec"]}, INT8)
    source, recipe, calibration = record.source, record.recipe, record.calibration
    yield (
        "int8",
        f"{text}, made from {source.name} by Vitrail {record.version}: smoothing {recipe.alpha:g}, "
        f"rounding {recipe.rounding}, groups of {recipe.group} columns",
    )
    reasons: dict[str, list[str]] = {}
    for linear, reason in record.float_linears.items():
        reasons.setdefault(reason, []).append(linear)
    for reason, linears in reasons.items():
        yield "in 16 bits", f"{', '.join(linears)}: {reason}"
    pictures = "crops of the sample photos" if calibration.origin == "bundled" else "own pictures"
    yield "calibration", f"{calibration.pictures} {pictures}"
    for topic, words in record.guard.lines():
        if not topic.endswith("in 16 bits"):
            yield topic, words


def _text_lines(text: TextSpec, tokenizer: str | None) -> Iterator[tuple[str, str]]:
    token = f"with id {text.eos}" if text.eos is not None else "with the highest id"
    projected = f", projected to {text.projection}" if text.projection else ""
    yield "text tower", _blocks(text.blocks)
    yield (
        "pooled at",
        f"the first token {token}, after the final LayerNorm{projected}: {text.embedding} numbers",
    )
    yield (
        "texts",
        f"{tokenizer or 'no tokenizer in the folder: token ids only'}; vocabulary {text.vocab}, "
        f"at most {text.context} tokens; a longer text is an error unless truncation is on",
    )


def _preprocessing(image: ImageSpec | None) -> str:
    if image is None:
        return "no preprocessor in the folder: preprocessed float pixels only"
    steps = ["to RGB"] * image.convert_rgb
    if image.resize is not None:
        size = (
            f"shortest edge to {image.resize[1]}"
            if image.resize[0] == "shortest"
            else f"resize to {_sides(image.resize[1:])}"
        )
        steps.append(f"{size} ({FILTERS[image.resample]})")
    if image.crop is not None:
        steps.append(f"center crop {_sides(image.crop)}")
    if image.rescale is not None:
        steps.append(f"times {image.rescale:.6g}")
    if image.mean is not None and image.std is not None:
        mean, std = (", ".join(f"{x:g}" for x in values) for values in (image.mean, image.std))
        steps.append(f"minus mean ({mean}), by std ({std})")
    return ", ".join(steps) or "used as they are"


def _head(head: HeadSpec) -> str:
    examples = ", ".join(head.labels[:3]) + ", ..." * (len(head.labels) > 3)
    return f"{len(head.labels)} labels from {FEATURES[head.features]}: {examples}"


def _sides(pair: tuple[int, ...]) -> str:
    return f"{pair[0]}x{pair[1]}"


def _tokenizer_files(checkpoint: Checkpoint) -> str | None:
    if checkpoint.file("tokenizer.json") is not None:
        return "tokenizer.json"
    both = checkpoint.file("vocab.json") is not None and checkpoint.file("merges.txt") is not None
    return "vocab.json and merges.txt" if both else None


def _serving(exported: ExportFolder | None = None, int8: bool = False) -> dict[str, str]:
    """The backend and device that would run the model, and the state of kernels and extension."""
    import torch

    from vitrail.cuda import cuda_capability, why_no_cuda
    from vitrail.runtime import why_not_kernels, why_not_native
    from vitrail_kernels.launch import MISSING, TMA, Target, triton_version

    name, dtype, device = _chosen(exported)
    cuda = device.type == "cuda"
    if name == "torch":
        unused = why_no_cuda() if not cuda and _sees_gpu() else None
        reason = unused or why_not_kernels(dtype, device) or INTERPRETER
        backend = f"torch (PyTorch {torch.__version__}; {reason})"
    elif name == "triton":
        backend = f"triton (Vitrail's kernels; {why_not_native(dtype, device, exported)})"
    else:
        backend = f"{name} (Vitrail's kernels)"
    kernels = str(MISSING) if MISSING is not None else f"triton {triton_version()}"
    if name != "torch":
        major, minor = cuda_capability(device)
        if Target(10 * major + minor, 1).without_tma:
            kernels += f", without TMA ({TMA}=0)"
    return {
        "backend": f"{backend} on {device.type.upper()}, {'int8 and ' * int8}{dtype_name(dtype)}",
        "kernels": f"{kernels}; resize: {_resize(name)}",
        "native": _native(),
    }


def _chosen(exported: ExportFolder | None) -> tuple[str, torch.dtype, torch.device]:
    """The backend, the dtype and the device that `vitrail.load` would choose."""
    import torch

    from vitrail.runtime import choose

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.float16 if cuda else torch.float32
    dtype = dtype if exported is None else exported.dtype
    return choose("auto", dtype, device, exported), dtype, device


def _memory(
    spec: ModelSpec, exported: ExportFolder | None, limit: int | str | None
) -> dict[str, int | None]:
    """Bytes of the weights on the device, the limit of the rest, and the items of a call then.

    ``one_item``, the bytes that one item needs, is None without a limit: on the backend "torch" it
    takes the import of torch._dynamo, which is as long as all else that `vitrail info` does.
    """
    from vitrail.model.capacity import Capacity
    from vitrail.runtime import RUNNERS
    from vitrail.runtime.budget import parse_memory_limit
    from vitrail.weights.layout import arena_bytes

    name, dtype, device = _chosen(exported)
    capacity, parsed = Capacity(spec, RUNNERS[name], dtype), parse_memory_limit(limit)
    return {
        "weights": arena_bytes(spec, dtype),
        "limit": parsed,
        "one_item": None if parsed is None else capacity.one_item()[0],
        "images": capacity.images(parsed),
        "texts": capacity.texts(parsed, device),
    }


def _in_words(memory: dict[str, Any]) -> str:
    limit, one_item, items = memory["limit"], memory["one_item"], []
    weights = f"weights {memory['weights'] / 1e6:,.1f} MB on the device"
    if memory["images"] is not None:
        items.append(f"{memory['images']} images")
    if memory["texts"] is not None:
        items.append(f"{memory['texts']} whole texts")
    call = f"a call has {' or '.join(items)}"
    if limit is None:
        return f"{weights}, no limit beside them: {call}"
    needed = f"one item needs {one_item / 1e6:,.1f} MB"
    if limit < one_item:
        return f"{weights}; a limit of {limit:,} bytes beside them is too small: {needed}"
    return f"{weights}, {limit / 1e6:,.1f} MB beside them: {call}, and {needed}"


def _resize(backend: str, library: str | None = None) -> str:
    """The code that resizes images on a device, if the driver loads it."""
    from vitrail.runtime.cuda_resize import CudaResize, open_resize
    from vitrail.runtime.native import DRIVER
    from vitrail_kernels.cuda_binary import cuda_binary

    if backend != "native":
        return str(cuda_binary("resize") or "Triton, no CUDA binary was built")
    from vitrail import _C

    try:
        resize = open_resize(_C.Gpu(library or DRIVER, 0))
    except RuntimeError as error:
        return f"unknown: {error}"
    return str(resize.binary) if isinstance(resize, CudaResize) else f"Triton, since {resize}"


def _sees_gpu() -> bool:
    """Whether the driver or PyTorch counts a GPU, even one that cannot be used."""
    import torch

    from vitrail.runtime.native import MISSING

    if MISSING is None:
        from vitrail import _C

        if _C.driver().devices:
            return True
    return torch.cuda.device_count() > 0


def _native() -> str:
    from vitrail.runtime.native import MISSING

    if MISSING is not None:
        return str(MISSING)
    from vitrail import _C

    driver = _C.driver()
    if not driver.available:
        return f"vitrail._C {_C.version()}; no GPU: {driver.reason}"
    names = ", ".join(
        f"{gpu.name} (sm_{''.join(map(str, gpu.capability))})" for gpu in driver.devices
    )
    cuda = f"CUDA {driver.version // 1000}.{driver.version % 1000 // 10}"
    return f"vitrail._C {_C.version()}; {cuda}: {names}"
