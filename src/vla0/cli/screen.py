"""The application and the console that all subcommands share."""

from collections.abc import Sequence
from typing import Any

import typer
from omegaconf import OmegaConf
from rich.console import Console

from vla0.errors import InputError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A vision-language model as a robot policy: it writes actions as text",
)
console = Console()


def say(text: str) -> None:
    """Print a line as it is: a path is not broken where the screen ends, nor read as markup."""
    console.print(text, markup=False, soft_wrap=True)


def options_given(words: Sequence[str] | None) -> dict[str, Any]:
    """Parse the KEY=VALUE words of `--option` into {key: value}, with values as in YAML.

    Raises:
        InputError: When a word is not of this form.
    """
    if wrong := [word for word in words or () if not word.partition("=")[0] or "=" not in word]:
        raise InputError("--option KEY=VALUE", f"'{wrong[0]}'", "e.g. --option quick=true")
    return OmegaConf.to_container(OmegaConf.from_dotlist(list(words or ())))  # type: ignore[return-value]


def pairs_of(option: str, words: list[str]) -> dict[str, str]:
    """Parse CAMERA=NAME words into {camera: name}.

    Raises:
        InputError: When a word is not of this form, or a camera or a name appears twice.
    """
    pairs = {camera: name for camera, _, name in (word.partition("=") for word in words)}
    unambiguous = len(pairs) == len(set(pairs.values())) == len(words)
    if not unambiguous or not all(camera and name for camera, name in pairs.items()):
        raise InputError(f"{option} CAMERA=NAME, each once", f"{words}", "give both of each")
    return pairs
