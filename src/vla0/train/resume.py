"""Decide whether a run resumes, and from where.

A run resumes only with the config and the data that it began with, and from a complete state.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from vla0.data.lerobot import Source
from vla0.errors import InputError, said
from vla0.files import read_json
from vla0.train.config import TrainConfig

FREE = ("logging.", "data.num_workers")  # keys of a config that may change when a run resumes
DATA = "data that was read"  # key of train_config.json: the data when the run began
DAMAGED = (
    "it is damaged: bring it back, or begin anew in another output_dir, from the weights in "
    "RUN/last"
)


def saved(file: Path, device: Any = None) -> Any:
    """Return what torch saved in a file of a training state.

    Raises:
        InputError: When the file is missing or damaged.
    """
    try:
        return torch.load(file, device, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, UnpicklingError) as error:
        raise InputError(
            f"a training state that is whole in '{file}'", said(error), DAMAGED
        ) from None


def recorded(config: TrainConfig, processes: int) -> dict[str, Any]:
    """Return what train_config.json records of a config."""
    training = config.training
    batch = training.batch_size * training.gradient_accumulation_steps * processes
    return {**json.loads(json.dumps(dataclasses.asdict(config))), "global_batch": batch}


def resumable(config: TrainConfig, output: Path, processes: int) -> Path | None:
    """Return the Trainer's folder to resume from, or None for a new run.

    Raises:
        InputError: When another config or an earlier version of vla0 ran in the folder, or when the
            checkpoint or its training state is missing.
    """
    last, file = output / "last", output / "train_config.json"
    refuse_dangling(last)
    if not last.exists():
        return None
    if not file.exists() and (output / "recipe.json").exists():
        remedy = f"choose another output_dir; model.name={last} begins with its weights"
        raise InputError(
            f"a run that this version of vla0 began in '{output}'",
            "one of an earlier version (recipe.json)",
            remedy,
        )
    before = {key: value for key, value in _read(file).items() if key != DATA}
    refuse_other_config(output, before, recorded(config, processes), FREE)
    state = output / "state" / f"checkpoint-{int(last.resolve().name.removeprefix('step-'))}"
    if not state.is_dir():
        raise InputError(
            f"the training state of '{last}'", f"no '{state}'", "choose another output_dir"
        )
    return state


def refuse_dangling(last: Path) -> None:
    """Raise InputError where the link `last` leads to no checkpoint."""
    if last.is_symlink() and not last.exists():
        got = f"'{last.readlink()}', which is not there"
        raise InputError(
            f"the checkpoint that '{last}' names",
            got,
            "bring it back, or choose another output_dir",
        )


def refuse_other_config(
    output: Path, before: Mapping[str, Any], now: Mapping[str, Any], free: tuple[str, ...]
) -> None:
    """Raise InputError where a run would resume with a config that it did not begin with.

    Args:
        output: The folder of the run.
        before: The config that it began with.
        now: The config of now.
        free: Beginnings of keys that may change.
    """
    before, now = _flat(before), _flat(now)
    for key in {**now, **before}:
        if before.get(key) != now.get(key) and not key.startswith(free):
            raise InputError(
                f"the config of '{output}' to go on with",
                f"{key}: {now.get(key)} instead of {before.get(key)}",
                "choose another output_dir, or remove that folder",
            )


def refuse_other_data(output: Path, sources: Mapping[str, Source]) -> None:
    """Raise InputError where a run would resume with data that it did not begin with."""
    before = _read(output / "train_config.json").get(DATA, {})  # older versions recorded nothing
    for name, source in sources.items():
        now, dataset = json.loads(json.dumps(source.fingerprint())), source.config.dataset
        # Older versions recorded the data under the dataset, not under its name in the config.
        for key, value in before.get(name, before.get(dataset, now)).items():
            if now.get(key) != value:
                remedy = (
                    "bring that dataset back, or choose another output_dir "
                    "(model.name=CHECKPOINT goes on from its weights)"
                )
                raise InputError(
                    f"the data that '{output}' began with",
                    f"other {key} of '{dataset}': {now.get(key)}, were {value}",
                    remedy,
                )


def _read(file: Path) -> dict[str, Any]:
    """Read a JSON file, {} where there is none."""
    return read_json(file, DAMAGED) if file.exists() else {}


def _flat(nested: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one whose keys have dots."""
    flat = {}
    for key, value in nested.items():
        flat |= (
            _flat(value, f"{above}{key}.")
            if isinstance(value, Mapping)
            else {f"{above}{key}": value}
        )
    return flat


def ended(state: Path) -> bool:
    """Return whether all steps of a run are done.

    Args:
        state: The Trainer's folder of the last checkpoint.

    Raises:
        InputError: When the file of that state is damaged.
    """
    content = read_json(state / "trainer_state.json", DAMAGED)
    step, max_steps = content.get("global_step"), content.get("max_steps")
    if not (isinstance(step, int) and isinstance(max_steps, int)):
        raise InputError(
            f"global_step and max_steps in '{state / 'trainer_state.json'}'",
            f"{step} and {max_steps}",
            DAMAGED,
        )
    return step >= max_steps
