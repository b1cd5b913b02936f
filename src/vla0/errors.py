"""Errors that teach: what was expected, what came, how to mend it."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class InputError(ValueError):
    """Input that cannot be used: says what was expected, what came, and how to mend it."""

    def __init__(self, expected: str, got: str | None = None, remedy: str | None = None):
        super().__init__(expected, got, remedy)

    def __str__(self) -> str:
        expected, got, remedy = self.args
        # one text: another machine's error, or a worker's, which torch hands on behind its
        # traceback
        if got is None:
            return expected.rpartition("InputError: ")[2].strip()
        return f"expected {expected}; got {got}; {remedy}"


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


def refuse_unknown(
    keys: Iterable[str],
    known: Iterable[str],
    where: str,
    elsewhere: Mapping[str, str] | None = None,
) -> None:
    """Raises InputError for the first key that is not known, naming the nearest known one.

    elsewhere: keys that are known in another place → their full names.
    """
    known = list(known)
    for key in keys:
        if key not in known:
            raise InputError(
                f"a known key in {where}", f"unknown key '{key}'", nearest(key, known, elsewhere)
            )


def nearest(word: str, known: Iterable[str], elsewhere: Mapping[str, str] | None = None) -> str:
    """The remedy for a word that is not known: what it is called now, or the nearest of those that
    are.
    """
    known, places = list(known), elsewhere or {}
    known += [name for name in places if name not in known]
    if (now := RENAMED.get(word)) and now.partition(".")[0] in known:
        return f"it is called '{places.get(now, now)}' now"
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.0)
    return f"did you mean '{places.get(near[0], near[0])}'?" if near else "remove it"


def given(**settings: Any) -> dict[str, Any]:
    """The settings that are not None: for the others whoever is called has a default of his own."""
    return {name: value for name, value in settings.items() if value is not None}


def refuse_idle(settings: Mapping[str, Any], needed: str) -> None:
    """Raises InputError for the first setting that was given although it does nothing without what
    is needed.
    """
    for name, value in settings.items():
        if not (value is None or value is False or value == []):
            raise InputError(
                f"{needed} for {name}",
                f"{name} {value} without it",
                "leave it out: it would do nothing",
            )
