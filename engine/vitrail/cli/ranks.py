"""The shard and the device of a process that torchrun, or a launcher like it, has started.

Slurm's variables are not read: an interactive allocation sets them too.
"""

import os
from dataclasses import dataclass

import typer

from vitrail.errors import InputError
from vitrail.jobs.shards import WHOLE, Shard


@dataclass(frozen=True, slots=True)
class ChosenShard:
    """A shard, and why: for example "--shard"; ``launched`` if a launcher's variables say so."""

    shard: Shard
    reason: str = ""
    launched: bool = False

    def __str__(self) -> str:
        return f"shard {self.shard} ({self.reason})"


def choose_shard(text: str | None) -> ChosenShard:
    """The shard that ``--shard`` names, or else RANK and WORLD_SIZE, or else the whole job.

    Wrong usage if ``text`` or the variables name none.
    """
    if text is not None:
        try:
            return ChosenShard(Shard.parse(text), "--shard")
        except InputError as error:
            raise typer.BadParameter(
                str(error).removeprefix("shard: "), param_hint="--shard"
            ) from error
    rank, count = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None and count is None:
        return ChosenShard(WHOLE)
    reason = ", ".join(
        f"{name}={value}" if value is not None else f"{name} is not set"
        for name, value in (("RANK", rank), ("WORLD_SIZE", count))
    )
    try:
        shard = Shard.parse(f"{rank}/{count}")
    except InputError:
        raise typer.BadParameter(
            f"got {reason} from the environment, wanted RANK from 0 to WORLD_SIZE - 1, or neither; "
            "name the shard with --shard K/N, or the whole job with --shard 0/1",
            param_hint="--shard",
        ) from None
    return ChosenShard(shard, reason, launched=shard.count > 1)


def choose_device(device: str) -> str:
    """``device``; but if it is "auto" and there are GPUs, the GPU that LOCAL_RANK names.

    Raises InputError if LOCAL_RANK names no GPU.
    """
    rank = os.environ.get("LOCAL_RANK")
    if device != "auto" or rank is None:
        return device
    import torch

    if not torch.cuda.is_available():
        return device
    count = torch.cuda.device_count()
    if not (rank.isascii() and rank.isdigit() and int(rank) < count):
        raise InputError(
            f"device: got LOCAL_RANK={rank} from the environment, but PyTorch finds {count} CUDA "
            "devices; start a process for each GPU, or name the device, such as --device cuda:0"
        )
    return f"cuda:{int(rank)}"
