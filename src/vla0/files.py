"""Write files and folders completely or not at all, and lock folders for one process."""

import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vla0.errors import InputError

ASIDE = ".partial-"  # prefix of files that are still being written


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file so that no reader ever sees a part of it."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(file)


@contextmanager
def set_aside(file: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `file` once the writing has ended.

    After an error nothing is left. After a kill a temporary file is left, which `clear_aside`
    removes.

    Args:
        file: Where the file will be.

    Yields:
        The path to write to, which no other process uses.
    """
    partial = file.with_name(f"{ASIDE}{os.getpid()}-{file.name}")
    try:
        yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path, marker: str | None = None) -> Iterator[Path]:
    """Yield a temporary path for a folder, and rename it to `folder` once the writing has ended.

    After an error nothing is left. After a kill a hidden folder is left, which `unfinished` finds.

    Args:
        folder: Where the folder will be.
        marker: A folder that holds this file is replaced. Others, except empty ones, are not.

    Yields:
        The path of the folder to make, which no other process uses.

    Raises:
        InputError: When other files are in the folder's place, before and after the writing.
    """

    def refuse_others() -> None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            if marker is None:
                got = f"'{folder}', which exists"
                raise InputError("a new folder", got, "name another, or remove it")
            if not (folder / marker).is_file():
                expected = f"a new folder, or one with {marker}"
                got = f"'{folder}' with other files"
                raise InputError(expected, got, "name another folder")

    refuse_others()
    partial, old = (
        folder.with_name(f".{folder.name}.{kind}-{os.getpid()}") for kind in ("partial", "old")
    )
    partial.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        refuse_others()
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)


def unfinished(parent: Path, name: str) -> list[Path]:
    """Return what killed processes have left beside folders whose name matches a pattern.

    Args:
        parent: Where the folders are.
        name: A regular expression for their names.
    """
    left = re.compile(rf"\.(?:{name})\.(?:partial|old)(?:-\d+)?")
    return [folder for folder in parent.iterdir() if left.fullmatch(folder.name)]


def settle(folder: Path) -> None:
    """Wait until a folder's content is on the disk.

    After that, a power cut cannot damage what is about to be marked as complete.
    """
    for place in [*folder.rglob("*"), folder]:
        if place.is_file() or place.is_dir():
            number = os.open(place, os.O_RDONLY)
            try:
                with suppress(OSError):  # some file systems cannot sync a folder
                    os.fsync(number)
            finally:
                os.close(number)


def clear_aside(folder: Path) -> None:
    """Remove the temporary files that killed processes have left in a folder."""
    for file in folder.glob(f"{ASIDE}*"):
        file.unlink(missing_ok=True)


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        file: The file.
        remedy: What the user can do if it holds no JSON object.

    Returns:
        The object.

    Raises:
        InputError: The file is missing, empty or cut off, or it holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"JSON in '{file}'", f"{type(error).__name__}: {error}", remedy) from None
    if not isinstance(content, dict):
        raise InputError(f"a JSON object in '{file}'", type(content).__name__, remedy)
    return content


@contextmanager
def held(folder: Path, job: str) -> Iterator[None]:
    """Lock a folder for this process; the lock ends however the process ends.

    The folder is made if need be, and removed if nothing was written to it.

    Args:
        folder: The folder.
        job: What the process does there, for the error that another process gets.

    Raises:
        InputError: Another process has locked the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder / ".lock"), folder / ".owner"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = owner.read_text(encoding="utf-8") if owner.is_file() else "another process"
        raise InputError(
            f"'{folder}' for this {job} alone",
            who,
            "wait until that has ended, or choose another folder",
        ) from None
    try:
        write_whole(owner, f"process {os.getpid()} on {socket.gethostname()}, a {job}")
        yield
    finally:
        if {entry.name for entry in folder.iterdir()} <= {".lock", ".owner"}:  # nothing was written
            shutil.rmtree(folder, ignore_errors=True)
        lock.release()
