"""Find a checkpoint: a local folder, or one that is fetched from the Hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vla0.errors import InputError, said

UNWANTED = ["*.bin", "*.pt", "*.pth", "*.pkl"]  # pickles


def of_the_hub(name: str | Path) -> bool:
    """Return whether a name that is no local folder may be an owner/name on the Hub."""
    return str(name).count("/") == 1 and not str(name).startswith((".", "/", "~"))


def locate(path: str | Path, weights: bool = True, only: Sequence[str] | None = None) -> Path:
    """Return the local folder of a checkpoint, and fetch it from the Hub if necessary.

    Args:
        path: Checkpoint folder, or id of a model on the Hub.
        weights: Whether to fetch the weights too.
        only: Patterns of the files to fetch. None fetches all but pickles.

    Raises:
        InputError: When path is neither a folder nor a checkpoint that the Hub delivers.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    unwanted = [] if only else UNWANTED
    if not weights:
        unwanted = [*unwanted, "*.safetensors"]
    try:
        return Path(
            snapshot_download(
                str(path),
                allow_patterns=None if only is None else list(only),
                ignore_patterns=unwanted or None,
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = said(error) if of_the_hub(path) else "no such folder"
        raise InputError(
            "a checkpoint folder or Hub id",
            f"'{path}' ({reason})",
            "check the path or the connection",
        ) from None


# Licences that ask for no more than a notice.
FREE = ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "unlicense")


def restricted(name: str | Path) -> str | None:
    """Return the licence of a base model where it may restrict its use, by its model card.

    Args:
        name: Folder of the model, or its id on the Hub, as it has been fetched.

    Returns:
        The licence's name, or None where it is a free one, or where there is no card.
    """
    import yaml
    from huggingface_hub import ModelCard, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    file: Any = Path(name) / "README.md"
    if not file.is_file():
        try:
            file = try_to_load_from_cache(str(name), "README.md")
        except HFValidationError:
            return None
    if not isinstance(file, str | Path):
        return None
    try:
        data = ModelCard.load(file, ignore_metadata_errors=True).data
    except (OSError, ValueError, yaml.YAMLError):
        return None
    given = data.get("license")
    if given is None or str(given).lower() in FREE:
        return None
    return str(data.get("license_name") or given)
