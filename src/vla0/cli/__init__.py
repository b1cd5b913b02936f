"""The command `vla0` and its subcommands.

The subcommands import what they need when they run, so that `--help` is quick.
"""

import logging
import os
import sys

from rich.console import Console
from rich.logging import RichHandler

from vla0.cli import act, prepare, run
from vla0.cli.bench import app as bench_app
from vla0.cli.screen import app
from vla0.errors import RENAMED, InputError
from vla0.quiet import hush

__all__ = ["act", "main", "prepare", "run"]

app.add_typer(bench_app, name="bench")


@bench_app.callback()
def bench() -> None:
    """Measure on this machine."""


OLD_COMMANDS = {
    "bench train": "python benchmarks/training.py",
    "bench data": "python benchmarks/reading.py",
    "download libero-assets": "pip install 'vla0[libero]'",
}
OLD_FLAGS = {
    "--start": "--option start=...",
    "--quick": "--option quick=true",
    "--assets": "pip install 'vla0[libero]'",
}


def refuse_old_names(words: list[str]) -> None:
    """Raise InputError for a flag or a command of an earlier version, and name today's."""
    if (now := OLD_COMMANDS.get(command := " ".join(words[:2]))) is not None:
        raise InputError("a command of today", f"'vla0 {command}'", f"it is `{now}` now")
    for word in words:
        flag = word.partition("=")[0]
        name = flag.removeprefix("--").replace("-", "_")
        # `vla0 bench` still has its --way.
        current = name == "way" and words[:1] == ["bench"]
        if flag in OLD_FLAGS:
            raise InputError("a flag of today", f"'{flag}'", f"it is `{OLD_FLAGS[flag]}` now")
        if flag.startswith("--") and name in RENAMED and not current:
            raise InputError(
                "a flag of today",
                f"'{flag}'",
                f"it is called '--{RENAMED[name].replace('_', '-')}' now",
            )


def main() -> None:
    """Run the command, and end with one line and exit code 2 for bad input.

    With VLA0_DEBUG=1 the traceback is shown instead.
    """
    debug = bool(os.environ.get("VLA0_DEBUG"))
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING, format="%(message)s", handlers=[handler]
    )
    hush()
    logging.getLogger("vla0").setLevel(logging.DEBUG if debug else logging.INFO)
    try:
        refuse_old_names(sys.argv[1:])
        app()
    except (KeyboardInterrupt, ImportError, InputError) as error:
        if _interrupted(error):
            print("vla0: interrupted; the same command goes on where it stopped", file=sys.stderr)
            sys.exit(130)
        if debug or not isinstance(error, InputError):
            raise
        print(f"vla0: {error}", file=sys.stderr)
        sys.exit(2)


def _interrupted(error: BaseException | None) -> bool:
    """Return whether an error is an interrupt, or came of one.

    An interrupt while a compiled module is loaded becomes an ImportError, and that may become the
    InputError of a package that is missing.
    """
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
