"""Errors for wrong input, which say what was expected, what came, and how to correct it."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class InputError(ValueError):
    """Raised for input that cannot be used.

    Args:
        expected: What was expected; or, without the others, the whole text of an error that came
            from another process or machine.
        got: What came instead.
        remedy: What the user can do.
    """

    def __init__(self, expected: str, got: str | None = None, remedy: str | None = None):
        super().__init__(expected, got, remedy)

    def __str__(self) -> str:
        expected, got, remedy = self.args
        # a single text is the error of another machine, or of a worker, which torch puts behind a
        # traceback
        if got is None:
            return expected.rpartition("InputError: ")[2].strip()
        return f"expected {expected}; got {got}; {remedy}"


NEAR = 0.4  # difflib's ratio from which a known word may be what was meant
RENAMED = {  # keys and names that earlier versions had
    "committed": "action_prefix",
    "control": "baseline",
    "exchanged": "swapped",
    "expected": "draft_actions",
    "horizon": "chunk_size",
    "inexact": "approximate",
    "most_change": "max_step_change",
    "quick": "options.quick",
    "recipe": "config",
    "relative": "relative_dims",
    "replan": "n_action_steps",
    "start": "options.start",
    "way": "mode",
}


def said(error: BaseException, most: int = 200) -> str:
    """Return an error's type and the first line of what it says, which may be nothing."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])[:most]


def refuse_unknown(
    keys: Iterable[str],
    known: Iterable[str],
    where: str,
    elsewhere: Mapping[str, str] | None = None,
) -> None:
    """Raise InputError for the first key that is not known, and name the nearest known key.

    Args:
        keys: The keys to check.
        known: The keys that are known.
        where: The place of the keys, for the error.
        elsewhere: Keys that are known in another place → their full names.

    Raises:
        InputError: A key is not known.
    """
    known = list(known)
    for key in keys:
        if key not in known:
            remedy = nearest(key, known, elsewhere, "remove it")
            raise InputError(f"a known key in {where}", f"unknown key '{key}'", remedy)


def nearest(
    word: str,
    known: Iterable[str],
    elsewhere: Mapping[str, str] | None = None,
    otherwise: str = "take one of those",
) -> str:
    """Return the remedy for an unknown word: its new name, or the nearest known word.

    Args:
        word: The unknown word.
        known: The words that are known.
        elsewhere: Words that are known in another place → their full names.
        otherwise: The remedy where no known word is near.

    Returns:
        The remedy, for an InputError.
    """
    known, places = list(known), elsewhere or {}
    known += [name for name in places if name not in known]
    if (now := RENAMED.get(word)) and now.partition(".")[0] in known:
        return f"it is called '{places.get(now, now)}' now"
    near = difflib.get_close_matches(word, known, n=1, cutoff=NEAR)
    return f"did you mean '{places.get(near[0], near[0])}'?" if near else otherwise


def given(**settings: Any) -> dict[str, Any]:
    """Return the settings that are not None; for the others the called function has a default."""
    return {name: value for name, value in settings.items() if value is not None}


def refuse_idle(settings: Mapping[str, Any], needed: str) -> None:
    """Raise InputError for the first setting that is given although it would do nothing.

    Args:
        settings: The settings. None, False and an empty list count as not given.
        needed: What they need to have an effect.

    Raises:
        InputError: A setting is given.
    """
    for name, value in settings.items():
        if not (value is None or value is False or value == []):
            raise InputError(
                f"{needed} for {name}",
                f"{name} {value} without it",
                "leave it out: it would do nothing",
            )
