"""One command, `vla0`, and its subcommands. What they need is imported when they run, so that `--help` is quick."""

import logging
import os
import sys

from rich.console import Console
from rich.logging import RichHandler

from vla0.cli import act, prepare, run
from vla0.cli.bench import app as bench_app
from vla0.cli.screen import app
from vla0.errors import InputError
from vla0.quiet import hush

__all__ = ["act", "main", "prepare", "run"]

app.add_typer(bench_app, name="bench")


@bench_app.callback()
def bench() -> None:
    """Measure on this machine."""


def main() -> None:
    """The entry point: bad input is one line and exit code 2. VLA0_DEBUG=1 shows where it came from."""
    debug = bool(os.environ.get("VLA0_DEBUG"))
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(message)s", handlers=[handler])
    hush()
    logging.getLogger("vla0").setLevel(logging.DEBUG if debug else logging.INFO)
    try:
        app()
    except InputError as error:
        if debug:
            raise
        print(f"vla0: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("vla0: interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)
