"""Download datasets from the Hub, and upload checkpoints to it.

The Hub's client resumes interrupted transfers and checks the files.
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from vla0.checkpoint.location import UNWANTED
from vla0.core.spec import Spec
from vla0.errors import InputError, nearest, said
from vla0.files import write_whole

logger = logging.getLogger(__name__)

KNOWN = {  # name → dataset on the Hub
    "libero": "lerobot/libero",  # 1,693 episodes of all four suites, v3.0, videos
    "libero-images": "HuggingFaceVLA/libero",  # the same with pictures
}


def download(name: str, out: str | Path | None = None) -> Path:
    """Download a dataset, unless it is already there.

    A dataset of format v2.0 or v2.1 is converted to v3.0 in place.

    Args:
        name: A key of KNOWN, or the "owner/name" of a LeRobot dataset on the Hub.
        out: The folder to write. None takes data/<name>.

    Returns:
        The folder.

    Raises:
        InputError: When the name is unknown or the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    if name not in KNOWN and name.count("/") != 1:
        raise InputError(
            f"one of {', '.join(KNOWN)}, or owner/name on the Hub",
            f"'{name}'",
            nearest(name, KNOWN),
        )
    place = Path("data") / name.rpartition("/")[2]
    folder, repo = Path(out or place).expanduser(), KNOWN.get(name, name)
    try:
        snapshot_download(repo, repo_type="dataset", local_dir=folder)
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        OSError,
    ) as error:
        reason = said(error)
        raise InputError(
            f"'{repo}' on the Hub",
            reason,
            "check the name and the connection; the same command goes on where it stopped",
        ) from None
    upgrade(folder, repo)
    return folder


def push(checkpoint: str | Path, repo: str, private: bool = False) -> str:
    """Upload a checkpoint folder, with its model card, to the Hub.

    Args:
        checkpoint: Checkpoint folder.
        repo: The "owner/name" of the model on the Hub, which is created if it does not exist.
        private: Whether a new model is private.

    Returns:
        The address of the upload.

    Raises:
        InputError: When the folder is not a checkpoint, the Hub cannot be reached, or the user may
            not write there.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    folder = Path(checkpoint).resolve()  # `last` is a link to a checkpoint
    Spec.load(folder)
    if not list(folder.glob("*.safetensors")):
        raise InputError(f"weights in '{checkpoint}'", "none", "name a checkpoint folder")
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                ignore_patterns=UNWANTED,
                commit_message="vla0 push",
            )
        )
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        OSError,
    ) as error:
        reason = said(error)
        remedy = (
            "check the name (owner/name) and the connection, and `hf auth login`; what is "
            "there already is not sent again"
        )
        raise InputError(f"leave to write '{repo}' on the Hub", reason, remedy) from None


def upgrade(folder: Path, repo: str) -> None:
    """Convert a LeRobot dataset of format v2.0 or v2.1 to v3.0 in place.

    Args:
        folder: Folder of the dataset.
        repo: Its id on the Hub.

    Raises:
        InputError: When the folder holds no dataset, or one of another format.
    """
    file = folder / "meta" / "info.json"
    if not file.is_file():
        raise InputError(f"a LeRobot dataset in '{repo}'", "no meta/info.json", "name another")
    info = json.loads(file.read_text(encoding="utf-8"))
    version = info.get("codebase_version")
    if version == "v2.0":
        logger.info("'%s' is of v2.0: measuring its episodes one by one", folder)
        write_whole(folder / "meta" / "episodes_stats.jsonl", _episode_statistics(folder, info))
        info["codebase_version"] = version = "v2.1"
        write_whole(file, json.dumps(info, indent=4))
    if version == "v2.1":
        from lerobot.scripts.convert_dataset_v21_to_v30 import convert_dataset

        logger.info("converting '%s' from v2.1 to v3.0", folder)
        convert_dataset(repo, root=folder, push_to_hub=False)
    elif version != "v3.0":
        raise InputError(
            "a LeRobot dataset v2.0, v2.1 or v3.0",
            f"{version}",
            f"take another, e.g. {KNOWN['libero']}",
        )


def _episode_statistics(folder: Path, info: dict[str, Any]) -> str:
    """Compute the statistics of each episode, one JSON line each, which v2.1 has and v2.0 lacks.

    Pictures are not measured; their statistics are those of the whole dataset.
    """
    import pyarrow.parquet as parquet

    meta = folder / "meta"
    dataset_statistics = json.loads((meta / "stats.json").read_text(encoding="utf-8"))
    kinds = {
        key: feature["dtype"]
        for key, feature in info["features"].items()
        if feature["dtype"] != "string"
    }
    narrow = [key for key, kind in kinds.items() if kind not in ("image", "video")]
    lines = []
    for line in (meta / "episodes.jsonl").read_text(encoding="utf-8").splitlines():
        number = json.loads(line)["episode_index"]
        data = info["data_path"].format(
            episode_chunk=number // info["chunks_size"], episode_index=number
        )
        table = parquet.read_table(folder / data, columns=narrow)
        count = [table.num_rows]
        stats = {
            key: {**dataset_statistics[key], "count": count} for key in kinds if key not in narrow
        }
        for key in narrow:
            values = np.stack([np.atleast_1d(value) for value in table[key].to_pylist()]).astype(
                np.float64
            )
            measured = {
                "min": values.min(0),
                "max": values.max(0),
                "mean": values.mean(0),
                "std": values.std(0),
            }
            stats[key] = {name: value.tolist() for name, value in measured.items()} | {
                "count": count
            }
        lines.append(json.dumps({"episode_index": number, "stats": stats}))
    return "\n".join(lines) + "\n"
