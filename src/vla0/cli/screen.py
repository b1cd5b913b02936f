"""The command's frame: what its subcommands share."""

import typer
from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A vision-language model as a robot policy: it writes actions as text",
)
console = Console()
