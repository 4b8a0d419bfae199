"""``--devices``: the devices of a job, and the embedder that uses them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from vitrail.cli import console, options, ranks

if TYPE_CHECKING:
    from vitrail.jobs.embedder import Embedder

ALL = "all"


def check_devices(text: str | None, device: str, is_device_given: bool) -> None:
    """Wrong usage of ``--devices``, as far as it can be told without PyTorch."""
    if text is None:
        return
    if is_device_given:
        raise typer.BadParameter(
            f"got {text!r} and --device {device}, wanted one of the two options",
            param_hint="--devices",
        )
    local_count = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if text == ALL and local_count not in ("", "1"):
        raise typer.BadParameter(
            f"got {ALL!r} in one of {local_count} processes that a launcher has "
            "started on this machine; start one process a machine, or leave --devices out",
            param_hint="--devices",
        )
    for name in text.split(","):
        kind, _, number = name.strip().removeprefix("cuda:").rpartition(":")
        is_number = number.isascii() and number.isdigit() and not kind
        if not is_number and name.strip() != "cpu" and text != ALL:
            raise typer.BadParameter(
                f"got {text!r}, wanted {ALL}, or numbers of GPUs such as 0,1,3, or cpu,cpu",
                param_hint="--devices",
            )


def parse_devices(text: str) -> list[str]:
    """ "0,cuda:1" -> ["cuda:0", "cuda:1"]; "all": every GPU, or the CPU if there is none.

    Raises InputError for a GPU that PyTorch does not find.
    """
    import torch

    from vitrail.model.arguments import check_device

    if text == ALL:
        count = torch.cuda.device_count()
        return [f"cuda:{number}" for number in range(count)] or ["cpu"]
    names = [name.strip() for name in text.split(",")]
    devices = [name if name == "cpu" else f"cuda:{name.removeprefix('cuda:')}" for name in names]
    return [str(check_device(device, "devices")) for device in devices]


@contextmanager
def open_embedder(
    name: str,
    device: str,
    devices: str | None,
    dtype: str,
    revision: str | None,
    local_files_only: bool,
    resize: str,
    memory_limit: str | None,
) -> Iterator[tuple[Embedder, list[str]]]:
    """The embedder of ``device``, or of ``devices``; and the names of its devices.

    The other arguments are those of `vitrail.load`, which raises the errors.
    """
    if devices is None:
        from vitrail.jobs.embedder import ModelEmbedder

        device = ranks.choose_device(device)
        model = options.load(name, device, dtype, revision, local_files_only, resize, memory_limit)
        yield ModelEmbedder(model), [str(model.device)]
        return
    from vitrail.jobs.workers import DeviceWorkers

    chosen = parse_devices(devices)
    with console.say_warnings():
        workers = DeviceWorkers(
            name,
            chosen,
            console.say,
            dtype=dtype,
            revision=revision,
            local_files_only=local_files_only,
            resize=resize,
            memory_limit=memory_limit,
        )
    with workers:
        yield workers, chosen
