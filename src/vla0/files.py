"""Files that are whole or not there, and folders that one process has to itself."""

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

ASIDE = ".partial-"


def write_whole(file: Path, content: str | bytes) -> None:
    """Writes a file that is never half there."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(file)


@contextmanager
def set_aside(file: Path) -> Iterator[Path]:
    """A name to write to, of this process alone; what is written there stands at `file` once all of
    it is.

    Ended before, by an error, it leaves nothing; by a kill, a file that `clear_aside` removes.
    """
    partial = file.with_name(f"{ASIDE}{os.getpid()}-{file.name}")
    try:
        yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def settle(folder: Path) -> None:
    """Waits until a folder is on the disk, so that a power cut cannot take what is about to be
    named as whole.
    """
    for place in [*folder.rglob("*"), folder]:
        if place.is_file() or place.is_dir():
            number = os.open(place, os.O_RDONLY)
            try:
                with suppress(OSError):  # of file systems that know no such thing of a folder
                    os.fsync(number)
            finally:
                os.close(number)


def clear_aside(folder: Path) -> None:
    """Removes what kills have left half-written in a folder."""
    for file in folder.glob(f"{ASIDE}*"):
        file.unlink(missing_ok=True)


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises InputError where it holds none: cut off, empty, or something else.
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
    """A folder for oneself; given back however the process ends.

    Raises InputError where another process has it.
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
        if {own.name for own in folder.iterdir()} <= {".lock", ".owner"}:  # nothing came of it
            shutil.rmtree(folder, ignore_errors=True)
        lock.release()
