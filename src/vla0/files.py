"""Files that are written completely or not at all, and folders that one process locks."""

import json
import os
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
    """Writes a file so that no reader ever sees a part of it."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(file)


@contextmanager
def set_aside(file: Path) -> Iterator[Path]:
    """Yields a temporary path to write to, and renames it to `file` once the writing has ended.

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


def settle(folder: Path) -> None:
    """Waits until a folder's content is on the disk.

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
    """Removes the temporary files that killed processes have left in a folder."""
    for file in folder.glob(f"{ASIDE}*"):
        file.unlink(missing_ok=True)


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """Reads a JSON object from a file.

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
    """Locks a folder for this process; the lock ends however the process ends.

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
