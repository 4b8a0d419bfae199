"""Pickled models: the arguments that load them again and their fingerprint, never weights."""

from dataclasses import asdict
from typing import Any

import torch

from vitrail.errors import CheckpointError, InputError, VitrailError, show
from vitrail.model.fingerprint import Fingerprint
from vitrail.model.load_arguments import LoadArguments
from vitrail.model.loaded_towers import LoadedTowers
from vitrail.model.loading import load_again_on
from vitrail.model.model import Model
from vitrail.model.replicas import Replicas
from vitrail.tower_operators import live_towers

State = tuple[dict[str, Any], dict[str, Any]]


def state(load_arguments: LoadArguments | None, content: Fingerprint) -> State:
    """The arguments of `load_model` and `load_towers`: plain values, for other versions to read.

    Raises InputError for a model that `load` did not make.
    """
    if load_arguments is None:
        raise InputError(
            "pickle: got a model that was made from parts, wanted one from vitrail.load, whose "
            "arguments load it again"
        )
    return asdict(load_arguments), asdict(content)


def load_model(arguments: dict[str, Any], content: dict[str, Any]) -> Model:
    """The pickled model, loaded again.

    Raises CheckpointError if its fingerprint is another; otherwise the errors of `load`.
    """
    return _load_models(arguments, content, [arguments["device"]])[0]


def load_replicas(
    arguments: dict[str, Any], content: dict[str, Any], devices: list[str]
) -> Replicas:
    """The pickled replicas, loaded again. Errors: see `load_model`."""
    return Replicas(_load_models(arguments, content, devices))


def _load_models(
    arguments: dict[str, Any], content: dict[str, Any], devices: list[str]
) -> list[Model]:
    source = show(arguments.get("source"))
    wanted = Fingerprint(content["digits"], content["parts"])
    try:
        load_arguments = LoadArguments(**arguments)
    except TypeError as error:  # a field of another version
        raise CheckpointError(
            f"pickled model of {source}: got {error}, wanted this version's arguments; it was "
            f"pickled by Vitrail {wanted.parts.get('version')}: load the model with vitrail.load"
        ) from error
    try:
        models = load_again_on(load_arguments, devices)
        loaded = models[0].fingerprint_content
    except VitrailError as error:
        raise type(error)(f"pickled model of {source} is loaded again: {error}") from error
    if loaded != wanted:
        raise CheckpointError(
            f"pickled model of {source}: got the fingerprint {loaded.digits}, wanted "
            f"{wanted.digits}, as it was pickled. These differ: {loaded.differences(wanted)}"
        )
    return models


def load_towers(arguments: dict[str, Any], content: dict[str, Any]) -> LoadedTowers:
    """The towers of a pickled module: those that live in this process, or of a model loaded again.

    Errors: see `load_model`.
    """
    for towers in live_towers(content["digits"], torch.device(arguments["device"])):
        same_limit = towers.memory_limit == arguments.get("memory_limit")
        if isinstance(towers, LoadedTowers) and same_limit:
            return towers
    return load_model(arguments, content).towers
