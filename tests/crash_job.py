"""Runs jobs in processes that die when told to: one JSON request a line, one JSON answer a line.

Each job runs in a fork of this process, which has imported everything and started no thread. A
request has ``model``, ``list``, ``out``, ``part_size``, maybe ``devices`` and ``batch_size``, and
maybe one way to die by SIGKILL: ``after`` seconds from the start of the job (from the start of its
process, if ``early``), or from the end of its first ``commits`` commits; or at the ``nth`` call of
those in CALLS ("when": before it, after it, or halfway through what it writes). Answers:
``status`` as os.waitpid gives it, the calls made, memory: (inputs done, KiB of RssAnon and VmSwap),
and ``left``: how many processes of the job were still there LEFT_SECONDS after its end.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vitrail.model.loading  # imports torch too, which a fork would do again for each job
from vitrail.jobs import folder as job
from vitrail.jobs.embedder import ModelEmbedder
from vitrail.jobs.listing import find_images
from vitrail.jobs.rows import EmbedOptions
from vitrail.jobs.workers import DeviceWorkers

LEFT_SECONDS = 30
PR_SET_CHILD_SUBREAPER = 36
TRIM = ctypes.CDLL(None).malloc_trim
CALLS = ("pwrite", "fsync", "link", "replace", "ftruncate")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def patched(name: str, request: dict[str, Any], made: list[str]) -> Callable[..., Any]:
    real = getattr(os, name)

    def call(*given: Any) -> Any:
        made.append(name)
        dies = len(made) == request.get("nth")
        if dies and request["when"] == "before":
            die()
        if dies and request["when"] == "half" and name == "pwrite":
            descriptor, data, at = given
            real(descriptor, data[: len(data) // 2], at)
            die()
        result = real(*given)
        if dies:
            die()
        return result

    return call


def memory() -> int:
    """KiB that are in use: rings of objects, as exceptions make them, wait up to 30,000 images for
    the garbage collector, and how the C heap keeps what is free depends on what threads did when.
    """
    gc.collect()
    TRIM(0)
    status = Path("/proc/self/status").read_text()
    return sum(int(kib) for kib in re.findall(r"^(?:RssAnon|VmSwap):\s+(\d+) kB", status, re.M))


def work(request: dict[str, Any], answers: int) -> None:
    calls: list[str] = []
    grown: list[tuple[int, int]] = []
    for name in CALLS:
        setattr(os, name, patched(name, request, calls))
    embedder: Any
    if "devices" in request:
        embedder = DeviceWorkers(request["model"], request["devices"])
    else:
        embedder = ModelEmbedder(vitrail.load(request["model"]))
    sources = find_images([], [request["list"]]).sources
    os.write(answers, b"{}\n")
    commit = job.commit

    def committed(*given: Any) -> None:
        commit(*given)
        os.write(answers, b"{}\n")

    if request.get("commits"):
        job.commit = committed
    options = EmbedOptions(part_size=request["part_size"], batch_size=request.get("batch_size"))
    job.embed_to_folder(
        embedder,
        sources,
        Path(request["out"]),
        options,
        progress=lambda done: grown.append((done, memory())),
    )
    if "devices" in request:
        embedder.close()
    os.write(answers, json.dumps({"calls": calls, "memory": grown}).encode() + b"\n")


def left() -> int:
    """Waits for the processes that a job has left to this one; kills and counts those that stay."""
    deadline = time.monotonic() + LEFT_SECONDS
    while time.monotonic() < deadline:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.01)
        except ChildProcessError:
            return 0
    staying = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for process in staying:
        os.kill(int(process), signal.SIGKILL)
    return len(staying)


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans of a job come to this process
    for line in sys.stdin:
        request = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(reading)
                work(request, writing)
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.close(writing)
        with open(reading) as answers:
            for _ in range(0 if request.get("early") else 1 + request.get("commits", 0)):
                answers.readline()
            if "after" in request:
                time.sleep(request["after"])
                os.kill(child, signal.SIGKILL)
            said = answers.read().splitlines()
        status = os.waitpid(child, 0)[1]
        told = json.loads(said[-1]) if status == 0 else {}
        print(json.dumps({"status": status, "left": left(), **told}), flush=True)


if __name__ == "__main__":
    main()
