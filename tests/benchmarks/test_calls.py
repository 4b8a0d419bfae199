"""benchmarks/gpu.sh: what a call runs, keeps and says, with steps that are small programs."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from vitrail_kernels.launch import Target
from vitrail_kernels.ops.class_mean import class_mean_calls

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
calls, environment, pack, precompile, profiled = map(
    importlib.import_module, ("calls", "environment", "pack", "precompile", "profiled")
)

NOTE = "import os, sys; open(os.environ['ASKED'], 'a').write(sys.argv[1] + chr(10)); "


def step(name: str, program: str = "", seconds: int = 100, **options: Any) -> Any:
    """A step that notes its name, then runs ``program``."""
    return calls.Step(("-c", NOTE + program, name), seconds, **options)


class Gpu:
    """`calls.main` over steps of this file, a state and a folder of its own, and a device."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch, self.asked = folder, patch, folder / "asked"
        patch.setenv("ASKED", str(self.asked))
        patch.setattr(calls, "STATE", folder / "state")
        patch.setattr(calls, "prepare", lambda call: 0)
        patch.setattr(calls, "refuse_dirty", lambda allowed: None)
        patch.setattr(calls, "sources", lambda: "these")
        patch.setattr(calls, "GRACE", 2)
        for name in ("LIMIT", "FRESH", "VITRAIL_TUNED", "VITRAIL_RESULTS"):
            patch.delenv(name, raising=False)

    def __call__(self, *steps: Any, out: str = "out", **settings: str) -> tuple[int, str]:
        """Run these steps as a call: its exit code and its table."""
        table = {each.command[2]: each for each in steps}
        self.patch.setattr(calls, "STEPS", table)
        self.patch.setattr(calls, "CALLS", {name: (name,) for name in table})
        self.asked.write_text("")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            for name, value in {"OUT": str(self.folder / out), **settings}.items():
                patch.setenv(name, value)
            code: int = calls.main([])
        return code, (self.folder / out / "gpu-table.txt").read_text()

    @property
    def ran(self) -> list[str]:
        """The steps that were begun in the last call."""
        return self.asked.read_text().split()


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(tmp_path, monkeypatch)


# -- what a call runs ------------------------------------------------------------------------------


def test_a_step_that_passed_is_not_run_again(gpu: Gpu) -> None:
    steps = [step("a"), step("b")]
    assert gpu(*steps)[0] == 0
    assert gpu.ran == ["a", "b"]
    code, table = gpu(*steps)
    assert (code, gpu.ran) == (0, [])
    assert table.count("ok, earlier") == 2
    assert gpu(*steps, FRESH="1")[0] == 0
    assert gpu.ran == ["a", "b"]
    gpu.patch.setattr(calls, "sources", lambda: "others")
    gpu(*steps)
    assert gpu.ran == ["a", "b"], "of other sources nothing is known"


def test_a_failure_is_told_with_its_reason_and_costs_its_own_step(gpu: Gpu) -> None:
    code, table = gpu(
        step("a", "sys.exit('no such card')"), step("b"), step("c", f"sys.exit({calls.UNFINISHED})")
    )
    assert (code, gpu.ran) == (1, ["a", "b", "c"])
    assert "a                  FAILED with 1" in table
    assert "unfinished" in table
    assert "no such card" in (gpu.folder / "out" / "gpu.log").read_text()
    assert gpu(step("a"), step("b"), step("c"))[0] == 0
    assert gpu.ran == ["a", "c"], "what failed or is not finished is run again"


def test_lines_for_the_log_alone_are_not_printed(gpu: Gpu, capsys: Any) -> None:
    gpu(step("a", "print('@ headline'); print('  detail')", shown="@ "))
    log = (gpu.folder / "out" / "gpu.log").read_text()
    assert "  detail" in log
    printed = capsys.readouterr().out
    assert "@ headline" in printed
    assert "detail" not in printed


def test_a_tool_that_is_not_here_is_no_failure(gpu: Gpu) -> None:
    absent = calls.Step(("no-such-tool", "x", "absent"), 60)
    refusing = step("refusing", "print('Error: Device not supported'); sys.exit(1)")
    code, table = gpu(absent, refusing._replace(refusal="Device not supported"))
    assert code == 0
    assert "NOT RUN: no no-such-tool here" in table
    assert "NOT RUN: Error: Device not supported" in table
    assert "NOT RUN" in gpu(absent)[1], "and it is tried again where it is"


def test_a_failure_beside_tests_that_were_not_run_is_a_failure(gpu: Gpu) -> None:
    """pytest's last lines say how many were not."""
    code, table = gpu(step("tests", "print('SLOW TESTS NOT RUN: 3 of 3'); sys.exit(1)"))
    assert (code, "FAILED with 1" in table) == (1, True)


WAITS = "import signal, time; print('begun', flush=True); "
HANGS = WAITS + "signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"


def test_a_hang_costs_its_step_and_two_of_them_the_rest(gpu: Gpu) -> None:
    gpu.patch.setattr(calls, "STEP_LIMIT", 4)
    gpu.patch.setattr(calls, "LEAST", 1)
    code, table = gpu(step("a", HANGS), step("b"), step("c", HANGS), step("d"))
    assert (code, gpu.ran) == (1, ["a", "b", "c"])
    assert table.count("HUNG: killed") == 2
    assert "not started: two steps hung" in table


def test_an_interrupted_step_says_what_it_knows(gpu: Gpu) -> None:
    gpu.patch.setattr(calls, "STEP_LIMIT", 4)
    gpu.patch.setattr(calls, "LEAST", 1)
    waits = f"try:\n {WAITS}time.sleep(600)\nfinally: print('known so far')"
    code, table = gpu(calls.Step(("-c", f"import os, sys\n{waits}", "a"), 100), step("b"))
    assert (code, gpu.ran) == (1, ["b"])
    assert "OUT OF TIME" in table
    assert "known so far" in (gpu.folder / "out" / "gpu.log").read_text()


def test_a_suite_that_loses_the_device_goes_on_in_another_process(gpu: Gpu) -> None:
    once = "sys.exit(70 if open(os.environ['ASKED']).read().count('a') == 1 else 0)"
    assert gpu(step("a", once))[0] == 0
    assert gpu.ran == ["a", "a"]
    assert gpu(step("b", "sys.exit(70)"))[0] == 1
    assert gpu.ran == ["b"] * calls.ATTEMPTS


def test_steps_share_what_is_left_of_the_limit(gpu: Gpu) -> None:
    call = calls.Call(gpu.folder / "out", 410.0)
    gpu.patch.setattr(calls, "STEPS", {name: step(name, seconds=n) for name, n in SHARES.items()})
    assert call.share("a", ["b", "c"]) == pytest.approx(400 * 100 / 400, abs=10)
    assert call.share("b", ["c"]) == pytest.approx(200, abs=10)
    assert call.share("c", []) == pytest.approx(400, abs=10), "the last has all that is left"
    call.limit = 20.0
    assert call.share("c", []) < calls.LEAST
    call.limit = None
    assert call.share("c", []) == calls.STEP_LIMIT


SHARES = {"a": 100, "b": 150, "c": 150}


def test_nothing_starts_when_the_limit_is_near(gpu: Gpu) -> None:
    code, table = gpu(step("a"), LIMIT="20")
    assert (code, gpu.ran) == (1, [])
    assert "not started: LIMIT is near" in table


def test_a_word_that_is_no_step_is_refused(gpu: Gpu, capsys: Any) -> None:
    assert calls.main(["kernel"]) == 2
    assert "got kernel, wanted pack or some of: first second" in capsys.readouterr().out


def test_every_call_is_of_steps_that_exist() -> None:
    assert {name for names in calls.CALLS.values() for name in names} == calls.STEPS.keys()
    for name, each in calls.STEPS.items():
        program = next((word for word in each.command if word.startswith("benchmarks/")), None)
        assert program is None or (ROOT / program).exists(), name
        for word in each.command:
            word.format(out="", state="", seconds="")
    for names in (calls.CALLS["first"], calls.CALLS["second"]):
        assert sum(calls.STEPS[name].seconds for name in names) <= 540, "a call has ten minutes"


# -- what calls share ------------------------------------------------------------------------------

MEASURE = (
    "import pathlib; folder = pathlib.Path(os.environ['VITRAIL_RESULTS']) / 'card'; "
    "folder.mkdir(parents=True); (folder / 'models.json').write_text('measured')"
)
SWEEP = (
    "import pathlib; folder = pathlib.Path(sys.argv[2]); folder.mkdir(); "
    "(folder / 'sm_90.json').write_text('a table'); "
)
IN_FORCE = "print('tuned by', os.environ.get('VITRAIL_TUNED'))"


def test_results_and_the_tuned_table_reach_the_next_call(gpu: Gpu) -> None:
    """Though its folder for output is another, and empty."""
    gpu.patch.setattr(calls.report, "render", lambda root: [])
    smoke = calls.Step(("-c", NOTE + SWEEP + IN_FORCE, "smoke", "{state}/tuned"), 100)
    gpu(smoke, step("models", MEASURE))
    assert "tuned by None" in (gpu.folder / "out" / "gpu.log").read_text(), "not for the smoke"
    assert (gpu.folder / "out" / "sm_90.json").read_text() == "a table"
    gpu(step("latency", IN_FORCE), out="next")
    assert (gpu.folder / "next" / "card" / "models.json").read_text() == "measured"
    tuned = gpu.folder / "state" / "tuned"
    assert f"tuned by {tuned}" in (gpu.folder / "next" / "gpu.log").read_text()


def test_a_table_that_was_brought_along_is_in_force(gpu: Gpu) -> None:
    gpu.patch.setattr(calls, "ROOT", gpu.folder)
    (gpu.folder / pack.FOLDER).mkdir(parents=True)
    (gpu.folder / pack.FOLDER / "sm_90.json").write_text("a table")
    gpu(step("latency", IN_FORCE))
    assert "tuned by /" in (gpu.folder / "out" / "gpu.log").read_text()


# -- what is built beforehand ----------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree without git, in which a pack is three small files."""
    tree = tmp_path / "tree"
    for folder in (pack.ENGINE, pack.BINARIES):
        (tree / folder).mkdir(parents=True)
    tag = sys.implementation.cache_tag
    write = "import sys, pathlib; path = pathlib.Path(sys.argv[1]); "
    write += "path.parent.mkdir(parents=True, exist_ok=True); path.write_text('built')"
    built = {"extension": f"{pack.ENGINE}/_C.{tag}-x.so", "binaries": f"{pack.BINARIES}/a.fatbin"}
    monkeypatch.setattr(pack, "BUILDS", {k: ("-c", write, v) for k, v in built.items()})
    monkeypatch.setattr(pack, "KERNELS", ("-c", write, str(tmp_path / "cache/key/a.cubin")))
    monkeypatch.setattr(pack, "CACHE", tmp_path / "cache")
    for module in (pack, environment):
        monkeypatch.setattr(module, "ROOT", tree)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setenv("VITRAIL_COMMIT", "0123abcd")
    for name in ("TRITON_CACHE_DIR", "VITRAIL_CACHE"):
        monkeypatch.setenv(name, "elsewhere")
    return tree


def test_a_pack_is_put_where_it_belongs(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pack.pack() == 0
    monkeypatch.delenv("VITRAIL_COMMIT")
    for built in (copy / pack.ENGINE, copy / pack.BINARIES, pack.CACHE):
        shutil.rmtree(built)
    (copy / pack.ENGINE).mkdir()
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    (line,) = pack.unpack()
    assert "commit" in line
    assert len(list((copy / pack.ENGINE).glob("_C.*.so"))) == 1
    assert (copy / pack.BINARIES / "a.fatbin").read_text() == "built"
    assert (pack.CACHE / "key/a.cubin").read_text() == "built"
    assert os.environ["TRITON_CACHE_DIR"] == str(pack.CACHE / "triton")
    assert os.environ["VITRAIL_CACHE"] == str(pack.CACHE / "vitrail")
    assert environment.revision() == ("0123abcd", False)
    (pack.CACHE / "key/later.cubin").write_text("compiled in a call")
    list(pack.unpack())
    assert (pack.CACHE / "key/later.cubin").exists(), "one archive is unpacked once"


def test_an_extension_of_other_sources_is_not_used(copy: Path) -> None:
    assert pack.pack() == 0
    (copy / "csrc").mkdir()
    (copy / "csrc/plan.cpp").write_text("changed")
    (built,) = (copy / pack.ENGINE).glob("_C.*.so")
    built.write_text("built here since")
    first, last = pack.unpack()
    assert "of another csrc" in first
    assert "kernels.tar.xz" in last, "kernels are kept by what they follow from"
    assert built.read_text() == "built here since"


def test_a_part_that_does_not_build_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "KERNELS", ("-c", "raise SystemExit(1)"))
    assert pack.pack() == 1
    shutil.rmtree(copy / "build")
    (line,) = pack.unpack()
    assert line.startswith("no build/pack")


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_tritons_binding_is_compiled_without_a_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is then taken from the cache by a process that has a driver. Triton 3.6 compiles a
    launcher for each signature besides."""
    build, driver = map(
        pytest.importorskip, ("triton.runtime.build", "triton.backends.nvidia.driver")
    )
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "own"))
    half = {"dtype": torch.float16, "device": "meta"}
    x, out = torch.empty(10, 64, **half), torch.empty(2, 128, **half)
    (call,) = class_mean_calls(Target(90, 132), out, x, tokens=5, prefix=1)

    def compile_both() -> None:
        driver.CudaUtils()
        precompile.compile_with_launcher(call, 90)

    with precompile.launchers_for_elsewhere():
        compile_both()
    expected = 1 + hasattr(driver, "make_launcher")
    assert len(list(tmp_path.glob("*/*.so"))) == expected
    assert len(list(tmp_path.glob("own/*.kernel"))) == 1

    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("compiled again"))
    with mock.patch.object(build, "_load_module_from_path") as load:
        monkeypatch.setattr(driver, "library_dirs", list)
        compile_both()
    assert load.call_count == expected


# -- the other programs ----------------------------------------------------------------------------

NCU = """#!/bin/sh
case "$*" in
*--import*) echo "a page of $*" ;;
*) while [ $# -gt 0 ]; do [ "$1" = -o ] && touch "$2.ncu-rep"; shift; done ;;
esac
"""


def test_ncus_pages_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ncu").write_text(NCU)
    (tmp_path / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert profiled.main([str(tmp_path)]) == 0
    assert "--page details" in (tmp_path / "ncu-details.csv").read_text()
    assert (tmp_path / "ncu-source.csv.gz").exists()


def test_without_ncu_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert profiled.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.strip() == calls.STEPS["ncu"].refusal


def test_what_was_recorded_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A launch that fails is told, and an interruption costs what was not yet launched."""
    record = importlib.import_module("gpu.record")
    case = SimpleNamespace(given={"x": torch.ones(2)})

    def by_tiles(name: str, case: Any) -> Any:
        if name == "bad":
            raise RuntimeError("too many resources")
        if name == "interrupted":
            raise KeyboardInterrupt
        return {"out": torch.ones(3)}, 0

    monkeypatch.setattr(record, "by_tiles", by_tiles)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    card = SimpleNamespace(name="card", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: card)
    names = ["good", "bad", "next", "interrupted", "never"]
    monkeypatch.setattr(record, "small_cases", lambda: iter([(name, case) for name in names]))
    with pytest.raises(KeyboardInterrupt):
        record.record(tmp_path / "recorded.safetensors")
    assert load_file(tmp_path / "recorded.safetensors").keys() == {"good|out", "next|out"}
    assert "FAILED bad: RuntimeError: too many resources" in capsys.readouterr().out
    monkeypatch.setattr(record, "small_cases", lambda: iter([("good", case), ("bad", case)]))
    assert record.record(tmp_path / "again.safetensors") == 1


def test_the_script_is_a_door_and_no_more(tmp_path: Path) -> None:
    subprocess.run(["bash", "-n", ROOT / "benchmarks" / "gpu.sh"], check=True)
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "kernel"],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "got kernel" in done.stdout


# -- a whole call ----------------------------------------------------------------------------------


SETTINGS = {"LIMIT", "FRESH", "ALLOW_DIRTY", "VITRAIL_COMMIT", "VITRAIL_RESULTS", "VITRAIL_TUNED"}
NO_DEVICE = ("Found no NVIDIA driver", "Torch not compiled with CUDA enabled")


class Machine:
    """gpu.sh in the copy ``tree``, without git, on a machine whose torch claims an H100."""

    def __init__(self, tree: Path) -> None:
        self.tree, self.out = tree, tree.parent / "out"

    def files(self) -> list[Path]:
        """What the last call left for its caller."""
        return [path for path in self.out.rglob("*") if path.is_file()]

    def __call__(self, *words: str) -> tuple[int, str]:
        """The exit code and the output of a call, which finds an empty folder for its files."""
        shutil.rmtree(self.out, ignore_errors=True)
        environment = {
            **{name: value for name, value in os.environ.items() if name not in SETTINGS},
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT / "tests/claimed_device"),
            "GIT_CEILING_DIRECTORIES": str(self.tree.parent),
            "OUT": str(self.out),
        }
        command = ["bash", "benchmarks/gpu.sh", *words]
        done = subprocess.run(
            command, cwd=self.tree, env=environment, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """A copy of this tree's files, and of the extension that is built here."""
    tree = tmp_path_factory.mktemp("copy") / "tree"
    listed = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout
    built = [str(file.relative_to(ROOT)) for file in (ROOT / pack.ENGINE).glob("_C.*.so")]
    for name in filter(None, [*names.decode().split("\0"), *built]):
        if (ROOT / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    return Machine(tree)


def check_faults(output: str) -> None:
    """Whatever failed did so for want of a device."""
    for line in output.splitlines():
        fault = any(f"{word} " in line for word in ("FAILED", "FAULT", "WRONG", "HANGS", "DIED"))
        if fault and " after " not in line:  # a step's note
            assert any(reason in line for reason in NO_DEVICE), line


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would do all of it, for minutes")
def test_both_calls_run_to_the_end_on_a_machine_that_lacks_only_the_gpu(machine: Machine) -> None:
    code, output = machine("first")
    assert code == 1
    check_faults(output)
    smoke = importlib.import_module("smoke")
    for name in (name for group in smoke.groups_of("cuda") for name in group.names):
        assert f"@ {name} " in output, "every step has its line"
    for note in ("smoke              FAILED", "record             FAILED", "ncu                "):
        assert note in output, output[-3000:]
    assert "commit unknown-dirty" in output, "without git nothing refuses"
    assert len(machine.files()) <= 5, "ncu writes two more, the sweep one: eight come back"

    code, output = machine("models", "latency")
    assert code == 1
    check_faults(output)
    for name in ("B/16, batch 256", "load"):
        assert name in output
    assert "commit unknown dirty" in output, "in the table"
    assert len(machine.files()) <= 7


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would do all of it, for minutes")
def test_three_calls_in_a_row_share_a_state(machine: Machine) -> None:
    """Though the first leaves images, a tuned table and results in the tree."""
    state = machine.tree / "build/gpu"
    for number in range(3):
        code, output = machine("ceilings")
        assert code == 1, output
        assert (state / "mark").exists() == (number > 0)
        (state / "mark").touch()
        assert (machine.out / "nvidia-h100-claimed/ceilings.json").exists()
        for built in ("binaries/resize.json", "tuned/sm_90.json"):
            file = machine.tree / "kernels/vitrail_kernels" / built
            file.parent.mkdir(exist_ok=True)
            file.write_text('{"provenance": {}, "configs": {}}')
    (machine.tree / "kernels/vitrail_kernels/configs.py").open("a").write("# changed\n")
    machine("ceilings")
    assert not (state / "mark").exists(), "other sources have another state"
