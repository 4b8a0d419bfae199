"""How much faster int8 may be than fp16 on a GPU: an estimate from shapes, never a measurement.

The model: a launch on an H100 SXM takes the longest of three times, plus a ramp: its tiles, its
bytes at most of the bandwidth, and a floor. Each multiprocessor takes tiles in turn. A tile takes
the longer of its products and its operands' way from L2, plus its epilogue. If two blocks fit on a
multiprocessor, which `linear_int8_grouped` does not, half of the epilogue is hidden.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from vitrail.spec import BlockSpec, VisionSpec

CARD = "H100 SXM"
OPERATIONS = {"float16": 989e12, "int8": 1979e12}  # a second, dense: NVIDIA's data sheet
BANDWIDTH = 3.35e12  # bytes a second of memory: the same
MULTIPROCESSORS = 132  # the same
CLOCK = 1.755e9  # a second, under load
L2 = 8.5e12  # bytes a second: 36 a clock and multiprocessor, which public kernels reach
LANES = 128  # instructions of 32-bit arithmetic that a multiprocessor starts in a clock
REACHED = 0.85  # of the rate of large products, and of the bandwidth
REACHED_SMALL = 0.55  # of the rate of products in tiles smaller than 128 x 128
REACHED_ROWS = 0.8  # of the bandwidth, by `norm_quant`
FLOOR, RAMP = 2.0e-6, 0.7e-6  # seconds of the shortest launch; between two launches
FILL = 1.0e-6  # seconds until the first tiles are loaded
EPILOGUE = {"qkv": 8, "out": 14, "up": 22, "up to codes": 28, "down": 14}
"""Instructions an element of the compiled epilogues."""
GROUP, GROUP_SUM = 128, 2.3
"""Columns of a group of `linear_int8_grouped`; instructions an element and group."""
ATTENTION = {197: 300e12, 257: 320e12}  # FLOP/s by tokens, if the batch fills the card
ATTENTION_LONG, ATTENTION_FULL = 330e12, 8  # at other lengths; batch from which it is full

WORTHWHILE = 1.15
"""The estimated speed-up from which int8 is worth its loss of accuracy."""
BATCHES = (1, 16, 256)
"""The batch sizes of `describe`."""

Dtype = Literal["float16", "int8"]


class Launch(NamedTuple):
    """The time of a launch in seconds, and whether it is the shortest that a launch can take."""

    name: str
    seconds: float
    bytes: int
    shortest: bool


@dataclass(frozen=True, slots=True)
class Estimate:
    """Estimated seconds of all blocks of a pooled plan for ``batch`` images of ``size`` (height,
    width). Patch embedding and pooling, the same in both dtypes, are not among them.

    ``limits`` says in words why the speed-up is under `WORTHWHILE`, if it is.
    """

    batch: int
    size: tuple[int, int]
    float16: float
    int8: float
    limits: tuple[str, ...]

    @property
    def speedup(self) -> float:
        """How many times as fast int8 is as fp16: below 1 it is slower."""
        return self.float16 / self.int8

    @property
    def worthwhile(self) -> bool:
        return self.speedup >= WORTHWHILE


def estimate(
    spec: VisionSpec,
    batch: int,
    size: tuple[int, int] | None = None,
    linears: Collection[str] | None = None,
) -> Estimate:
    """The estimate for ``batch`` images of ``size`` (height, width), by default the checkpoint's.

    ``linears`` are those in int8, such as "3.qkv"; by default qkv, up and down of every block.
    """
    size = size or spec.image
    tokens, last = spec.tokens_at(size), spec.blocks.layers - 1
    before = 0.0
    after: list[Launch] = []
    for layer in range(spec.blocks.layers):
        names = {"qkv", "up", "down"}
        if linears is not None:
            names = {name for name in names if f"{layer}.{name}" in linears}
        launches = last_block if layer == last else block
        before += sum(launch.seconds for launch in launches(spec.blocks, batch, tokens))
        after += launches(spec.blocks, batch, tokens, names)
    total = sum(launch.seconds for launch in after)
    limits: tuple[str, ...] = ()
    if before / total < WORTHWHILE:
        limits = tuple(_limits(spec.blocks, tokens, after))
    return Estimate(batch, size, before, total, limits)


def describe(
    spec: VisionSpec,
    size: tuple[int, int] | None = None,
    linears: Collection[str] | None = None,
) -> list[str]:
    """The estimates for `BATCHES` in a line, and a line that says why int8 wins little in some."""
    rows = [estimate(spec, batch, size, linears) for batch in BATCHES]
    figures = ", ".join(f"{row.speedup:.2f}x at batch {row.batch}" for row in rows)
    height, width = rows[0].size
    lines = [
        f"an estimate, not a measurement: int8 against fp16 on an {CARD}, blocks alone, "
        f"{height}x{width} pixels: {figures}"
    ]
    small = [row for row in rows if not row.worthwhile]
    if small:
        batches = ", ".join(f"{row.batch}" for row in small)
        causes = dict.fromkeys(cause for row in small for cause in row.limits)
        lines.append(f"under {WORTHWHILE}x at batch {batches}: {'; '.join(causes)}")
    return lines


def block(
    spec: BlockSpec, batch: int, tokens: int, int8: Collection[str] = ()
) -> tuple[Launch, ...]:
    """The launches of a block for ``batch`` sequences of ``tokens``. ``int8`` are the linears in
    int8, of "qkv", "up" and "down"; down only with up."""
    m, c, f = batch * tokens, spec.width, spec.mlp
    rows_up = 2 * f if spec.gated else f
    groups = "down" in int8
    if groups:
        f = math.ceil(f / GROUP) * GROUP
    launches = [_norm_quant(m, c)] if "qkv" in int8 else []
    launches += [
        _linear("qkv", m, 3 * c, c, int8, 6 * m * c),
        _attention(m, tokens, c, batch),
        _linear("out", m, c, c, (), 4 * m * c),
    ]
    launches += [_norm_quant(m, c)] if "up" in int8 else []
    written = m * f if groups else 2 * m * f
    launches += [
        _linear("up", m, rows_up, c, int8, written, "up to codes" if groups else "up"),
        _linear("down", m, c, f, int8, 4 * m * c),
    ]
    return tuple(launches)


def last_block(
    spec: BlockSpec, batch: int, tokens: int, int8: Collection[str] = ()
) -> tuple[Launch, ...]:
    """The launches of the last block of a pooled plan. Only keys and values are of every token;
    they are in int8 if ``int8`` has "qkv", and up and down never are."""
    m, c = batch * tokens, spec.width
    launches = [_norm_quant(m, c)] if "qkv" in int8 else []
    return (
        *launches,
        _linear("qkv", m, 2 * c, c, int8, 4 * m * c),
        _linear("qkv", batch, c, c, (), 4 * batch * c),
        _launch("attention", 0.0, 4 * m * c, REACHED),
        *block(spec, batch, 1)[2:],
    )


def _linear(
    name: str, m: int, n: int, k: int, int8: Collection[str], more_bytes: int, epilogue: str = ""
) -> Launch:
    """A product (M, K) x (K, N). ``more_bytes``: all but its two operands."""
    dtype: Dtype = "int8" if name in int8 else "float16"
    rows, columns = 128, 128
    if math.ceil(m / rows) * math.ceil(n / columns) < MULTIPROCESSORS:
        rows, columns = 64, 64
    if math.ceil(m / rows) * math.ceil(n / columns) < MULTIPROCESSORS // 2:
        rows, columns = 64, 32
    tiles = math.ceil(m / rows) * math.ceil(n / columns)
    size = 1 if dtype == "int8" else 2
    reached = REACHED if rows == columns == 128 else REACHED_SMALL
    products = 2 * rows * columns * k / (OPERATIONS[dtype] / MULTIPROCESSORS * reached)
    operands = (rows + columns) * k * size / (L2 / min(MULTIPROCESSORS, tiles))
    instructions = EPILOGUE[epilogue or name] / 2
    if name == "down" and dtype == "int8":
        instructions = EPILOGUE[name] + GROUP_SUM * k / GROUP
    tile = max(products, operands) + instructions * rows * columns / (LANES * CLOCK)
    turns = tiles / MULTIPROCESSORS
    if tiles <= 4 * MULTIPROCESSORS:
        turns = math.ceil(turns)
    moved = (m + n) * k * size + more_bytes
    return _launch(name, turns * tile + FILL, moved, REACHED)


def _attention(m: int, tokens: int, width: int, batch: int) -> Launch:
    rate = ATTENTION.get(tokens, ATTENTION_LONG)
    if batch < ATTENTION_FULL:
        rate /= 3
    return _launch("attention", 4 * m * tokens * width / rate, 8 * m * width, REACHED)


def _norm_quant(m: int, width: int) -> Launch:
    return _launch("norm_quant", 0.0, 3 * m * width, REACHED_ROWS)


def _launch(name: str, seconds: float, moved: int, reached: float) -> Launch:
    seconds = max(seconds, moved / (reached * BANDWIDTH))
    return Launch(name, max(seconds, FLOOR) + RAMP, moved, seconds <= FLOOR)


def _limits(spec: BlockSpec, tokens: int, launches: list[Launch]) -> Iterator[str]:
    """Why int8 wins little: every cause with a large part of its time, else the kept linears."""
    total = sum(launch.seconds for launch in launches)
    shortest = sum(launch.seconds for launch in launches if launch.shortest)
    attention = sum(launch.seconds for launch in launches if launch.name == "attention")
    causes = []
    if shortest > 0.2 * total:
        causes.append("few rows: launches cannot be shorter, and int8 has more of them")
    if attention > 0.3 * total:
        causes.append(f"attention over {tokens} tokens stays in fp16")
    if spec.width <= 512:
        causes.append(f"width {spec.width}: epilogues take longer than products")
    yield from causes or ["too few linears are in int8"]
