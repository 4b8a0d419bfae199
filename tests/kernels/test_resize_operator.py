"""The resize operator against Pillow, bit for bit: its reference, and its CUDA kernels as a host
compiler sees them. Its Triton kernels are in interpreted/test_resize.py."""

from __future__ import annotations

import ctypes
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor

from image.samples import crop_pixels
from interpreted.guard import at_page_end
from vitrail.image.geometry import geometry
from vitrail.spec import ImageSpec
from vitrail_kernels import OPERATORS
from vitrail_kernels.compile import compile_call, identity
from vitrail_kernels.launch import Call, Target
from vitrail_kernels.ops.resize import resize_calls, resize_cost
from vitrail_kernels.ops.resize_tables import LINES, ResizeTables, resize_tables

CSRC = Path(__file__).parents[2] / "csrc"
FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
MODES = {1: "L", 3: "RGB", 4: "CMYK"}  # modes with an alpha are multiplied by it, in Pillow
SENTINEL = 0xA5
GUARD = 3
Pixels = npt.NDArray[np.uint8]
Size = tuple[int, int]
Run = Callable[[Tensor, Tensor, Tensor, ResizeTables], None]


class Batch(NamedTuple):
    """What one call resizes: images, to which sizes, and the window that is kept of each."""

    images: Sequence[Pixels]
    targets: Sequence[Size]
    corners: Sequence[Size]
    window: Size
    resample: int

    @property
    def channels(self) -> int:
        return int(self.images[0].shape[2])

    def tables(self) -> ResizeTables:
        return resize_tables(
            [(image.shape[0], image.shape[1]) for image in self.images],
            self.targets,
            self.corners,
            window=self.window,
            resample=self.resample,
            channels=self.channels,
        )

    def pixels(self) -> Tensor:
        return torch.from_numpy(np.concatenate([image.ravel() for image in self.images]))

    def describe(self, number: int) -> str:
        return (
            f"{self.images[number].shape} to {self.targets[number]}, window {self.window} from "
            f"{self.corners[number]}, filter {self.resample}"
        )


def pillow(batch: Batch) -> Tensor:
    """Whole passes of Pillow, across and then down, and its crop, which pads with zeros."""
    (height, width), windows = batch.window, []
    for pixels, (down, across), (top, left) in zip(*batch[:3], strict=True):
        size, code = (pixels.shape[1], pixels.shape[0]), Image.Resampling(batch.resample)
        image = Image.frombytes(MODES[batch.channels], size, pixels.tobytes())
        image = image.resize((across, image.height), code).resize((across, down), code)
        image = image.crop((left, top, left + width, top + height))
        windows.append(np.asarray(image).reshape(height, width, -1))
    return torch.from_numpy(np.stack(windows))


def resized(batch: Batch, run: Run) -> Tensor:
    """What ``run`` makes; all it reads and writes ends at a page that nobody may touch."""
    tables = batch.tables()
    shape = len(batch.images), *batch.window, batch.channels
    padded = torch.full((shape[0] + GUARD, *shape[1:]), SENTINEL, dtype=torch.uint8)
    padded = at_page_end(padded)
    middle = at_page_end(torch.full(tables.middle, SENTINEL, dtype=torch.uint8))
    pixels = batch.pixels()
    assert tables.pixels == len(pixels)
    images, groups, taps = map(at_page_end, tables[:3])
    tables = tables._replace(images=images, groups=groups, taps=taps)
    run(padded[GUARD:], middle, at_page_end(pixels), tables)
    assert (padded[:GUARD] == SENTINEL).all(), "wrote before its output"
    return padded[GUARD:]


def reference(out: Tensor, middle: Tensor, pixels: Tensor, tables: ResizeTables) -> None:
    OPERATORS["resize"].reference(out, middle, pixels, *tables[:3])


def differing(batch: Batch, run: Run, wanted: Tensor) -> list[str]:
    """The images that do not have the bits of ``wanted``."""
    result = resized(batch, run)
    wrong = (result != wanted).flatten(1).any(1).nonzero()
    return [batch.describe(int(number)) for number in wrong]


# -- random cases ----------------------------------------------------------------------------------


def content(draw: random.Random, height: int, width: int, channels: int) -> Pixels:
    """Noise, noise of 0 and 255 alone, which leaves the range on both sides, or a slope."""
    numbers = np.random.default_rng(draw.getrandbits(32))
    if draw.random() < 0.3:
        y, x, c = np.ogrid[:height, :width, :channels]
        return ((x * 255 // width + y * 255 // height + 40 * c) // 3).astype(np.uint8)
    noise = numbers.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return noise if draw.random() < 0.5 else np.where(noise < 128, 0, 255).astype(np.uint8)


def batches(count: int, seed: int) -> Iterator[Batch]:
    """``count`` images of sizes from 1 to 360, some 30,000 long, to sizes from 1 to 512."""
    draw = random.Random(seed)

    def side(top: float) -> int:
        return int(2 ** draw.uniform(0, top))

    while count > 0:
        images, targets, corners = [], [], []
        window, channels = (side(6), side(6)), draw.choice((1, 3, 3, 4))
        for _ in range(min(count, draw.randint(1, 20))):
            size = [side(8.5), side(8.5)]
            if draw.random() < 0.02:
                size = draw.choice(([1, 30_000], [30_000, 1], [1, 1]))
            target = [draw.choice((side(9), side(9), side(9), size[axis])) for axis in (0, 1)]
            corner = [draw.randint(-2, max(0, target[a] - window[a]) + 2) for a in (0, 1)]
            images.append(content(draw, *size, channels))
            targets.append((target[0], target[1]))
            corners.append((corner[0], corner[1]))
        yield Batch(images, targets, corners, window, draw.randrange(6))
        count -= len(images)


EXTREMES: dict[str, tuple[Size, Size, Size, Size]] = {  # size, target, corner, window
    "a pixel": ((1, 1), (1, 1), (0, 0), (1, 1)),
    "a pixel enlarged": ((1, 1), (9, 70), (1, 2), (7, 66)),
    "a line": ((1, 30_000), (3, 224), (0, 7), (3, 210)),
    "a line to a pixel": ((1, 5_000), (1, 1), (0, 0), (1, 1)),
    "a line enlarged": ((1, 30_000), (224, 1_000_003), (0, 499_888), (224, 224)),
    "a column": ((30_000, 1), (224, 3), (7, 0), (210, 3)),
    "a column enlarged": ((30_000, 1), (60_000, 5), (31_000, 0), (33, 5)),
    "a photo": ((375, 500), (224, 298), (0, 37), (224, 224)),
    "a photo enlarged": ((75, 50), (336, 224), (56, 0), (224, 224)),
    "one axis keeps its size": ((64, 90), (64, 40), (3, 1), (50, 38)),
    "the other keeps its size": ((90, 64), (40, 64), (1, 3), (38, 50)),
    "both keep their sizes": ((33, 40), (33, 40), (2, 5), (30, 21)),
    "padded on every side": ((20, 30), (10, 12), (-3, -5), (17, 20)),
    "a window beside the image": ((20, 30), (10, 12), (10, 3), (5, 5)),
    "a window left of the image": ((20, 30), (10, 12), (2, -6), (5, 5)),
}


def extreme(name: str, resample: int, channels: int = 3) -> Batch:
    size, target, corner, window = EXTREMES[name]
    image = content(random.Random(name), *size, channels)
    return Batch([image], [target], [corner], window, resample)


def expected(batch: Batch) -> Tensor:
    """`pillow`; of one line, where all of what it would make takes gigabytes."""
    ((down, across),) = batch.targets
    if down * across < 100_000_000:
        return pillow(batch)
    (image,), ((_, left),) = batch.images, batch.corners
    assert len(image) == 1, "every line of what a single line is enlarged to is the same"
    one = Batch([image], [(1, across)], [(0, left)], (1, batch.window[1]), batch.resample)
    return pillow(one).expand(-1, batch.window[0], -1, -1)


# -- the CUDA kernels as a host compiler sees them -------------------------------------------------

# resize.cu itself: its kernels, one thread after the other.
SHIM = """
#include <cstdint>
struct Place { unsigned x, y; };
static Place blockIdx, threadIdx;
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#include "resize.cu"

template <typename Kernel>
static void launch(unsigned blocks, unsigned x, unsigned y, Kernel kernel) {
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
        for (threadIdx.y = 0; threadIdx.y < y; ++threadIdx.y)
            for (threadIdx.x = 0; threadIdx.x < x; ++threadIdx.x) kernel();
}

extern "C" void host_resize(uint8_t* out, uint8_t* middle, const uint8_t* pixels,
                            const Image* images, const int32_t* groups, const int32_t* taps,
                            int32_t batch, int32_t group_count, int32_t height, int32_t width,
                            int32_t channels) {
    const int32_t numbers = width * channels, stride = (numbers + 15) / 16 * 16;
    launch(group_count * ((numbers + 31) / 32), 32, 4, [&] {
        vitrail_resize_across(middle, pixels, images, groups, taps, width, stride, channels);
    });
    launch(batch * ((height * (stride / 16) + 127) / 128), 128, 1, [&] {
        vitrail_resize_down(out, middle, images, taps, height, numbers, stride);
    });
}
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The kernels of resize.cu on the CPU; undefined behaviour ends the process."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("resize.cu on the host: no C++ compiler here")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.cpp").write_text(SHIM)
    options = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    options += ["-fsanitize=undefined", "-fno-sanitize-recover=undefined", f"-I{CSRC}"]
    library = folder / "shim.so"
    subprocess.run([compiler, *options, "-o", library, folder / "shim.cpp"], check=True)
    function = ctypes.CDLL(str(library)).host_resize

    def run(out: Tensor, middle: Tensor, pixels: Tensor, tables: ResizeTables) -> None:
        tensors = out, middle, pixels, *tables[:3]
        numbers = out.shape[0], tables.groups.numel(), *out.shape[1:]
        function(*(ctypes.c_void_p(t.data_ptr()) for t in tensors), *map(ctypes.c_int32, numbers))

    return run


# -- the bits --------------------------------------------------------------------------------------


def compare(count: int, seed: int, runs: Sequence[Run]) -> None:
    for batch in batches(count, seed):
        expected = pillow(batch)
        for run in runs:
            assert differing(batch, run, expected) == []


def test_random_resizes_have_the_bits_of_pillow(host: Run) -> None:
    compare(300, 1, (reference, host))


@pytest.mark.slow
def test_five_thousand_random_resizes_have_the_bits_of_pillow(host: Run) -> None:
    compare(5000, 2, (reference, host))


@pytest.mark.parametrize("resample", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_resizes_have_the_bits_of_pillow(name: str, resample: int, host: Run) -> None:
    batch = extreme(name, resample)
    wanted = expected(batch)
    assert differing(batch, reference, wanted) == []
    assert differing(batch, host, wanted) == []


SPECS = {
    "CLIP": ImageSpec(True, ("shortest", 224), 3, (224, 224), None, None, None),
    "ViT": ImageSpec(True, ("exact", 224, 224), 2, None, None, None, None),
    "padded": ImageSpec(True, ("shortest", 30), 1, (57, 64), None, None, None),
    "not resized": ImageSpec(True, None, 3, (40, 50), None, None, None),
}


@pytest.mark.parametrize("name", SPECS)
def test_it_is_what_the_engine_does_on_the_host(name: str, host: Run) -> None:
    """The engine's geometry in the operator's words, in one batch of mixed sizes."""
    spec, draw = SPECS[name], random.Random(name)
    sizes = [(375, 500), (333, 500), (500, 375), (40, 50), (64, 64), (480, 31), (1, 1)]
    images = [content(draw, *size, 3) for size in sizes]
    axes = [geometry(*size, spec) for size in sizes]
    corners = [(rows.start - rows.before, columns.start - columns.before) for rows, columns in axes]
    targets = [(rows.full, columns.full) for rows, columns in axes]
    batch = Batch(images, targets, corners, (axes[0][0].out, axes[0][1].out), spec.resample)
    expected = [torch.from_numpy(crop_pixels(image, spec)) for image in images]
    for run in (reference, host):
        assert differing(batch, run, torch.stack(expected)) == []


@pytest.mark.parametrize("resample", FILTERS.values(), ids=FILTERS)
def test_a_unit_in_the_last_place_of_a_weight_shows(resample: int, host: Run) -> None:
    """Enough pixels that one of them is near enough to a half, whichever weight it is."""
    for source, full, kept in ((262, 372, 34), (333, 224, 224), (97, 1000, 60)):
        lines = np.random.default_rng(resample).integers(
            0, 256, (source, 20_000, 1), dtype=np.uint8
        )
        corner = ((full - kept) // 2, 0)
        batch = Batch([lines], [(full, 20_000)], [corner], (kept, 20_000), resample)
        expected = pillow(batch)
        assert differing(batch, reference, expected) == []
        assert differing(batch, host, expected) == []


@pytest.mark.parametrize("width", [7, 8, 21, 22])
@pytest.mark.parametrize("shift", range(0, 16, 5))
def test_nothing_is_written_past_a_line(width: int, shift: int, host: Run) -> None:
    """Wherever the output begins: 16 bytes are stored together only where they all exist."""
    image = content(random.Random(width), 9, 30, 3)
    batch = Batch([image], [(5, 30)], [(2, 4)], (1, width), 3)
    tables, count = batch.tables(), 3 * width
    padded = torch.full((16 + count + 32,), SENTINEL, dtype=torch.uint8)
    out = padded[shift : shift + count].view(1, 1, width, 3)
    host(out, torch.empty(tables.middle, dtype=torch.uint8), batch.pixels(), tables)
    assert torch.equal(out, pillow(batch))
    assert (padded[:shift] == SENTINEL).all()
    assert (padded[shift + count :] == SENTINEL).all()


def test_no_image_is_no_work(host: Run) -> None:
    tables = resize_tables([], [], [], window=(4, 5), resample=3, channels=3)
    assert [t.numel() for t in tables[:3]] == [0, 0, 0]
    assert tables[3:] == ((0, 16), 0)
    empty = torch.empty(0, dtype=torch.uint8)
    for run in (reference, host):
        run(empty.view(0, 4, 5, 3), empty.view(0, 16), empty, tables)


def test_a_difference_is_seen(host: Run) -> None:
    """One weight off by 2^-15 shows; so would any other error of one in the last place."""
    batch = extreme("a photo", 3)
    expected = pillow(batch)

    def off(out: Tensor, middle: Tensor, pixels: Tensor, tables: ResizeTables) -> None:
        rows = int(tables.images[0, 6])
        tables.taps[rows + 2 * 224 : rows + 3 * 224] += 128
        host(out, middle, pixels, tables)

    assert differing(batch, off, expected) == [batch.describe(0)]


# -- the tables ------------------------------------------------------------------------------------


def test_only_the_lines_and_columns_that_reach_the_window_are_used() -> None:
    """A box of half the size reads twice as much as it keeps, and nothing else of the image."""
    image = content(random.Random(1), 480, 640, 3)
    batch = Batch([image], [(240, 320)], [(100, 30)], (10, 50), FILTERS["box"])
    tables = batch.tables()
    first, line, lines = tables.images[0, :3].tolist()
    assert divmod(first, line) == (200, 60 * 3)
    assert (line, lines) == (640 * 3, 20)
    assert tables.middle == (2 * LINES, 160)
    expected = resized(batch, reference)
    outside = np.ones_like(image, dtype=bool)
    outside[200:220, 60:160] = False
    image[outside] ^= 255
    assert torch.equal(resized(batch, reference), expected)
    image[219, 159] ^= 255
    assert not torch.equal(resized(batch, reference), expected)


def test_images_of_one_size_share_their_tables() -> None:
    sizes, targets = [(375, 500), (500, 375), (375, 500)], [(224, 298), (298, 224), (224, 298)]
    corners = [(0, 37), (37, 0), (0, 37)]
    one, many = (
        resize_tables(
            sizes[:n], targets[:n], corners[:n], window=(224, 224), resample=3, channels=3
        )
        for n in (1, 3)
    )
    assert torch.equal(one.taps, many.taps)
    columns, rows = many.images[:, 4].tolist(), many.images[:, 6].tolist()
    assert columns == [rows[1], rows[0], rows[1]]
    assert many.pixels == 3 * 375 * 500 * 3
    assert many.groups.tolist() == sorted(many.groups.tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputs": [(4, 4)]}, "got 2 sizes, 1 outputs and 2 corners"),
        ({"resample": 6}, "resample: got 6, wanted one of Pillow's 0 to 5"),
        ({"window": (4, 0)}, "of 0, wanted at least 1"),
        ({"sizes": [(9, 9), (-1, 9)]}, "of -1, wanted at least 1"),
        ({"channels": 0}, "of 0, wanted at least 1"),
        ({"sizes": [(9, 1 << 26), (9, 9)]}, "a line of 201326592 bytes, wanted less than 2"),
        ({"window": (4, 1 << 26)}, "a line of 201326592 bytes, wanted less than 2"),
    ],
)
def test_tables_that_cannot_be_made(change: dict[str, object], message: str) -> None:
    arguments = {
        "sizes": [(9, 9), (9, 9)],
        "outputs": [(4, 4), (5, 5)],
        "corners": [(0, 0), (0, 0)],
        "window": (4, 4),
        "resample": 3,
        "channels": 3,
    }
    with pytest.raises(ValueError, match=message):
        resize_tables(**(arguments | change))  # type: ignore[arg-type]


def test_the_cost_is_traffic_with_the_middle_twice() -> None:
    batch = extreme("padded on every side", 3)
    tables = batch.tables()
    out, middle = torch.empty(1, 17, 20, 3).byte(), torch.empty(tables.middle).byte()
    sizes = {"images": tables.images, "groups": tables.groups, "taps": tables.taps}
    cost = resize_cost(out=out, middle=middle, pixels=batch.pixels(), **sizes)
    tabled = 8 * tables.images.numel() + 4 * (tables.groups.numel() + tables.taps.numel())
    assert cost == (0, 17 * 20 * 3 + 2 * middle.numel() + 20 * 30 * 3 + tabled)


# -- what the kernels compile to -------------------------------------------------------------------

ARCHS = (80, 86, 89, 90, 100, 120)
KERNELS = ("vitrail_resize_across", "vitrail_resize_down")


def nvcc(folder: Path, *options: str) -> None:
    """Run the CUDA compiler on resize.cu in ``folder``; what is installed: test_packaging.py."""
    home = os.environ.get("CUDA_HOME")
    compiler = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if compiler is None:
        pytest.skip("resize.cu was not compiled: no nvcc in CUDA_HOME or PATH")
    for name in ("resize.cu", "resize.hpp"):
        shutil.copy(CSRC / name, folder)
    done = subprocess.run(
        [compiler, *options], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_the_cuda_kernels_wait_first_and_load_16_bytes(tmp_path: Path) -> None:
    """In PTX: no load of memory before the kernel before is done, and no floating point."""
    warnings = ("-Werror", "all-warnings")
    nvcc(tmp_path, "-std=c++17", "-O3", *warnings, "-ptx", "-arch=compute_90", "resize.cu")
    kernels = (tmp_path / "resize.ptx").read_text().split(".visible .entry ")[1:]
    assert [kernel.partition("(")[0] for kernel in kernels] == list(KERNELS)
    for kernel in kernels:
        assert kernel.count("griddepcontrol.wait;") == 1
        before, after = kernel.split("griddepcontrol.wait;")
        assert not re.search(r"\b(ld\.global|st\.global|bra|ret)\b", before)
        assert not re.search(r"\.f(16|32|64)\b|\.local\b", after)
    across, down = kernels
    assert "ld.global.u8" in across
    assert re.search(r"ld\.global\.v(2\.[ub]64|4\.[ub]32)", down)
    assert "ld.global.u8" not in down


def meta_calls(arch: int, batch: int, width: int, channels: int = 3, groups: int = 0) -> list[Call]:
    """The Triton kernels for ``batch`` windows of 224 lines."""

    def empty(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    groups = groups or 24 * batch
    return resize_calls(
        Target(arch, 132),
        empty(batch, 224, width, channels),
        empty(LINES * groups, 16 * -(-width * channels // 16)),
        empty(batch * 500 * 375 * channels),
        empty(batch, 8, dtype=torch.int64),
        empty(groups, dtype=torch.int32),
        empty(9000, dtype=torch.int32),
    )


compiled = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted: nothing is compiled"
)


@compiled
@pytest.mark.parametrize(
    "arch", [a if a in (80, 90) else pytest.param(a, marks=pytest.mark.slow) for a in ARCHS]
)
def test_the_triton_kernels_spill_nothing_and_load_16_bytes(arch: int) -> None:
    across, down = (compile_call(call, arch) for call in meta_calls(arch, 64, 224))
    for code in (across, down):
        assert (code.stack, code.spills) == (0, 0), code
        assert not any(name.startswith(("DFMA", "DADD", "DMUL")) for name in code.instructions)
        assert code.blocks >= 8, f"{code.name}: {code.blocks} blocks fit"
    # the four lines of a thread take a weight from its register
    assert (across.shared, across.instructions["BAR"]) == (0, 0)
    assert "sizePerThread = [1, 16]" in down.ttgir
    assert down.instructions["STG"] == 1, "16 bytes are not stored together"


@compiled
def test_no_size_of_images_or_batches_recompiles() -> None:
    expected = {identity(call) for call in meta_calls(90, 64, 224)}
    assert len(expected) == 2
    for batch, groups in ((1, 1), (1, 16), (3, 17), (16, 4000), (255, 6001)):
        assert {identity(call) for call in meta_calls(90, batch, 224, groups=groups)} == expected
    for width in (336, 448, 512):
        assert {identity(call) for call in meta_calls(90, 2, width)} == expected
