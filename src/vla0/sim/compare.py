"""Put evaluations of several policies side by side, paired by task and seed."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.table import Table

from vla0.errors import InputError
from vla0.files import read_json
from vla0.sim.report import cell, page, wrapping
from vla0.sim.results import Z, cells, read_episodes, summary, together
from vla0.sim.simulator import SIMULATORS, options_of, simulator

POLICY = "policy"  # whose episodes are compared; the baselines beside it are not
# What must be the same: with another simulator, version, rate or limit it is another benchmark.
PROTOCOL = ("env", "max_steps", "fps", "options", "versions")
# What may differ, since it belongs to a policy, and is shown.
OF_A_POLICY = ("checkpoint", "n_action_steps", "ensemble", "ensemble_k", "image_size", "past")


@dataclass(frozen=True)
class Pair:
    """Two policies on the same episodes.

    Args:
        names: Of the two.
        both: Episodes that both solved.
        first: Episodes that only the first solved.
        second: Episodes that only the second solved.
        neither: Episodes that neither solved.
    """

    names: tuple[str, str]
    both: int
    first: int
    second: int
    neither: int

    @property
    def difference(self) -> tuple[float, float, float]:
        """The second's success less the first's, and the ends of its 95 % interval.

        By D. G. Bonett and R. M. Price, Statistics in Medicine 31 (2012), for paired proportions.
        """
        total = self.both + self.first + self.second + self.neither
        worse, better = (self.first + 1) / (total + 2), (self.second + 1) / (total + 2)
        half = Z * math.sqrt((worse + better - (better - worse) ** 2) / (total + 2))
        middle = better - worse
        plain = (self.second - self.first) / total
        return plain, max(-1.0, middle - half), min(1.0, middle + half)

    @property
    def chance(self) -> float:
        """The probability of a difference as large or larger by chance (McNemar, exact)."""
        apart = self.first + self.second
        tail = sum(math.comb(apart, k) for k in range(min(self.first, self.second) + 1))
        return min(1.0, 2 * tail / 2**apart)


@dataclass(frozen=True)
class Comparison:
    """Evaluations side by side.

    Args:
        rows: {name: {task: the summary of its episodes}}, of the episodes that all have.
        pairs: Of each two policies.
        settings: {name: {setting of the policy: its value}}.
        left_out: Episodes that not all of them have.
    """

    rows: dict[str, dict[str, dict[str, Any]]]
    pairs: list[Pair]
    settings: dict[str, dict[str, Any]]
    left_out: int


def compare(folders: Sequence[Path]) -> Comparison:
    """Compare what the policies of several evaluations did on the same tasks and seeds.

    Args:
        folders: Folders that `vla0 eval` wrote, two or more.

    Raises:
        InputError: When there are fewer than two, one is no evaluation, they were made by different
            protocols, or have no episode in common.
    """
    names = _names(folders)
    settings = {name: _settings(folder) for name, folder in zip(names, folders, strict=True)}
    episodes = {
        name: {
            (line["task"], line["seed"]): line
            for line in read_episodes(folder / "episodes.jsonl")
            if line["policy"] == POLICY and line["error"] is None
        }
        for name, folder in zip(names, folders, strict=True)
    }
    common = set.intersection(*(set(own) for own in episodes.values()))
    tasks = sorted({task for task, _ in common})
    first = names[0]
    for name in names[1:]:
        for key in PROTOCOL:
            given, expected = (_protocol(settings[which], key, tasks) for which in (name, first))
            if given != expected:
                raise InputError(
                    f"evaluations by one protocol: {key} {expected} in '{first}'",
                    f"{given} in '{name}'",
                    "evaluate again with the same options and versions",
                )
    if not common:
        raise InputError(
            "episodes of the same tasks and seeds", "none in common", "evaluate the same tasks"
        )
    pairs = []
    for one, other in combinations(names, 2):
        outcomes = [
            (episodes[one][key]["success"], episodes[other][key]["success"]) for key in common
        ]
        both, first_alone, second_alone = (
            outcomes.count(kind) for kind in ((True, True), (True, False), (False, True))
        )
        neither = len(outcomes) - both - first_alone - second_alone
        pairs.append(Pair((one, other), both, first_alone, second_alone, neither))
    return Comparison(
        {
            name: summary([own[key] for key in sorted(common)])[POLICY]
            for name, own in episodes.items()
        },
        pairs,
        {name: {key: settings[name].get(key) for key in OF_A_POLICY} for name in names},
        len(set.union(*(set(own) for own in episodes.values())) - common),
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """Return a name for each folder: its own, or its path where two have the same."""
    places = [folder.resolve() for folder in folders]
    if len(set(places)) < len(places) or len(places) < 2:
        raise InputError("two or more folders", f"{[str(f) for f in folders]}", "name each once")
    names = [place.name for place in places]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _settings(folder: Path) -> dict[str, Any]:
    """Return the settings of an evaluation."""
    file = folder / "evaluation.json"
    if not file.is_file():
        raise InputError("a folder of `vla0 eval`", f"no '{file}'", "name one that it wrote")
    return read_json(file, "evaluate into another folder")


def _protocol(settings: dict[str, Any], key: str, tasks: Sequence[str]) -> Any:
    """Return a setting of the protocol, alike where it means the same for some tasks."""
    value, env = settings.get(key), settings.get("env")
    if env not in SIMULATORS:
        return value
    if key == "fps":  # where a simulator has one rate, the policy's changes nothing
        return value if simulator(env).any_fps else None
    if key == "max_steps":
        return sorted({value or simulator(env).step_limit(task) for task in tasks})
    return asdict(options_of(env, value or {})) if key == "options" else value


def _said(pair: Pair) -> tuple[str, ...]:
    """Return what is said of a pair, column by column."""
    middle, low, high = pair.difference
    return (
        f"{pair.names[1]} against {pair.names[0]}",
        f"{middle:+.1%}",
        f"{low:+.0%} to {high:+.0%}",
        f"{pair.second} and {pair.first}",
        f"{pair.chance:.3f}" if pair.chance >= 0.001 else "< 0.001",
    )


HEADS = ("", "difference", "95 %", "solved by one alone", "p (McNemar, exact)")


def tables(comparison: Comparison) -> tuple[Table, Table]:
    """Return a table of the tasks and one of the pairs, for the screen."""
    names = list(comparison.rows)
    first = Table("task", *names, box=None, pad_edge=False)
    tasks = list(comparison.rows[names[0]])
    for task in [*tasks, None]:
        rows = [
            together(comparison.rows[name].values())
            if task is None
            else comparison.rows[name][task]
            for name in names
        ]
        first.add_row(
            "all" if task is None else task,
            *(", ".join(cells(row)) for row in rows),
            style="bold" if task is None else None,
        )
    second = Table(*HEADS, box=None, pad_edge=False)
    for pair in comparison.pairs:
        second.add_row(*_said(pair))
    return first, second


def write_page(comparison: Comparison, file: Path) -> None:
    """Write a comparison as one HTML file that loads nothing."""
    names = list(comparison.rows)
    heads = "".join(f"<th>{escape(name)}" for name in names)
    rows = [
        f"<tr><td>{wrapping(task)}"
        + "".join(f"<td>{cell(comparison.rows[name][task])}" for name in names)
        for task in comparison.rows[names[0]]
    ]
    rows.append(
        "<tr><td><strong>all</strong>"
        + "".join(f"<td>{cell(together(comparison.rows[name].values()))}" for name in names)
    )
    pairs = "".join(
        "<tr>" + "".join(f"<td>{escape(text)}" for text in _said(pair)) for pair in comparison.pairs
    )
    settings = "".join(
        f"<tr><td>{key}" + "".join(f"<td>{escape(str(comparison.settings[n][key]))}" for n in names)
        for key in OF_A_POLICY
    )
    left_out = (
        f"<p class=no>{comparison.left_out} episodes are left out: not all have them.</p>"
        if comparison.left_out
        else ""
    )
    page(
        file,
        "vla0 comparison",
        [
            "<h1>Policies on the same episodes</h1>",
            left_out,
            f"<div class=wide><table><tr><th>task{heads}{''.join(rows)}</table></div>",
            "<h2>In pairs</h2><div class=wide><table><tr>"
            + "".join(f"<th>{head}" for head in HEADS)
            + f"{pairs}</table></div>",
            "<p><small>The same task and seed is one pair. The interval is of Bonett and Price "
            "(2012). p is the probability of a difference as large by chance.</small></p>",
            f"<h2>Settings</h2><div class=wide><table><tr><th>{heads}{settings}</table></div>",
        ],
    )
