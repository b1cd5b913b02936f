"""Public datasets and LIBERO's meshes, by name: fetched by the Hub's own client, which resumes and checks what it fetches."""

import json
import logging
from pathlib import Path

from vla0.envs.libero_files import CACHE
from vla0.spec import InputError, nearest

logger = logging.getLogger(__name__)

ASSETS = "libero-assets"
KNOWN = {  # name → dataset on the Hub
    ASSETS: "lerobot/libero-assets",
    "libero": "lerobot/libero",  # 1,693 episodes of all four suites, v3.0, videos
    "libero-images": "HuggingFaceVLA/libero",  # the same with pictures
}


def download(name: str, out: str | Path | None = None) -> Path:
    """The folder of what `name` names: one of KNOWN, or a LeRobot dataset on the Hub, "owner/name".

    out: by default data/<name>; LIBERO's meshes go where hf-libero looks for them. What is there already is not fetched again.
    A dataset of format v2.1 is converted to v3.0 in its place. Raises InputError offline, or for an unknown name.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if name not in KNOWN and name.count("/") != 1:
        raise InputError(f"one of {', '.join(KNOWN)}, or owner/name on the Hub", f"'{name}'", nearest(name, KNOWN))
    place = CACHE if name == ASSETS else Path("data") / name.rpartition("/")[2]
    folder, repo = Path(out or place).expanduser(), KNOWN.get(name, name)
    try:
        snapshot_download(repo, repo_type="dataset", local_dir=folder)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
        raise InputError(
            f"'{repo}' on the Hub", reason, "check the name and the connection; the same command goes on where it stopped"
        ) from None
    if name != ASSETS:
        upgrade(folder, repo)
    return folder


def upgrade(folder: Path, repo: str) -> None:
    """Brings a LeRobot dataset of v2.1 to v3.0, in its place. Raises InputError for what is no dataset, or is older."""
    info = folder / "meta" / "info.json"
    if not info.is_file():
        raise InputError(f"a LeRobot dataset in '{repo}'", "no meta/info.json", "name another")
    version = json.loads(info.read_text(encoding="utf-8")).get("codebase_version")
    if version == "v2.1":
        from lerobot.scripts.convert_dataset_v21_to_v30 import convert_dataset

        logger.info("converting '%s' from v2.1 to v3.0", folder)
        convert_dataset(repo, root=folder, push_to_hub=False)
    elif version != "v3.0":
        raise InputError(
            "a LeRobot dataset v3.0 or v2.1", f"{version}", f"bring it to v2.1 with an older lerobot, or take {KNOWN['libero']}"
        )
