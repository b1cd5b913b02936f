"""Turn episodes.jsonl into tables of success by task, suite and policy, with 95 % intervals."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from vla0.errors import InputError
from vla0.sim.published import ABLATION, BESIDE

KINDS: dict[str, Any] = {  # the type of the value for each key of a line
    "policy": str,
    "task": str,
    "seed": int,
    "success": bool | None,
    "steps": int | None,
    "video": str | None,
    "error": str | None,
}


def read_episodes(file: Path) -> list[dict[str, Any]]:
    """Read the lines of episodes.jsonl.

    Returns:
        The error lines, and one line of a finished episode for each policy, task and seed. The list
        is empty when there is no file.

    Raises:
        InputError: When a line is damaged, or does not come from an evaluation.
    """
    lines_read, ended = [], set()
    for number, text in enumerate(
        file.read_text(encoding="utf-8").splitlines() if file.exists() else (), 1
    ):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or any(
            not isinstance(line.get(key), kind) for key, kind in KINDS.items()
        ):
            got = f"line {number}: {text[:80]!r}"
            raise InputError(
                f"an episode in each line of '{file}'",
                got,
                "remove that line: its episode is played again",
            )
        key = (line["policy"], line["task"], line["seed"])
        if line["error"] is None:
            if key in ended:  # two evaluators wrote here
                continue
            ended.add(key)
        lines_read.append(line)
    return lines_read


def mend(file: Path) -> None:
    """Cut off a last line that was half written when the process was killed."""
    if file.exists():
        content = file.read_bytes()
        complete = content.rfind(b"\n") + 1
        if complete != len(content):
            # Truncating happens in an instant. A kill while the file is rewritten would lose all
            # lines.
            os.truncate(file, complete)


Z = 1.959964  # standard deviations on either side of a mean in a 95 % interval


def wilson(successes: int, episodes: int) -> tuple[float, float]:
    """Return the 95 % interval of a success rate (Wilson 1927), or (0, 1) without episodes."""
    if episodes == 0:
        return 0.0, 1.0
    z, rate = Z, successes / episodes
    centre = rate + z * z / (2 * episodes)
    half = z * math.sqrt(rate * (1 - rate) / episodes + z * z / (4 * episodes * episodes))
    return max(0.0, (centre - half) / (1 + z * z / episodes)), min(
        1.0, (centre + half) / (1 + z * z / episodes)
    )


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Summarise the lines of episodes.jsonl.

    Returns:
        {policy: {task: {episodes, successes, errors, low, high, steps}}}, where low and high bound
        the 95 % interval, and steps is the median of the solved episodes or None.
    """
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for policy in sorted(
        {line["policy"] for line in lines}, key=lambda name: (name != "policy", name)
    ):
        for task in sorted({line["task"] for line in lines if line["policy"] == policy}):
            episodes_run = [
                line for line in lines if line["policy"] == policy and line["task"] == task
            ]
            ended = [line for line in episodes_run if line["error"] is None]
            solved = [line["steps"] for line in ended if line["success"]]
            low, high = wilson(len(solved), len(ended))
            table.setdefault(policy, {})[task] = {
                "episodes": len(ended),
                "successes": len(solved),
                "errors": len(episodes_run) - len(ended),
                "low": low,
                "high": high,
                "steps": float(np.median(solved)) if solved else None,
            }
    return table


def mean_success(rows: Mapping[str, Mapping[str, Any]]) -> float:
    """Return the mean over a policy's tasks of its success rates.

    It is nan when a task has no finished episode.
    """
    return float(
        np.mean(
            [
                row["successes"] / row["episodes"] if row["episodes"] else math.nan
                for row in rows.values()
            ]
        )
    )


def suites(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Sum a policy's tasks "suite/name" up by suite: {suite: {episodes, successes, low, high}}.

    The result is empty when no task has such a name.
    """
    by_suite: dict[str, dict[str, Any]] = {}
    for suite in sorted({task.partition("/")[0] for task in rows if "/" in task}):
        by_suite[suite] = together(
            row for task, row in rows.items() if task.startswith(f"{suite}/")
        )
    return by_suite


def together(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum rows of several tasks up: {episodes, successes, low, high}."""
    rows = list(rows)
    episodes, successes = (sum(row[key] for row in rows) for key in ("episodes", "successes"))
    low, high = wilson(successes, episodes)
    return {"episodes": episodes, "successes": successes, "low": low, "high": high}


def table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Return a rich table of the success per policy, task and suite.

    It has Wilson 95 % intervals, and the published success beside LIBERO's suites.
    """
    summarised = summary(lines)
    all_rows = [row for rows in summarised.values() for row in rows.values()]
    errors = any(row["errors"] for row in all_rows)
    published = any(suites(rows) for rows in summarised.values())
    columns = [
        "success",
        "95 %",
        "steps",
        *(["errors"] if errors else []),
        *(["VLA-0"] if published else []),
    ]
    result = Table(
        "policy", "task", *(Column(name, no_wrap=True) for name in columns), box=SIMPLE_HEAD
    )
    for policy, rows in summarised.items():
        for task, row in rows.items():
            steps = "" if row["steps"] is None else f"{row['steps']:.0f}"
            wrong = [str(row["errors"] or "")] if errors else []
            result.add_row(policy, _words(task), *cells(row), steps, *wrong)
        for suite, row in suites(rows).items():
            stated = BESIDE.get(suite, "") if policy == "policy" else ""
            result.add_row(
                policy, suite, *cells(row), "", *([""] if errors else []), stated, style="bold"
            )
        result.add_row(policy, "mean", f"{mean_success(rows):.1%}", end_section=True, style="bold")
    return result


def _words(task: str) -> str:
    """Return a task's name without its suite and as words, so that it can wrap between them."""
    return task.rpartition("/")[2].replace("_", " ")


def ablation_table(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """Return a rich table of the ablation from {row: lines}.

    It shows the success by suite with Wilson 95 % intervals, and the published means.
    """
    summarised = {row: summary(lines)["policy"] for row, lines in rows.items()}
    names = sorted({suite for suite_rows in summarised.values() for suite in suites(suite_rows)})
    result = Table("row", *names, "mean", "VLA-0, mean of four suites")
    for row, suite_rows in summarised.items():
        shown = [" ".join(cells(suites(suite_rows)[name])) for name in names]
        result.add_row(
            row,
            *shown,
            f"{mean_success(suite_rows):.1%}",
            f"{ABLATION[row]} %" if row in ABLATION else "",
        )
    return result


def cells(row: Mapping[str, Any]) -> tuple[str, str]:
    """Write the successes and the interval of a row."""
    return f"{row['successes']} of {row['episodes']}", f"{row['low']:.0%} to {row['high']:.0%}"
