"""libvitrail: its own test program and its example against the driver stand-in, what reaches the
device, and every folder that it must refuse."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import export_folder
import standin
from exported import make_golden
from vitrail._version import __version__
from vitrail.exported.digest import hash_file
from vitrail.plan.record import KERNEL_ABI, PLAN_GRAMMAR, magic
from vitrail_kernels.launch import MISSING, interpreted

pytestmark = pytest.mark.skipif(
    MISSING is not None or interpreted() or not standin.compiler() or not shutil.which("make"),
    reason="libvitrail: needs triton's compiler, a C++ compiler and make",
)

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "build/native"
OK, INVALID, BAD_FOLDER, NO_DEVICE, DEVICE, OUT_OF_MEMORY, NOT_FINITE = range(7)
RECORD, SUMMARY, WEIGHTS = "model.vitrail", "vitrail.json", "weights.safetensors"
MAGIC = b"vitrail export\n"
BODY = len(MAGIC) + 32  # after the digest


def build(what: str, name: str = "plain", **settings: str) -> Path:
    """The folder where ``make -C what`` has built, once for all test processes."""
    folder = BUILT / name
    folder.mkdir(parents=True, exist_ok=True)
    command = ["make", "-C", str(ROOT / what), f"BUILD={folder}"]
    command += [f"{key}={value}" for key, value in settings.items()]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    with (BUILT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run = subprocess.run(command, capture_output=True, text=True, env=clean)
    assert run.returncode == 0, run.stderr
    assert "warning" not in run.stderr, run.stderr
    return folder


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "clip"
    export_folder.export_clip(folder)
    return folder


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "vit"
    export_folder.export_vit(folder)
    return folder


@pytest.fixture(scope="session")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "dinov2"
    export_folder.export_dinov2(folder)
    return folder


@pytest.fixture(scope="session")
def deit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "deit"
    export_folder.export_deit(folder)
    return folder


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "two"
    export_folder.export_two(folder)
    return folder


# ---- its own tests


def run_native(name: str, folders: list[Path], sanitize: str, *counts: int) -> str:
    """The output of a program of tests/native for ``folders``, the driver and ``counts``."""
    flags = {"SANITIZE": sanitize, "CXXFLAGS": "-O1"} if sanitize else {}
    program = build("tests/native", sanitize or "plain", **flags) / name
    driver = standin.build((f"-fsanitize={sanitize}", "-g") if sanitize else ())
    command = [program, *folders, driver, *map(str, counts)]
    env = {**os.environ, "UBSAN_OPTIONS": "halt_on_error=1", "TSAN_OPTIONS": "halt_on_error=1"}
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=3000)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_the_library_under_threads_and_faults(clip: Path, vit: Path) -> None:
    """16 threads of 50 calls, and 100 faults."""
    assert "100 faults" in run_native("test_library", [clip, vit], "", 16, 50, 100)


def test_the_library_on_two_devices(clip: Path) -> None:
    """16 threads of 40 calls: every launch is on its model's device, in that device's context."""
    assert "launches on device 1" in run_native("test_devices", [clip], "", 16, 40)


@pytest.mark.slow
@pytest.mark.parametrize("sanitize", ["address,undefined", "thread"])
def test_the_library_on_two_devices_sanitized(clip: Path, sanitize: str) -> None:
    assert "launches on device 1" in run_native("test_devices", [clip], sanitize, 16, 100)


@pytest.mark.slow
@pytest.mark.parametrize("sanitize", ["", "address,undefined", "thread"])
def test_the_library_under_many_threads_and_faults(clip: Path, vit: Path, sanitize: str) -> None:
    assert "500 faults" in run_native("test_library", [clip, vit], sanitize, 16, 500, 500)


# ---- its example


def test_the_example_is_built_by_one_command_and_embeds(clip: Path, tmp_path: Path) -> None:
    dice = random.Random(0)
    pictures = [tmp_path / f"{name}.ppm" for name in "abc"]
    for picture in pictures:
        pixels = dice.randbytes(3 * 50 * 40)
        picture.write_bytes(b"P6\n# a comment\n50 40\n255\n" + pixels)
    program = build("examples/cpp") / "embed"
    driver = ["--driver", standin.build()]
    run = subprocess.run([program, *driver, clip, *pictures], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    first, *lines = run.stdout.splitlines()
    assert first == f"{clip} on stand-in sm_90, sm_90"
    assert [line.partition(":")[0] for line in lines] == [str(picture) for picture in pictures]
    assert "similarity to the first 1.0000" in lines[0]
    run = subprocess.run([program, *driver, tmp_path, pictures[0]], capture_output=True, text=True)
    assert (run.returncode, "vitrail export" in run.stderr) == (1, True)


# ---- the C functions


class Options(ctypes.Structure):
    _fields_ = [("device", ctypes.c_int), ("driver", ctypes.c_char_p), ("overlap", ctypes.c_int)]


class Facts(ctypes.Structure):
    _fields_ = [
        *((f"image_{name}", ctypes.c_uint32) for name in ("height", "width", "channels")),
        *((f"image_{name}", ctypes.c_uint32) for name in ("embedding", "labels")),
        ("image_scores", ctypes.c_char_p),
        *((f"text_{name}", ctypes.c_uint32) for name in ("vocab", "context", "embedding")),
        ("text_end", ctypes.c_int32),
        ("architecture", ctypes.c_uint32),
        ("device", ctypes.c_char_p),
        ("fingerprint", ctypes.c_char_p),
    ]


class Library:
    """The C functions, over a stand-in of their own."""

    def __init__(self, library: Path, driver: Path) -> None:
        self.c = ctypes.CDLL(str(library))
        for name in ("error", "version", "label"):
            getattr(self.c, f"vitrail_{name}").restype = ctypes.c_char_p
        self.driver = standin.Standin(driver)

    @property
    def error(self) -> str:
        return str(self.c.vitrail_error().decode())

    def load(self, folder: Path | str, **options: int | bytes) -> tuple[int, ctypes.c_void_p]:
        model = ctypes.c_void_p(1)
        given = Options(driver=str(self.driver.path).encode(), **options)
        code = self.c.vitrail_load(str(folder).encode(), ctypes.byref(given), ctypes.byref(model))
        assert (code == OK) == bool(model)
        return code, model

    def free(self, model: ctypes.c_void_p) -> None:
        self.c.vitrail_free(model)

    def refuses(self, folder: Path | str) -> str:
        """The message with which it does, once nothing was left behind."""
        code, model = self.load(folder)
        if code == OK:
            self.free(model)
        assert code == BAD_FOLDER, (code, self.error)
        assert self.driver.live() == standin.Live(*[0] * 7)
        return self.error


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    driver = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    shutil.copy(standin.build(), driver)
    return Library(build("csrc") / "libvitrail.so", driver)


@contextmanager
def recorded(library: Library, folder: Path) -> Iterator[ctypes.c_void_p]:
    """A session of a folder's model, whose launches are recorded; nothing of it stays behind."""
    code, model = library.load(folder)
    assert code == OK, library.error
    made = ctypes.c_void_p()
    assert library.c.vitrail_session_create(model, ctypes.byref(made)) == OK
    library.free(model)
    library.driver.record(True)
    yield made
    library.driver.record(False)
    library.driver.reset()
    library.c.vitrail_session_free(made)
    assert library.driver.live() == standin.Live(*[0] * 7)


@pytest.fixture
def session(library: Library, clip: Path) -> Iterator[ctypes.c_void_p]:
    with recorded(library, clip) as made:
        yield made


def test_facts(library: Library, clip: Path, vit: Path) -> None:
    assert library.c.vitrail_version().decode() == __version__
    labels = export_folder.LABELS
    for folder, names, wanted in (
        (clip, (), (32, 32, 3, 64, 0, None, 700, 40, 64, -1, 90)),
        (vit, labels, (32, 32, 3, 64, len(labels), b"sigmoid", 0, 0, 0, 0, 90)),
    ):
        code, model = library.load(folder)
        assert code == OK, library.error
        facts = Facts()
        assert library.c.vitrail_model_facts(model, ctypes.byref(facts)) == OK
        found = [getattr(facts, name) for name, _ in Facts._fields_]
        assert tuple(found[:11]) == wanted
        assert found[11] == b"stand-in sm_90"
        assert found[12].decode() == fingerprints(folder)["90"]
        told = [library.c.vitrail_label(model, ctypes.c_size_t(i)) for i in range(len(names) + 1)]
        assert told == [*(name.encode() for name in names), None]
        library.free(model)


def fingerprints(folder: Path) -> dict[str, str]:
    builds = json.loads((folder / SUMMARY).read_text())["builds"]
    return {arch: build["fingerprint"] for arch, build in builds.items()}


def test_the_fingerprint_is_of_the_architecture_in_use(library: Library, two: Path) -> None:
    assert list(fingerprints(two)) == ["80", "90"]
    assert len(set(fingerprints(two).values())) == 2
    for arch, wanted in fingerprints(two).items():
        library.driver.device(int(arch) // 10, int(arch) % 10)
        try:
            code, model = library.load(two)
            assert code == OK, library.error
            facts = Facts()
            assert library.c.vitrail_model_facts(model, ctypes.byref(facts)) == OK
            assert (str(facts.architecture), facts.fingerprint.decode()) == (arch, wanted)
            library.free(model)
        finally:
            library.driver.device()


PRELUDE = """
import ctypes, os, resource, signal, sys

library, folder, driver, *more = sys.argv[1:]
class Options(ctypes.Structure):
    _fields_ = [("device", ctypes.c_int), ("driver", ctypes.c_char_p), ("overlap", ctypes.c_int)]
c, model, session = ctypes.CDLL(library), ctypes.c_void_p(), ctypes.c_void_p()
c.vitrail_error.restype = c.vitrail_version.restype = ctypes.c_char_p
options = Options(0, driver.encode(), 0)
load = folder.encode(), ctypes.byref(options), ctypes.byref(model)
"""
"""The start of programs that call ``c.vitrail_load(*load)``; their arguments are a library, a
folder and a driver."""

FEW_FILES = """
most = int(more[0])
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
sys.exit(c.vitrail_error().decode() if c.vitrail_load(*load) else 0)
"""


def test_few_files_are_open_at_once(library: Library, clip: Path) -> None:
    most = 3 + 16 + 1  # the standard ones, a thread's each, the driver's while it is opened
    assert len(list(clip.rglob("*.kernel"))) > most
    path = build("csrc") / "libvitrail.so"
    command = [sys.executable, "-c", PRELUDE + FEW_FILES, path, clip, library.driver.path]
    command.append(str(most))
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


IN_A_FORK = """
import numpy as np

other = ctypes.c_void_p()
assert c.vitrail_load(*load) == 0
assert c.vitrail_session_create(model, ctypes.byref(session)) == 0
pixels, rows = np.zeros((1, 32, 32, 3), np.uint8), np.zeros((1, 64), np.float32)
data = [array.ctypes.data_as(ctypes.c_void_p) for array in (pixels, rows)]
if os.fork() == 0:
    signal.alarm(60)
    c.vitrail_session_create(model, ctypes.byref(other))  # needs no GPU yet
    for call in (
        lambda: c.vitrail_embed_uint8(session, data[0], ctypes.c_size_t(1), data[1], None),
        lambda: c.vitrail_embed_uint8(other, data[0], ctypes.c_size_t(1), data[1], None),
        lambda: c.vitrail_load(*load),
    ):
        print(call(), c.vitrail_error().decode(), flush=True)
    for made in (session, other):
        c.vitrail_session_free(made)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_forked_process_is_refused_in_words(library: Library, clip: Path) -> None:
    path = build("csrc") / "libvitrail.so"
    command = [sys.executable, "-c", PRELUDE + IN_A_FORK, path, clip, library.driver.path]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert line.startswith(f"{DEVICE} this process was forked from one that had started CUDA")


def pointed_at(library: Library, wanted: np.ndarray) -> bool:
    """Whether a parameter of a launch points to these numbers."""
    values = {p.value for launch in library.driver.launched() for p in launch.parameters}
    return any(
        value >> 32 and ctypes.string_at(value, wanted.nbytes) == wanted.tobytes()
        for value in values
        if value.bit_length() < 48
    )


def test_texts_reach_the_device_cut_and_packed(library: Library, session: ctypes.c_void_p) -> None:
    dice = np.random.default_rng(0)
    lengths = np.array([5, 40, 1, 17, 3], np.int32)
    ids = dice.integers(0, 700, (5, 40), dtype=np.int32)
    out, status = np.full((5, 64), -1, np.float32), np.zeros(5, np.int32)
    given = [array.ctypes.data_as(ctypes.c_void_p) for array in (ids, lengths, out, status)]
    code = library.c.vitrail_embed_text(
        session, given[0], ctypes.c_size_t(40), given[1], ctypes.c_size_t(5), given[2], given[3]
    )
    assert code == OK, library.error
    # up to the first of the highest ids
    cut = [row[: row[:n].argmax() + 1] for row, n in zip(ids, lengths, strict=True)]
    offsets = np.cumsum([0, *map(len, cut)]).astype(np.int32)
    assert offsets[-1] < lengths.sum()
    positions = np.concatenate([np.arange(len(row)) for row in cut]).astype(np.int32)
    for wanted in (np.concatenate(cut), positions, offsets, offsets[1:] - 1):
        assert pointed_at(library, wanted)
    assert not pointed_at(library, np.flip(positions))
    digests = {struct.pack("<Q", launch.digest) for launch in library.driver.launched()}
    assert {out.tobytes()[:8], status.tobytes()[:8]} <= digests


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_images_reach_the_device(
    library: Library, session: ctypes.c_void_p, clip: Path, kind: str
) -> None:
    dice = np.random.default_rng(0)
    pixels: np.ndarray = dice.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    if kind == "float":
        pixels = dice.standard_normal((3, 3, 32, 32), dtype=np.float32)
    out, status = np.full((3, 64), -1, np.float32), np.zeros(3, np.int32)
    given = [array.ctypes.data_as(ctypes.c_void_p) for array in (pixels, out, status)]
    embed = getattr(library.c, f"vitrail_embed_{kind}")
    code = embed(session, given[0], ctypes.c_size_t(3), *given[1:])
    assert code == OK, library.error
    offsets = np.arange(0, 4 * 17, 17, dtype=np.int32)
    for wanted in (pixels, offsets, offsets[:-1]):
        assert pointed_at(library, wanted)
    # 17 tokens of 64 channels: the tables are the arena's end, floats' before bytes'
    table_bytes = 17 * 64 * 4
    tables = (clip / WEIGHTS).read_bytes()[-2 * table_bytes :]
    first = tables[:table_bytes] if kind == "float" else tables[table_bytes:]
    other = tables[table_bytes:] if kind == "float" else tables[:table_bytes]
    assert pointed_at(library, np.frombuffer(first, np.uint8))
    assert not pointed_at(library, np.frombuffer(other, np.uint8))


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2"])
def test_class_scores_are_the_devices(
    library: Library, request: pytest.FixtureRequest, family: str
) -> None:
    """Heads over the class token, over the distillation token too, over the mean of the patches."""
    dice = np.random.default_rng(0)
    pixels: np.ndarray = dice.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    out, status = np.full((3, len(export_folder.LABELS)), -1, np.float32), np.zeros(3, np.int32)
    given = [array.ctypes.data_as(ctypes.c_void_p) for array in (pixels, out, status)]
    with recorded(library, request.getfixturevalue(family)) as session:
        code = library.c.vitrail_classify_uint8(session, given[0], ctypes.c_size_t(3), *given[1:])
        assert code == OK, library.error
        assert pointed_at(library, pixels)
        digests = {struct.pack("<Q", launch.digest) for launch in library.driver.launched()}
        assert out.tobytes()[:8] in digests


def test_no_driver_and_no_device(library: Library, clip: Path) -> None:
    code, _ = library.load(clip, device=1)
    assert (code, "device 1: " in library.error) == (NO_DEVICE, True)
    code, _ = library.load(clip, device=-1)
    assert code == INVALID
    model = ctypes.c_void_p()
    given = Options(driver=b"no-such-library.so")
    folder = str(clip).encode()
    code = library.c.vitrail_load(folder, ctypes.byref(given), ctypes.byref(model))
    assert (code, "no-such-library.so" in library.error) == (NO_DEVICE, True)


@pytest.mark.parametrize("code", [34, 802, 803, 804])
def test_a_driver_that_cannot_be_used_is_no_device(library: Library, clip: Path, code: int) -> None:
    """A stub, no fabric manager, another kernel module, and forward compatibility refused."""
    library.driver.fail(1, code)
    found, _ = library.load(clip)
    library.driver.reset()
    assert found == NO_DEVICE


# ---- folders that are refused


@pytest.fixture
def copied(clip: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clip, tmp_path / "copied"))


def sign(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Changes a file, and the digests by which that would be seen."""
    path = folder / name
    before = hash_file(path)
    raw = change(path.read_bytes())
    if name == RECORD:
        raw = raw[: len(MAGIC)] + hashlib.sha256(raw[BODY:]).digest() + raw[BODY:]
    path.write_bytes(raw)
    if name != RECORD:
        old, new = (struct.pack("<Q", size) + digest for size, digest in (before, hash_file(path)))
        sign(folder, RECORD, lambda record: replace(record, old, new))


def replace(record: bytes, old: bytes, new: bytes) -> bytes:
    assert old in record
    return record.replace(old, new, 1)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def a_file(folder: Path, kind: str) -> Path:
    """One of the files of a kind."""
    return sorted(folder.rglob(kind))[0]


def test_a_signed_copy_loads(library: Library, copied: Path) -> None:
    sign(copied, RECORD, lambda record: record)
    code, model = library.load(copied)
    assert code == OK, library.error
    library.free(model)


def test_no_folder_is_refused(library: Library, tmp_path: Path) -> None:
    assert "No such file" in library.refuses(tmp_path / "missing")
    (tmp_path / "file").touch()
    assert "wanted an exported folder" in library.refuses(tmp_path / "file")
    assert "`vitrail export` wrote" in library.refuses(tmp_path)
    assert library.c.vitrail_load(None, None, ctypes.byref(ctypes.c_void_p())) == INVALID


KINDS = (RECORD, "text.plan", "image.uint8.plan", "*.kernel", WEIGHTS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_missing_or_no_file_is_refused(
    library: Library, copied: Path, kind: str
) -> None:
    path = a_file(copied, kind)
    path.unlink()
    assert path.name in library.refuses(copied)
    path.mkdir()
    assert path.name in library.refuses(copied)
    path.rmdir()
    os.mkfifo(path)  # that nobody writes to
    assert path.name in library.refuses(copied)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("left", [0, 7, -1, 1])
def test_a_file_of_another_length_is_refused(
    library: Library, copied: Path, kind: str, left: int
) -> None:
    path = a_file(copied, kind)
    raw = path.read_bytes()
    path.write_bytes(raw + b"\0" if left == 1 else raw[:left])
    message = library.refuses(copied)
    assert path.name in message or kind == RECORD
    assert "got" in message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 0.999])
def test_a_byte_that_changed_is_refused(
    library: Library, copied: Path, kind: str, where: float
) -> None:
    path = a_file(copied, kind)
    raw = bytearray(path.read_bytes())
    raw[int(where * len(raw))] ^= 1
    path.write_bytes(raw)
    message = library.refuses(copied)
    assert path.name in message
    assert "got other" in message or "digest" in message or "header" in message


def test_a_missing_or_changed_summary_is_refused(library: Library, copied: Path) -> None:
    text = (copied / SUMMARY).read_text()
    for other in ("{}", text[:-1], text + " ", text.replace("version", "versiom")):
        (copied / SUMMARY).write_text(other)
        assert f"{SUMMARY}: got other bytes" in library.refuses(copied)
    (copied / SUMMARY).unlink()
    assert f"{SUMMARY}: got no such file" in library.refuses(copied)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (MAGIC, b"vitrail expert\n", "got other first bytes, wanted vitrail export"),
        (
            text("sm_90/text.plan"),
            text("../90/text.plan"),
            "got a path out of the folder, wanted one in it: ../90",
        ),
        (text("sm_90/text.plan"), text("/m_90/text.plan"), "got a path out of the folder"),
        (text("sm_90/text.plan"), text("sm_90/../text.p"), "got a path out of the folder"),
        (text("sm_90/text.plan"), text("sm_90//text.pla"), "got a path out of the folder"),
        (text("sm_90/text.plan"), text("sm_90/text.pl\0n"), "got a path out of the folder"),
        (text("sm_90/text.plan"), text(""), "got a path out of the folder"),
        (text("sm_90/text.plan"), text("sm_90/text.plaN"), "text.plaN: No such file"),
        (text("text"), text("texts"), "an endpoint for an input that the model does not take"),
        (text("image.uint8"), text("image.float"), "got two of image.float"),
    ],
)
def test_a_record_that_says_something_else_is_refused(
    library: Library, copied: Path, old: bytes, new: bytes, words: str
) -> None:
    sign(copied, RECORD, lambda record: replace(record, old, new))
    assert words in library.refuses(copied)


OWN = struct.pack("<II", PLAN_GRAMMAR, KERNEL_ABI)


@pytest.mark.parametrize(
    ("grammar", "abi"),
    [(PLAN_GRAMMAR + 1, KERNEL_ABI), (PLAN_GRAMMAR, KERNEL_ABI + 1), (0, 2**32 - 1)],
)
def test_a_folder_of_other_numbers_is_refused_naming_all_four(
    library: Library, copied: Path, grammar: int, abi: int
) -> None:
    head = struct.pack("<II", grammar, abi) + text("9.9")
    sign(copied, RECORD, lambda record: replace(record, OWN + text(__version__), head))
    assert (
        f"{RECORD}: got plan grammar {grammar} and kernel ABI {abi}, exported by Vitrail 9.9, "
        f"wanted plan grammar {PLAN_GRAMMAR} and kernel ABI {KERNEL_ABI}, which Vitrail "
        f"{__version__} reads: export the checkpoint again"
    ) in library.refuses(copied)


def test_a_folder_from_before_the_two_numbers_is_refused_alike(
    library: Library, copied: Path
) -> None:
    body = text("0.1.0.dev0") + (copied / RECORD).read_bytes()[BODY:]
    (copied / RECORD).write_bytes(b"vitrail export 2\n" + hashlib.sha256(body).digest() + body)
    assert (
        f"got plan grammar 2 and no kernel ABI, exported by Vitrail 0.1.0.dev0, wanted plan "
        f"grammar {PLAN_GRAMMAR} and kernel ABI {KERNEL_ABI}"
    ) in library.refuses(copied)


def test_a_folder_that_another_version_exported_loads(library: Library, copied: Path) -> None:
    exported_by(copied, "0.0.1")
    code, model = library.load(copied)
    assert code == OK, library.error
    facts = Facts()
    assert library.c.vitrail_model_facts(model, ctypes.byref(facts)) == OK
    assert facts.fingerprint.decode() == fingerprints(copied)["90"]
    library.free(model)


def test_the_golden_folder_computes_as_it_did(library: Library, tmp_path: Path) -> None:
    """See tests/exported/test_golden.py."""
    folder, pixels = make_golden.unpack(tmp_path), make_golden.PIXELS
    out, status = np.zeros((len(pixels), 64), np.float32), np.zeros(len(pixels), np.int32)
    given = [array.ctypes.data_as(ctypes.c_void_p) for array in (pixels, out, status)]
    library.driver.undo(True)  # so that new memory is alike
    try:
        with recorded(library, folder) as session:
            count = ctypes.c_size_t(len(pixels))
            assert library.c.vitrail_embed_uint8(session, given[0], count, *given[1:]) == OK
            launched = library.driver.launched()
    finally:
        library.driver.undo(False)
    wanted = make_golden.expected()["launches"]
    assert fingerprints(folder)["90"] == wanted["fingerprint"]
    assert make_golden.digest(launched) == wanted["uint8"]


def exported_by(folder: Path, version: str) -> None:
    """Sets the version that exported the folder, in the record and in its summary."""
    summary = (folder / SUMMARY).read_text()
    changed = summary.replace(f'"version": "{__version__}"', f'"version": "{version}"')
    assert changed != summary
    (folder / SUMMARY).write_text(changed)
    sign(folder, RECORD, lambda record: replace(record, text(summary), text(changed)))
    sign(folder, RECORD, lambda record: replace(record, text(__version__), text(version)))


def test_bytes_after_the_record_are_refused(library: Library, copied: Path) -> None:
    sign(copied, RECORD, lambda record: record + b"\0")
    assert "bytes after the end" in library.refuses(copied)


def test_sizes_that_do_not_match_are_refused(library: Library, copied: Path) -> None:
    """The numbers of the towers: the plans must take and give what they say."""
    towers = b"\1" + struct.pack("<5IIQ", 32, 32, 3, 64, 17, 0, 0) + b"\1"  # no head
    towers += struct.pack("<IIIi", 700, 40, 64, -1)
    for place, words in ((1, "pixels"), (13, "embedding"), (17, "table"), (42, "embedding")):
        other = Path(shutil.copytree(copied, copied.with_name(f"other {place}")))
        changed = bytearray(towers)
        changed[place : place + 4] = struct.pack("<I", 8)
        sign(other, RECORD, lambda record, new=bytes(changed): replace(record, towers, new))
        assert words in library.refuses(other)


@pytest.mark.parametrize(
    ("kept", "words"),
    [(4, "got vision.logits of 20 bytes for one item"), (0, "that the model does not take")],
)
def test_labels_that_do_not_match_are_refused(
    library: Library, vit: Path, tmp_path: Path, kept: int, words: str
) -> None:
    folder = Path(shutil.copytree(vit, tmp_path / "copied"))

    def listed(count: int) -> bytes:
        names = export_folder.LABELS[:count]
        return struct.pack("<I", count) + b"".join(map(text, names)) + text("sigmoid")

    sign(folder, RECORD, lambda record: replace(record, listed(5), listed(kept)))
    assert words in library.refuses(folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"data_offsets":[0,', b'"data_offsets":[8,'),
        (b'"arena"', b'"azena"'),
        (b'"U8"', b'"I8"'),
        (b"}} ", b"}}} "),
    ],
)
def test_weights_of_another_header_are_refused(
    library: Library, copied: Path, old: bytes, new: bytes
) -> None:
    sign(copied, WEIGHTS, lambda raw: replace(raw, old, new)[: len(raw)])
    assert f"{WEIGHTS}: got another header" in library.refuses(copied)


def test_weights_whose_header_ends_elsewhere_are_refused(library: Library, copied: Path) -> None:
    sign(copied, WEIGHTS, lambda raw: struct.pack("<Q", raw[0] + 8) + raw[8:])
    assert f"{WEIGHTS}: got another header" in library.refuses(copied)


def test_a_plan_over_other_weights_is_refused(library: Library, copied: Path) -> None:
    name = "sm_90/text.plan"
    at = len(magic("plan")) + len(text("text.pooled"))
    sign(copied, name, lambda raw: raw[:at] + b"\1" + raw[at + 1 :])
    assert "bytes of weights" in library.refuses(copied)


def test_a_kernel_for_another_architecture_is_refused(library: Library, copied: Path) -> None:
    path = a_file(copied, "*.kernel")
    raw = path.read_bytes()
    at = len(magic("kernel"))
    for _ in range(2):  # after the key and the function's name
        at += 8 + int.from_bytes(raw[at : at + 8], "little")
    name = str(path.relative_to(copied))
    sign(copied, name, lambda raw: raw[:at] + struct.pack("<I", 80) + raw[at + 4 :])
    assert "another architecture" in library.refuses(copied)


def test_a_kernel_that_a_plan_lacks_is_refused(library: Library, copied: Path) -> None:
    def shorten(record: bytes) -> bytes:
        kernels = len(list(copied.rglob("*.kernel")))
        at = len(record) - 4 * kernels - 4
        assert int.from_bytes(record[at : at + 4], "little") == kernels
        return record[:at] + struct.pack("<I", kernels - 1) + record[at + 8 :]

    sign(copied, RECORD, shorten)
    assert "got no kernel" in library.refuses(copied)


@pytest.mark.parametrize(("major", "minor"), [(8, 9), (10, 0)])
def test_a_device_of_another_architecture_is_refused(
    library: Library, clip: Path, major: int, minor: int
) -> None:
    library.driver.device(major, minor)
    try:
        wanted = f"got an export for sm_90, wanted sm_{major}{minor}, which this device is"
        assert wanted in library.refuses(clip)
    finally:
        library.driver.device()


def test_a_family_member_is_no_match(library: Library, copied: Path) -> None:
    """An export for sm_86 is not one for sm_89, though its kernels might run there."""
    sign(copied, RECORD, lambda record: replace_last(record, 90, 86))
    library.driver.device(8, 9)
    try:
        assert "for sm_86, wanted sm_89" in library.refuses(copied)
    finally:
        library.driver.device()


def replace_last(record: bytes, old: int, new: int) -> bytes:
    """The architecture of the one build, which stands before its fingerprint."""
    at = record.rindex(struct.pack("<IQ", old, 64))
    return record[:at] + struct.pack("<I", new) + record[at + 4 :]


def mutations(record: bytes, summary: bytes, dice: random.Random) -> Iterator[bytes]:
    """Records with other bytes than that, most of them past the summary."""
    past = record.index(summary) + len(summary)
    for _ in range(400):
        changed = bytearray(record)
        start = dice.choice((BODY, past, past, past))
        for _ in range(dice.randint(1, 3)):
            changed[dice.randrange(start, len(changed))] = dice.choice((0, 1, 127, 255, 128))
        yield bytes(changed[: dice.choice((None, dice.randrange(BODY, len(changed))))])


def test_any_record_loads_or_is_refused(library: Library, copied: Path) -> None:
    """With digests that hold: what only a faulty writer makes. No crash, no hang, nothing left."""
    record, summary = ((copied / name).read_bytes() for name in (RECORD, SUMMARY))
    codes = []
    for changed in mutations(record, summary, random.Random(0)):
        sign(copied, RECORD, lambda _, changed=changed: changed)
        code, model = library.load(copied)
        codes.append(code)
        if code == OK:
            library.free(model)
        assert library.driver.live() == standin.Live(*[0] * 7)
    assert set(codes) == {OK, BAD_FOLDER}
