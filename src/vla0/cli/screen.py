"""The command's frame: what its subcommands share."""

import importlib.util

import typer
from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A vision-language model as a robot policy: it writes actions as text",
)
console = Console()


def quiet() -> None:
    """No progress bars of other libraries for what takes a moment; the Trainer's own stays."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if importlib.util.find_spec("datasets"):
        from datasets.utils.logging import disable_progress_bar

        disable_progress_bar()
