from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from PIL import Image
from transformers import ViTImageProcessorPil
from typer.testing import CliRunner, Result

import vitrail
from helpers import assert_close, clip_folder, image_embedding, make, save, small_vocabulary
from vitrail.cli import app, console
from vitrail.model import loading
from vitrail.plan.text import text_pooled

ROOT = Path(__file__).parents[2]
PHOTOS = ROOT / "engine/vitrail/assets/photos"
LABELS = ["cat", "dog", "red window", "photo of a mat"]

SIZE = len(small_vocabulary()[0])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """The folder of a CLIPModel with its processor, and the two themselves."""
    folder = tmp_path_factory.mktemp("clip")
    return folder, *clip_folder(folder)


@pytest.fixture(scope="module")
def clip(saved: tuple[Path, Any, Any]) -> Path:
    return saved[0]


@pytest.fixture(scope="module")
def oracle(saved: tuple[Path, Any, Any]) -> Any:
    return saved[1]


@pytest.fixture(scope="module")
def processor(saved: tuple[Path, Any, Any]) -> Any:
    return saved[2]


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViTForImageClassification of seven labels."""
    folder = tmp_path_factory.mktemp("vit")
    save(make("ViTForImageClassification"), folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """The sample photos, and in a sub-folder a file that is no image."""
    folder = tmp_path / "photos"
    shutil.copytree(PHOTOS, folder)
    (folder / "sub").mkdir()
    (folder / "sub" / "broken.jpg").write_bytes(b"not an image")
    return folder


def good(photos: Path) -> list[Path]:
    return sorted(photos.glob("*.jpg"))


def pixels(paths: list[Path], processor: Any) -> torch.Tensor:
    images = [Image.open(path) for path in paths]
    return processor(images=images, return_tensors="pt").pixel_values


def close(ours: Any, reference: torch.Tensor) -> None:
    assert_close(torch.from_numpy(np.asarray(ours)), reference, what="model")


def run(*args: object, **env: str) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], env=env, prog_name="vitrail")


def start(*args: object) -> subprocess.Popen[str]:
    """The real command in its own process, in the folder of the sample photos."""
    paths = os.pathsep.join(str(ROOT / name) for name in ("engine", "kernels"))
    return subprocess.Popen(
        [sys.executable, "-m", "vitrail.cli", *map(str, args)],
        env={**os.environ, "PYTHONPATH": paths},
        cwd=PHOTOS,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts its background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def one_line_error(result: Result) -> str:
    """What an error must look like: exit code 1, one line on stderr, nothing on stdout."""
    assert result.exit_code == 1, (result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("vitrail: error: ")
    return result.stderr


# The command itself


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from vitrail.cli import app; app(['--help'], standalone_mode=False);"
        "heavy = {'torch', 'numpy', 'PIL', 'pyarrow', 'tokenizers', 'rich', 'tqdm', 'safetensors'};"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    paths = os.pathsep.join(str(ROOT / name) for name in ("engine", "kernels"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "classify" in done.stdout


def test_version_is_the_packages() -> None:
    assert run("--version").stdout == f"vitrail {vitrail.__version__}\n"


COMMANDS = ["info", "embed", "classify", "verify", "quantize", "tune", "export", "demo"]


@pytest.mark.parametrize("command", COMMANDS)
def test_only_the_model_and_where_it_runs_come_from_the_environment(command: str) -> None:
    text = " ".join(run(command, "--help").stdout.split())
    variables = set(re.findall(r"env var: (\w+)", text))
    assert "VITRAIL_MODEL" in variables
    places = {"device": "VITRAIL_DEVICE", "dtype": "VITRAIL_DTYPE"}
    places["memory-limit"] = "VITRAIL_MEMORY_LIMIT"
    assert variables <= {"VITRAIL_MODEL", *places.values()}
    for option, variable in places.items():
        assert (f"--{option} " in text) == (variable in variables)


def test_no_command_prints_help_and_an_unknown_one_is_wrong_usage() -> None:
    assert "embed" in run().output
    result = run("embbed")
    assert result.exit_code == 2
    assert "No such command" in result.stderr


# Errors


@pytest.mark.parametrize("command", ["info", "embed", "classify"])
def test_without_a_model_the_error_says_how_to_get_one(command: str, photos: Path) -> None:
    result = run(command, *([photos] if command != "info" else []))
    assert result.exit_code == 2
    assert "laion/CLIP-ViT-B-32-laion2B-s34B-b79K" in result.stderr
    assert "VITRAIL_MODEL" in result.stderr


def test_errors_of_the_real_command_are_one_line_without_traceback(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    process = start("embed", PHOTOS, "--model", tmp_path, "--out", tmp_path / "out.npy")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert re.fullmatch(r"vitrail: error: .*pytorch_model\.bin.*never.*\n", err)


@pytest.mark.parametrize("command", ["info", "embed", "classify"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "nowhere"),
        ("empty", "config.json"),
        ("foreign", "model_type"),
        ("incomplete", "visual_projection.weight"),
    ],
)
def test_models_that_cannot_be_loaded_are_one_line(
    command: str, fault: str, message: str, clip: Path, photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / ("nowhere" if fault == "missing" else "model")
    if fault == "empty":
        folder.mkdir()
    if fault in ("foreign", "incomplete"):
        shutil.copytree(clip, folder)
    if fault == "foreign":
        (folder / "config.json").write_text('{"model_type": "llama"}')
    if fault == "incomplete":
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        del tensors["visual_projection.weight"]
        save_file(tensors, folder / "model.safetensors")
    inputs = [] if command == "info" else [photos]
    model_args = [folder] if command == "info" else ["--model", folder]
    out = ["--out", tmp_path / "out.npy"] if command == "embed" else []
    error = one_line_error(run(command, *inputs, *model_args, *out))
    assert message in error


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--size", "32xx32"], "got '32xx32', wanted HxW"),
        (["--size", "big"], "got 'big', wanted HxW"),
        (["--batch-size", "0"], "--batch-size"),
    ],
)
def test_wrong_usage_is_exit_code_2(args: list[str], message: str, clip: Path) -> None:
    result = run("embed", PHOTOS, "--model", clip, *args)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--size", "4x32"], "wanted at least one patch"),
        (["--dtype", "float8"], "dtype: got 'float8'"),
        (["--device", "tpu"], "device: got 'tpu'"),
        (["--out", "out.txt"], "'.txt', wanted .npy or .parquet"),
        (["--out", "nowhere/out.npy"], "does not exist"),
    ],
)
def test_arguments_the_model_refuses_are_one_line(
    args: list[str], message: str, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("embed", PHOTOS, "--model", clip, *args)
    assert result.exit_code == 1
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_inputs_and_output_are_checked_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: object, **options: object) -> None:
        raise AssertionError("loaded for nothing")

    monkeypatch.setattr(loading, "load", load)
    out = tmp_path / "out.npy"
    missing = run("embed", tmp_path / "none.jpg", "--model", "x", "--out", out)
    assert "none.jpg': no such file" in one_line_error(missing)
    out.touch()
    existing = run("embed", PHOTOS, "--model", "x", "--out", out)
    assert "exists already (--overwrite" in one_line_error(existing)


# info


def test_info_says_what_the_checkpoint_is(clip: Path) -> None:
    text = run("info", clip).stdout
    for line in (
        "CLIPModel (family clip)",
        "2 layers, width 32, 2 heads of 16, MLP 40 quick_gelu, LayerNorm eps 1e-05",
        "class, 4x4 patches of 8x8 from 3x32x32 pixels; LayerNorm first",
        "17 learned; other sizes: bicubic without antialiasing",
        "class token after the final LayerNorm, projected to 20: 20 numbers",
        "2 layers, width 24, 2 heads of 12, MLP 36 quick_gelu, LayerNorm eps 1e-05, causal",
        f"the first token with id {SIZE - 1}, after the final LayerNorm, projected to 20",
        f"tokenizer.json; vocabulary {SIZE}, at most 40 tokens",
        "to RGB, shortest edge to 32 (bicubic), center crop 32x32, times 0.00392157, minus mean "
        "(0.481455, 0.457827, 0.408211), by std (0.26863, 0.261303, 0.275777)",
        "model.safetensors: ",
        "backend      torch (PyTorch",
        "native       vitrail._C",
    ):
        assert line in text
    parameters = sum(p.numel() for p in transformers.CLIPModel.from_pretrained(clip).parameters())
    assert f"{parameters:,} parameters" in text
    assert "fingerprint" not in text


def test_info_of_a_classifier_names_its_labels(vit: Path) -> None:
    text = run("info", vit).stdout
    assert "7 labels from the class token: label 0, label 1, label 2, ..." in text
    assert "resize to 32x32 (bilinear)" in text
    assert "text tower" not in text


def test_info_names_the_distillation_token(tmp_path: Path) -> None:
    save(make("DeiTForImageClassificationWithTeacher"), tmp_path)
    text = run("info", tmp_path).stdout
    assert "class, distillation, 4x4 patches" in text
    assert "labels from class token and distillation token: label 0" in text


def test_info_as_json_is_complete_and_reads_no_weights(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*args: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("vitrail.checkpoint.tensors.TensorReader.read_into", read)
    facts = json.loads(run("info", clip, "--json").stdout)
    assert facts["spec"]["vision"]["blocks"]["layers"] == 2
    assert facts["spec"]["text"]["eos"] == SIZE - 1
    assert facts["folder"] == str(clip)
    assert facts["files"] == ["model.safetensors"]
    assert set(facts["tensors"]) == {"F32"}
    assert facts["tokenizer"] == "tokenizer.json"
    assert facts["serving"].keys() == {"backend", "kernels", "native"}


def test_info_gives_the_fingerprint_on_request(clip: Path) -> None:
    wanted = vitrail.load(clip).fingerprint
    assert wanted in run("info", clip, "--fingerprint").stdout
    assert json.loads(run("info", clip, "--fingerprint", "--json").stdout)["fingerprint"] == wanted


def test_info_says_what_fits_a_memory_limit(clip: Path) -> None:
    """The same as the model that is loaded with the limit holds and computes."""
    model = vitrail.load(clip, memory_limit="1M")
    assert model._vision is not None
    facts = json.loads(run("info", clip, "--json", "--memory-limit", "1M").stdout)["memory"]
    assert facts["weights"] == model.weight_bytes
    assert facts["limit"] == 1 << 20 == model.memory_limit
    calls = [
        model._vision.call(model._vision.pooled_plan(uint8), (32, 32), size * 3 * 32 * 32)
        for uint8, size in ((True, 1), (False, 4))
    ]
    assert facts["images"] == min(model._runner.budget.most(4096, call) for call in calls)
    least = facts["one_item"]
    assert vitrail.load(clip, memory_limit=least).memory_limit == least
    with pytest.raises(vitrail.InputError, match=f"wanted {least:,} or more"):
        vitrail.load(clip, memory_limit=least - 1)
    assert model._text is not None
    texts = model._text._footprint.text_call(
        text_pooled(model._text.spec), model._text.spec.context
    )
    assert facts["texts"] == model._runner.budget.most(4096, texts)
    assert min(facts["images"], facts["texts"]) > 1
    text = run("info", clip, VITRAIL_MEMORY_LIMIT="1M").stdout
    assert f"1.0 MB beside them: a call has {facts['images']} images" in text
    assert "no limit beside them" in run("info", clip).stdout
    small = run("info", clip, "--memory-limit", "1000").stdout
    assert "a limit of 1,000 bytes beside them is too small: one item needs" in small
    refused = run("info", clip, "--memory-limit", "much")
    assert "memory_limit: got 'much', wanted bytes over 0" in one_line_error(refused)


@pytest.mark.parametrize("command", ["embed", "classify"])
def test_a_memory_limit_cuts_batches(
    clip: Path, photos: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = photos.parent / "out.npy"
    args = ["--out", out, "--overwrite"] if command == "embed" else ["--labels", "cat,dog"]
    limits = list[int | None]()
    load = loading.load

    def loaded(*args: Any, **options: Any) -> vitrail.Model:
        model = load(*args, **options)
        limits.append(model.memory_limit)
        return model

    monkeypatch.setattr(loading, "load", loaded)
    done = run(command, *good(photos), "--model", clip, *args, "--memory-limit", "1M")
    assert done.exit_code == 0, done.stderr
    assert limits == [1 << 20]
    result = run(command, *good(photos), "--model", clip, *args, "--memory-limit", "1K")
    assert "memory_limit: got 1,024 bytes, wanted " in one_line_error(result)


def test_info_says_which_files_are_not_there(clip: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(clip / name, tmp_path)
    text = run("info", tmp_path).stdout
    assert "no tokenizer in the folder: token ids only" in text
    assert "no preprocessor in the folder: preprocessed float pixels only" in text


# embed


def test_embed_gives_transformers_numbers(
    clip: Path, oracle: Any, processor: Any, photos: Path
) -> None:
    out = photos.parent / "out.npy"
    result = run("embed", photos, "--model", clip, "--out", out)
    assert result.exit_code == 3, result.stderr
    assert result.stdout == f"{out}\n"
    expected = image_embedding(oracle, pixels(good(photos), processor))
    close(np.load(out), expected)
    assert "vitrail: 1 of 7 images failed:\n" in result.stderr
    assert "broken.jpg" in result.stderr


def test_embed_to_parquet_keeps_the_row_of_a_bad_image(
    clip: Path, oracle: Any, processor: Any, photos: Path
) -> None:
    out = photos.parent / "out.parquet"
    args = ["--normalize", "--batch-size", "2", "--out", out]
    assert run("embed", photos / "sub", photos, "--model", clip, *args).exit_code == 3
    rows = pq.read_table(out).to_pylist()
    assert [row["path"] for row in rows] == [
        str(photos / "sub" / "broken.jpg"),
        *map(str, good(photos)),
    ]
    assert rows[0]["embedding"] is None
    assert rows[0]["status"] == "error"
    assert not rows[0]["error"].startswith("image 0")
    expected = image_embedding(oracle, pixels(good(photos), processor))
    unit = torch.nn.functional.normalize(expected)
    close(np.float32([row["embedding"] for row in rows[1:]]), unit)
    about = json.loads(pq.read_schema(out).metadata[b"vitrail"])
    assert about["model"] == clip.name, "no path of this machine"
    assert about["fingerprint"] == vitrail.load(clip).fingerprint


def test_embed_at_another_size_gives_transformers_numbers(
    clip: Path, oracle: Any, photos: Path
) -> None:
    out = photos.parent / "out.npy"
    assert run("embed", photos, "--model", clip, "--out", out, "--size", "48x64").exit_code == 3
    values = vitrail.load(clip).preprocess(good(photos), size=(48, 64))
    close(np.load(out), image_embedding(oracle, values))


def test_the_model_and_the_dtype_come_from_the_environment(clip: Path, photos: Path) -> None:
    out = photos.parent / "out.npy"
    environment = {"VITRAIL_MODEL": str(clip), "VITRAIL_DTYPE": "bfloat16"}
    args = ["--out", out, "--normalize", "--fp16-output", "--size", 48]
    assert run("embed", photos, *args, **environment).exit_code == 3
    array = np.load(out)
    assert array.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(array, axis=1), 1, atol=1e-3)
    about = json.loads(out.with_suffix(".json").read_text())
    assert (about["size"], about["compute_dtype"]) == ([48, 48], "bfloat16")
    assert run("embed", photos, *args, **environment).exit_code == 1
    assert run("embed", photos, *args, "--overwrite", **environment).exit_code == 3
    refused = run(
        "embed", photos, *args, "--overwrite", VITRAIL_MODEL=str(clip), VITRAIL_DEVICE="tpu"
    )
    assert "device: got 'tpu'" in one_line_error(refused)


@pytest.mark.parametrize("command", ["embed", "classify"])
def test_where_images_are_resized_is_an_option(
    command: str, clip: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices, load = list[object](), loading.load

    def kept(*args: Any, **options: Any) -> Any:
        devices.append(options["resize"])
        return load(*args, **options)

    monkeypatch.setattr(loading, "load", kept)
    arguments = [command, photos / "cat.jpg", "--model", clip]
    arguments += ["--out", photos.parent / "out"] if command == "embed" else ["--labels", "a,b"]
    assert run(*arguments).exit_code == 0
    assert run(*arguments, "--resize-on", "device").exit_code == 0
    assert devices == ["host", "device"]
    refused = run(*arguments, "--resize-on", "gpu")
    assert "resize: got 'gpu', wanted 'host' or 'device'" in one_line_error(refused)


def test_embed_writes_embeddings_npy_here_by_default(
    clip: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("embed", "photos", "--model", clip).stdout == "embeddings.npy\n"
    assert len(np.load("embeddings.npy")) == 6


def test_embed_fails_where_every_image_does(clip: Path, photos: Path) -> None:
    out = photos.parent / "out.npy"
    unreadable = [photos / "sub" / f"{i}.jpg" for i in range(8)]
    for path in unreadable:
        path.write_bytes(b"")
    result = run("embed", *unreadable, "--model", clip, "--out", out)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("vitrail: 8 of 8 images failed:\n")
    assert "and 3 more" in result.stderr
    assert not out.exists()


def test_embed_needs_a_preprocessor(clip: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(clip / name, tmp_path)
    result = run("embed", PHOTOS, "--model", tmp_path, "--out", tmp_path / "out.npy")
    assert "preprocessor_config.json" in one_line_error(result)


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [(signal.SIGINT, 130, "vitrail: interrupted\n"), (signal.SIGTERM, 143, "")],
)
def test_a_signal_ends_embed_cleanly(
    number: signal.Signals, code: int, message: str, clip: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    inputs = ["cat.jpg"] * 20_000
    process = start("embed", *inputs, "--model", clip, "--out", folder / "out.parquet")
    deadline = time.monotonic() + 60
    while not list(folder.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None
    time.sleep(0.3)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (code, "", message)
    assert list(folder.iterdir()) == []


# Progress


def test_progress_is_lines_at_intervals_where_stderr_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    with console.progress(40) as progress:
        for done, seconds in ((10, 1.0), (20, 6.0), (30, 7.0), (40, 12.0)):
            clock[0] = 100 + seconds
            progress(done)
    lines = capsys.readouterr().err
    assert lines == "vitrail: 20 of 40 images, 3.3/s\nvitrail: 40 of 40 images, 3.3/s\n"


def test_progress_names_the_seconds_of_slow_units(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    with console.progress(12, unit="blocks") as progress:
        for done, seconds in ((0, 10.0), (2, 20.0)):
            clock[0] = 100 + seconds
            progress(done)
    lines = capsys.readouterr().err
    assert lines == "vitrail: 0 of 12 blocks, 0.0/s\nvitrail: 2 of 12 blocks, 10.0 s each\n"


def test_the_pace_leaves_out_what_an_earlier_run_has_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    with console.progress(4000, resumes=True) as progress:
        for done, seconds in ((3000, 0.0), (3010, 6.0), (3015, 30.0)):
            clock[0] = 100 + seconds
            progress(done)
    lines = capsys.readouterr().err
    assert lines == (
        "vitrail: 3010 of 4000 images, 1.7/s\nvitrail: 3015 of 4000 images, 2.0 s each\n"
    )


@pytest.mark.parametrize("resumes", [False, True])
def test_progress_is_a_bar_on_a_terminal(resumes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with console.progress(40, resumes=resumes) as progress:
        progress(30)
        progress(40)
    assert "40/40" in terminal.getvalue()
    assert ("30/40" in terminal.getvalue()) == resumes


# classify


@pytest.fixture
def probabilities(oracle: Any, processor: Any) -> Callable[[list[Path], list[str]], torch.Tensor]:
    """Zero-shot as transformers documents it: softmax over logits_per_image."""

    def compute(paths: list[Path], texts: list[str]) -> torch.Tensor:
        images = [Image.open(path) for path in paths]
        inputs = processor(text=texts, images=images, return_tensors="pt", padding=True)
        with torch.no_grad():
            return oracle(**inputs).logits_per_image.softmax(dim=1)

    return compute


def json_probabilities(result: Result, labels: list[str]) -> list[list[float]]:
    assert result.exit_code == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    for row in rows:
        values = [entry["probability"] for entry in row["labels"]]
        assert values == sorted(values, reverse=True)
    by_label = [{entry["label"]: entry["probability"] for entry in row["labels"]} for row in rows]
    return [[probabilities[label] for label in labels] for probabilities in by_label]


def test_classify_gives_transformers_zero_shot_probabilities(
    clip: Path, photos: Path, probabilities: Any
) -> None:
    paths = good(photos)
    expected = probabilities(paths, [f"a photo of a {label}" for label in LABELS])
    assert expected.std(dim=1).min() > 0.01  # or any answer would do
    result = run("classify", *paths, "--model", clip, "--labels", ", ".join(LABELS), "--json")
    close(np.float32(json_probabilities(result, LABELS)), expected)


def test_classify_takes_labels_from_a_file_and_templates_from_options(
    clip: Path, photos: Path, probabilities: Any
) -> None:
    file = photos.parent / "labels.txt"
    file.write_text("\n".join(LABELS) + "\n\n", encoding="utf-8")
    paths = good(photos)
    expected = probabilities(paths, [f"the {label}, happy" for label in LABELS])
    args = ["classify", *paths, "--model", clip, "--labels-file", file, "--json"]
    result = run(*args, "--template", "the {}, happy")
    close(np.float32(json_probabilities(result, LABELS)), expected)
    both = run(*args, "--template", "the {}, happy", "--template", "{}")
    assert both.exit_code == 0
    assert both.stdout != result.stdout


def test_classify_prints_a_table_of_the_best_labels(
    clip: Path, photos: Path, probabilities: Any
) -> None:
    path = photos / "cat.jpg"
    expected = probabilities([path], [f"a photo of a {label}" for label in LABELS])[0]
    args = ["--model", clip, "--labels", ",".join(LABELS), "--top", "2"]
    header, *rows = run("classify", path, *args).stdout.splitlines()
    assert header.split() == ["image", "probability", "label"]
    best = expected.argsort(descending=True)[:2].tolist()
    assert [row.split(maxsplit=2) for row in rows] == [
        [str(path), f"{expected[i]:.4f}", LABELS[i]] for i in best
    ]


def test_classify_uses_the_head_of_a_classifier(vit: Path, photos: Path) -> None:
    paths = good(photos)
    oracle = transformers.ViTForImageClassification.from_pretrained(vit).eval()
    processor = ViTImageProcessorPil.from_pretrained(vit)
    images = [Image.open(path).convert("RGB") for path in paths]
    with torch.no_grad():
        expected = oracle(**processor(images, return_tensors="pt")).logits.softmax(dim=1)
    result = run("classify", *paths, "--model", vit, "--json", "--top", "9")
    labels = [f"label {i}" for i in range(7)]
    close(np.float32(json_probabilities(result, labels)), expected)


def test_a_bad_image_costs_no_other_its_labels(clip: Path, photos: Path) -> None:
    result = run("classify", photos, "--model", clip, "--labels", "cat,dog", "--json")
    assert result.exit_code == 0
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["status"] for row in rows] == ["ok"] * 6 + ["error"]
    assert "broken.jpg" in rows[6]["error"]
    assert "1 of 7 images failed" in result.stderr
    alone = run("classify", photos / "sub", "--model", clip, "--labels", "cat,dog")
    assert alone.exit_code == 1
    assert "1 of 1 images failed" in alone.stderr


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("clip", [], "no classification head"),
        ("vit", ["--labels", "cat"], "no image and text tower"),
        ("clip", ["--labels", "cat", "--template", "no braces"], "wanted strings with {}"),
        ("clip", ["--labels", "cat " * 50], "wanted at most 40"),
    ],
)
def test_labels_the_model_cannot_use_are_one_line(
    name: str, args: list[str], message: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    result = run("classify", PHOTOS, "--model", folder, "--json", *args)
    assert message in one_line_error(result)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--labels", " , "], "got no label"),
        (["--labels", "cat", "--labels-file", "x"], "not both"),
        (["--labels-file", "nowhere.txt"], "nowhere.txt"),
        (["--top", "0"], "--top"),
    ],
)
def test_wrong_label_options_are_wrong_usage(args: list[str], message: str, clip: Path) -> None:
    result = run("classify", PHOTOS, "--model", clip, *args)
    assert result.exit_code == 2
    assert message in result.stderr


def test_classify_without_a_tokenizer_names_the_files(clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(clip, folder)
    (folder / "tokenizer.json").unlink()
    result = run("classify", PHOTOS, "--model", folder, "--labels", "cat", "--json")
    assert "looked for tokenizer.json, and for vocab.json with merges.txt" in one_line_error(result)


def test_a_byte_order_mark_is_no_part_of_a_label(tmp_path: Path) -> None:
    from vitrail.cli.classify import _labels

    (tmp_path / "labels.txt").write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\n")
    assert _labels(None, tmp_path / "labels.txt") == ["cat", "dog"]


# embed into a folder


def test_embed_makes_a_folder_goes_on_and_says_so_in_json(clip: Path, photos: Path) -> None:
    out = photos.parent / "embeddings"
    words = ["embed", photos, "--model", clip, "--out", out, "--part-size", 3, "--json"]
    first = run(*words)
    assert first.exit_code == 3, first.stderr
    facts = json.loads(first.stdout)
    assert {key: facts[key] for key in ("inputs", "embedded", "failed", "parts", "written")} == {
        "inputs": 7,
        "embedded": 6,
        "failed": 1,
        "parts": 3,
        "written": 3,
    }
    second = run(*words)
    assert second.exit_code == 3
    assert json.loads(second.stdout)["written"] == 0
    result = vitrail.read_embeddings(out)
    assert result.paths == [str(path) for path in good(photos)]
    close(result.embeddings, vitrail.load(clip).encode_image(good(photos)))
    assert [path for path, _ in result.errors] == [str(photos / "sub" / "broken.jpg")]
    refused = run(*words[:-3], "--part-size", 4)
    assert "part_size: then 3, now 4" in one_line_error(refused)


def test_embed_takes_tars_and_lists(clip: Path, photos: Path) -> None:
    import tarfile

    tar = photos.parent / "photos.tar"
    with tarfile.open(tar, "w") as shard:
        shard.add(photos / "cat.jpg", "cat.jpg")
    names = photos.parent / "names.txt"
    names.write_text(f"{photos / 'rocket.jpg'}\n{photos / 'gone.jpg'}\n")
    out = photos.parent / "out"
    result = run("embed", tar, "--list", names, "--model", clip, "--out", out)
    assert result.exit_code == 3, result.stderr
    assert "gone.jpg: no such file" in result.stderr
    found = vitrail.read_embeddings(out)
    assert found.paths == [f"{tar}/cat.jpg", str(photos / "rocket.jpg")]
    close(
        found.embeddings,
        vitrail.load(clip).encode_image([photos / "cat.jpg", photos / "rocket.jpg"]),
    )


def test_embed_says_what_it_leaves_out(clip: Path, photos: Path) -> None:
    (photos / "scan.tiff").write_bytes(b"II*\0")
    result = run("embed", photos, "--model", clip, "--out", photos.parent / "out")
    assert "does not read these formats: 1 .tiff" in result.stderr


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_stopped_job_says_what_is_safe_and_leaves_no_draft(
    number: int, code: int, clip: Path, tmp_path: Path
) -> None:
    names = tmp_path / "names.txt"
    names.write_text(f"{PHOTOS / 'cat.jpg'}\n" * 20_000)
    out = tmp_path / "out"
    process = start("embed", "--list", names, "--model", clip, "--out", out, "--part-size", 16)
    try:
        manifest = out / "_manifest.jsonl"
        while not manifest.exists() or not manifest.stat().st_size:  # made first, then written
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, stderr
    assert re.search(r"\d+ parts are committed; run the same command to resume", stderr)
    assert "Traceback" not in stderr
    assert not list(out.rglob("_draft-*"))
    assert vitrail.read_embeddings(out).paths


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_under_the_output_is_one_line(vit: Path) -> None:
    paths = os.pathsep.join(str(ROOT / name) for name in ("engine", "kernels"))
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "vitrail.cli", "info", vit],
            env={**os.environ, "PYTHONPATH": paths},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr == "vitrail: error: cannot write the output: No space left on device\n"


def test_a_reader_that_has_seen_enough_is_told_nothing(vit: Path) -> None:
    process = start("info", vit)
    assert process.stdout
    process.stdout.close()
    assert process.stderr
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 1
