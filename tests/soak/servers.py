"""The command `vla0 serve` in a process of its own, with a policy of random weights."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from conftest import TASKS, make_spec

from vla0 import VLA0
from vla0.checkpoint.tiny import tiny_model, tiny_processor


@dataclass
class Served:
    """A server. address: "127.0.0.1:PORT"."""

    address: str
    process: subprocess.Popen
    log: Path

    def megabytes(self) -> float:
        """That it holds."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE") / 2**20

    def ended(self) -> bool:
        """Whether it is no more."""
        return self.process.poll() is not None

    def said(self) -> str:
        """The end of its log."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-2000:]


def checkpoint(folder: Path) -> Path:
    """A folder of a policy of two cameras, three dimensions and a state."""
    if not (folder / "vla0.json").exists():
        processor = tiny_processor(["State: ", "Write integers.", *TASKS])
        small = {
            "width": 48,
            "layers": 2,
            "heads": 3,
            "vision_width": 32,
            "vision_layers": 1,
            "vision_heads": 2,
        }
        VLA0(
            tiny_model(processor, **small), processor, make_spec(state_names=("a", "b"))
        ).save_pretrained(folder)
    return folder


@contextmanager
def served(folder: Path, *words: str) -> Iterator[Served]:
    """A server of `checkpoint(folder)`, until the end of the block; the words are those of `vla0
    serve`.
    """
    log = folder / f"server-{os.getpid()}-{len(list(folder.glob('server-*')))}.log"
    command = [
        sys.executable,
        "-m",
        "vla0",
        "serve",
        "--checkpoint",
        str(checkpoint(folder / "checkpoint")),
    ]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--port", "0", *words], stdout=subprocess.PIPE, stderr=file, text=True
        )
        try:
            assert process.stdout is not None
            yield Served(_address(process.stdout, log), process, log)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _address(lines: IO[str], log: Path) -> str:
    for line in lines:
        if found := re.search(r"127\.0\.0\.1:\d+", line):
            return found[0]
    raise RuntimeError(f"no server: {log.read_text()[-2000:]}")
