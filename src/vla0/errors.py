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
        if got is None:  # one text: another machine's error, or a worker's, which torch hands on behind its traceback
            return expected.rpartition("InputError: ")[2].strip()
        return f"expected {expected}; got {got}; {remedy}"


def refuse_unknown(keys: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises InputError for the first key that is not known, naming the nearest known one."""
    known = list(known)
    for key in keys:
        if key not in known:
            raise InputError(f"a known key in {where}", f"unknown key '{key}'", nearest(key, known))


def nearest(word: str, known: Iterable[str]) -> str:
    """The remedy for a word that is not known: the nearest of those that are."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)
    return f"did you mean '{near[0]}'?" if near else "remove it"


def given(**settings: Any) -> dict[str, Any]:
    """The settings that are not None: for the others whoever is called has a default of his own."""
    return {name: value for name, value in settings.items() if value is not None}


def refuse_idle(settings: Mapping[str, Any], needed: str) -> None:
    """Raises InputError for the first setting that was given although it does nothing without what is needed."""
    for name, value in settings.items():
        if not (value is None or value is False or value == []):
            raise InputError(f"{needed} for {name}", f"{name} {value} without it", "leave it out: it would do nothing")
