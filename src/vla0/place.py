"""Where a checkpoint lies: a folder here, or one that is fetched from the Hub."""

from pathlib import Path

from vla0.errors import InputError

UNWANTED = ["*.bin", "*.pt", "*.pth", "*.pkl"]  # pickles


def locate(path: str | Path, weights: bool = True) -> Path:
    """The local folder of a checkpoint: the path itself where it is one, else that of a Hub id, with or without weights."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), ignore_patterns=UNWANTED if weights else [*UNWANTED, "*.safetensors"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        local = str(path).startswith(("/", ".", "~")) or str(path).count("/") != 1
        reason = "no such folder" if local else str(error).strip().splitlines()[0]
        raise InputError("a checkpoint folder or Hub id", f"'{path}' ({reason})", "check the path or the connection") from None
