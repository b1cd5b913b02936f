"""Runs as processes of their own, forked from one that has imported what they need."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from soak import moments

LONGEST_S = 120.0  # of one run; a second takes part of that


class Runs:
    """Processes forked from one that has imported what a run needs: a kill costs a second,
    not ten.
    """

    def __init__(self, folder: Path):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(moments.NEEDED)
        self.log, self.note, self.killed = folder / "run.log", folder / "note", []

    def start(self, function: Callable, *args: Any):
        """The process of function(*args, log)."""
        for file in (self.log, self.note):
            file.unlink(missing_ok=True)
        process = self.context.Process(target=function, args=(*args, self.log))
        process.start()
        return process

    def ended(self, process, seconds: float = LONGEST_S) -> int:
        """How a process ended: 0, or minus the signal that killed it.

        Raises RuntimeError with what it said last otherwise.
        """
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise RuntimeError(f"did not end within {seconds:.0f} s: {self.said()}")
        if process.exitcode < 0:
            self.killed.append(process.pid)
        if process.exitcode > 0 or "Traceback" in self.said():
            raise RuntimeError(f"ended with {process.exitcode}: {self.said()}")
        return process.exitcode

    def place(self) -> str:
        """Where the last run was when it ended."""
        return self.note.read_text().strip("\0 ") if self.note.exists() else ""

    def said(self) -> str:
        """The last words of the last run."""
        return self.log.read_text(errors="replace")[-1500:] if self.log.exists() else ""

    def left_alone(self, seconds: float = 15.0) -> None:
        """Raises RuntimeError where processes that a killed run had started live on; each run has a
        session of its own.
        """
        until = time.monotonic() + seconds
        while alive := [pid for pid, session in sessions() if session in self.killed]:
            if time.monotonic() > until:
                for pid in alive:
                    os.kill(pid, signal.SIGKILL)
                raise RuntimeError(
                    f"processes live on {seconds:.0f} s after the kill of what had started them: "
                    f"{alive}"
                )
            time.sleep(0.1)
        self.killed.clear()


def sessions() -> list[tuple[int, int]]:
    """(process, session) of all that live."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):
                state, *words = (folder / "stat").read_text().rpartition(")")[2].split()
                found += [(int(folder.name), int(words[2]))] if state not in "ZX" else []
    return found
