"""Write a config for one's own dataset, which is configs/own.yaml filled in for it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yaml import safe_dump

from vla0.data.lerobot import DataConfig, named
from vla0.data.storage import Stored, refuse_missing
from vla0.errors import InputError
from vla0.train.config import LoggingConfig, TrainConfig, TrainingConfig, read_config

STATE = "observation.state"
MOST_HELD_OUT, OF = 5, 10  # at most 5 episodes are held out, and at most one of 10
RECIPE = """# {dataset} on one GPU:
#   vla0 train --config {file} logging.output_dir=runs/mine
# Numbers that are not here are the published ones (vla0/spec.py, vla0/recipe.py).
model:
  name: Qwen/Qwen2.5-VL-3B-Instruct
data:
  dataset: {dataset} # folder of a LeRobot dataset v3.0, or Hub id
  cameras: # name: key of the dataset, in the order the model sees them; as many as you have
{cameras}
  action: {action}
  state: {state}
  relative_dims: [] # action dimensions written as differences from the state, e.g. [0, 1, 2, 3, 4, 5] for joints
  statistics: quantiles # outliers of teleoperation do not stretch the bounds; minmax is the published way
  held_out: {held_out} # episodes kept back for the loss on unseen data, which decides what `best` is
  num_workers: 4
action:
  chunk_size: 8
augmentation:
  mask: number # or character, the published one
training:
  num_steps: 20000
  batch_size: 8
  gradient_accumulation_steps: 1
  learning_rate: 5e-6
logging:
  output_dir: runs/own
  save_every_n_steps: 1000
"""  # noqa: E501


def write_own_config(words: Sequence[str], file: Path) -> None:
    """Write a YAML config that fits a dataset's cameras, action and state.

    Args:
        words: The dataset as the only word: its folder or Hub id.
        file: The file to write.

    Raises:
        InputError: When there are other words, or the file exists already.
    """
    if len(words) != 1 or "=" in words[0]:
        raise InputError(
            "a dataset and nothing else with --write-config",
            f"{list(words)}",
            "change the file that is written",
        )
    if file.exists():
        raise InputError(
            "a new file for --write-config",
            f"'{file}', which is there",
            "name another: none is written over",
        )
    stored = Stored(words[0])
    depth_keys = [
        key
        for key in stored.meta.camera_keys
        if key in stored.meta.depth_keys or _single(stored.features[key])
    ]
    cameras = named([key for key in stored.meta.camera_keys if key not in depth_keys], words[0])
    lines = [f"    {_text(camera)}: {_text(key)}" for camera, key in cameras.items()]
    if depth_keys:
        depth_cameras = named(depth_keys, words[0])
        lines += [
            f"    # {_text(camera)}: {_text(key)} # one number a pixel: left out"
            for camera, key in depth_cameras.items()
        ]
        spans = ", ".join(f"{_text(camera)}: [0.2, 1.5]" for camera in depth_cameras)
        lines.append(
            f"  # depth: {{{spans}}} # depth maps become grey pictures, these are near and far "
            f"in metres"
        )
    filled = {
        "dataset": _text(words[0]),
        "file": file,
        "cameras": "\n".join(lines),
        "action": _text(_action(stored)),
        "state": "null # no column of the dataset is named observation.state; relative actions "
        "need one",
        "held_out": min(MOST_HELD_OUT, len(stored.places) // OF),
    }
    if STATE in stored.features:
        filled["state"] = (
            f"{STATE} # is written into the prompt; null leaves it out; relative actions need it"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(RECIPE.format(**filled), encoding="utf-8")


def config_to_inspect(words: Sequence[str], file: Path | None = None) -> TrainConfig:
    """Return the config with which a dataset is examined.

    Args:
        words: A dataset, unless the config names it, and key=value words that change the config.
        file: The file of the config. None takes the published settings for one epoch.

    Raises:
        InputError: When the words name several datasets, none, or settings without a config.
    """
    overrides = [word for word in words if "=" in word]
    datasets = [word for word in words if "=" not in word]
    if len(datasets) > 1:
        raise InputError("one dataset", f"{datasets}", "look at one after another")
    if file is not None:
        return read_config(
            TrainConfig, file, [*(f"data.dataset={dataset}" for dataset in datasets), *overrides]
        )
    if overrides:
        raise InputError(
            f"--config, a config for {overrides[0]} to change",
            "none",
            "name one, or leave that out",
        )
    if not datasets:
        raise InputError("a dataset or --config", "neither", "name a folder, a Hub id or a config")
    refuse_missing(datasets[0])
    return TrainConfig(
        data=DataConfig(dataset=datasets[0]),
        training=TrainingConfig(num_epochs=1.0),
        logging=LoggingConfig(output_dir=""),
    )


def _single(feature: dict[str, Any]) -> bool:
    """Return whether a camera has one number per pixel."""
    shape = feature["shape"]
    return len(shape) == 2 or 1 in (shape[0], shape[-1])


def _action(stored: Stored) -> str:
    """Return the key of a dataset's action, or raise InputError when it is not clear."""
    keys = [key for key in stored.features if "action" in key]
    if "action" in keys or len(keys) == 1:
        return "action" if "action" in keys else keys[0]
    raise InputError(
        "a column 'action', or one named like it",
        f"{sorted(stored.features)}",
        "write the config by hand",
    )


def _text(value: str) -> str:
    """Write a word in YAML, in quotes where it needs them."""
    return safe_dump(value, allow_unicode=True, width=10_000).removesuffix("...\n").strip()
