"""Convert a run folder of the official VLA-0 code to a checkpoint, with unchanged weights."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from transformers import AutoProcessor

from vla0.checkpoint.io import link_files
from vla0.checkpoint.lerobot_config import describe
from vla0.checkpoint.location import locate
from vla0.checkpoint.safe_pickle import load_arrays
from vla0.core.prompt import Prompt
from vla0.core.spec import SPEC_FILE, Spec
from vla0.errors import InputError, said
from vla0.files import whole_folder

CAMERAS = ("agentview", "wrist")  # in the order of the official LIBERO config
REMEDY = "give the folder of an official run: config.yaml, dataset_stats.pkl and model_last/"
NEEDED = ("config.yaml", "dataset_stats.pkl")
FETCHED = ("*config.yaml", "*dataset_stats.pkl", "*model_last/*")  # and no optimizer, no videos
KEPT = (".safetensors", ".json", ".txt", ".jinja", ".model")


def convert(
    run: str | Path, out: str | Path, vision_id: bool = False, crop: float | None = None
) -> Spec:
    """Convert an official run folder to a checkpoint.

    Args:
        run: The official run folder, or its id on the Hub.
        out: Where the checkpoint is written.
        vision_id: Whether "Picture 1: " precedes an image. The released weights were trained
            without it, whatever their config.yaml says, because transformers ignored it then.
        crop: Side of the crop as a fraction of the frame's. None takes it from config.yaml.

    Returns:
        The Spec of the checkpoint.

    Raises:
        InputError: When `run` is not such a folder, or `out` holds other files.
    """
    run, out = find_run(run), Path(out)
    spec = read_spec(run, vision_id, crop)
    weights = run / "model_last"
    if not (weights / "config.json").is_file() or not list(weights.glob("*.safetensors")):
        raise InputError(
            f"config.json and safetensors in '{weights}'",
            "none",
            "merge adapters and save as safetensors first",
        )
    with whole_folder(out, SPEC_FILE) as partial:
        link_files(weights, partial, lambda file: file.suffix in KEPT)
        spec.save(partial)
        describe(partial, spec)
        # Prompt raises InputError for a tokenizer that does not fit.
        Prompt(spec, AutoProcessor.from_pretrained(partial))
    return spec


def find_run(run: str | Path) -> Path:
    """Return the folder of an official run.

    Args:
        run: That folder, one that holds it, or its id on the Hub, whence it is fetched.

    Raises:
        InputError: When there is none, or more than one.
    """
    folder = locate(run, only=FETCHED)
    places = sorted(place for place in folder.iterdir() if place.is_dir())
    found = [place for place in places if all((place / name).is_file() for name in NEEDED)]
    if not found or any((folder / name).is_file() for name in NEEDED):
        return folder  # read_spec names what is missing
    if len(found) > 1:
        raise InputError("one run", f"{[str(place) for place in found]}", "name one of them")
    return found[0]


def read_spec(run: Path, vision_id: bool = False, crop: float | None = None) -> Spec:
    """Make the Spec of an official run folder from its config.yaml and dataset_stats.pkl.

    Args:
        run: The official run folder.
        vision_id: As for `convert`.
        crop: As for `convert`.

    Raises:
        InputError: When one of these files is missing or not understood.
    """
    for name in NEEDED:
        if not (run / name).is_file():
            raise InputError(f"'{name}' in '{run}'", "none", REMEDY)
    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        qwen = config["MODEL"]["QWEN"]
        chunk_size, dimensions, bins = (
            int(qwen[key]) for key in ("horizon", "original_action_dim", "num_bins_actions")
        )
        count = int(qwen["num_cam"])
        tile = bool(qwen["tiled_rgb_imgs"])
        sides = [int(side) for side in qwen["rgb_img_size"]]
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        reason = said(error)
        raise InputError(f"an official config.yaml in '{run}'", reason, REMEDY) from None
    if count > len(CAMERAS) or len(set(sides)) != 1:
        remedy = "only the LIBERO configs can be converted"
        raise InputError("one or two cameras, square", f"{count} cameras of {sides}", remedy)
    with (run / "dataset_stats.pkl").open("rb") as file:
        statistics = load_arrays(file, f"{run}/dataset_stats.pkl")
    low, high = _bounds(statistics, dimensions)
    return Spec(
        low=low,
        high=high,
        fps=20.0,
        cameras=CAMERAS[:count],
        base_model=str(qwen.get("qwen_model_id", "Qwen/Qwen2.5-VL-3B-Instruct")),
        chunk_size=chunk_size,
        bins=bins,
        image_size=sides[0],
        crop=_crop(config, crop),
        tile=tile,
        history=int(qwen.get("history", 1)),
        vision_id=vision_id,
    )


def _crop(config: Mapping[str, Any], chosen: float | None) -> float:
    """Return the crop that the user chose, else the one in the official config."""
    if chosen is not None:
        return chosen
    options = str((config.get("DATALOADER") or {}).get("ROBOVERSE", {}).get("cfg_opts", ""))
    match = re.search(r"IMAGE\.crop_img:([0-9.]+)", options)
    if not match:
        remedy = "name the crop yourself: --crop 0.875"
        raise InputError("IMAGE.crop_img in DATALOADER.ROBOVERSE.cfg_opts", f"'{options}'", remedy)
    return float(match[1])


def _bounds(statistics: Any, dimensions: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the (low, high) bounds of the actions in the official statistics."""
    try:
        action_statistics = statistics["out_ori_act"]
        low, high = (
            np.asarray(action_statistics[key], np.float64).reshape(-1) for key in ("min", "max")
        )
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(
            "out_ori_act with min and max in dataset_stats.pkl", reason, REMEDY
        ) from None
    if len(low) != dimensions or len(high) != dimensions:
        raise InputError(
            f"{dimensions} bounds in dataset_stats.pkl", f"{len(low)} and {len(high)}", REMEDY
        )
    return tuple(map(float, low)), tuple(map(float, high))
