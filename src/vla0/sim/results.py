"""episodes.jsonl → the table: success by task, by suite and by policy, with 95 % intervals."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from vla0.errors import InputError

# Success in percent, VLA-0, arXiv 2510.13054; the mean over the four is 94.7.
PUBLISHED = {"libero_spatial": 97.0, "libero_object": 97.8, "libero_goal": 96.2, "libero_10": 87.6}
# Its ablation, means over the four suites.
PUBLISHED_ROWS = {"ensembling mean": 94.7, "no ensembling": 92.0, "separate images": 94.5}

KINDS: dict[str, Any] = {  # key of a line → what its value may be
    "policy": str,
    "task": str,
    "seed": int,
    "success": bool | None,
    "steps": int | None,
    "video": str | None,
    "error": str | None,
}


def read_episodes(file: Path) -> list[dict[str, Any]]:
    """The lines of episodes.jsonl, of each policy, task and seed one that ended; none where there
    is no file.

    Raises InputError for a line that is damaged, or is none of an evaluation.
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
            if key in ended:  # of two evaluators that wrote here
                continue
            ended.add(key)
        lines_read.append(line)
    return lines_read


def mend(file: Path) -> None:
    """Cuts a last line that a kill left half-written."""
    if file.exists():
        content = file.read_bytes()
        complete = content.rfind(b"\n") + 1
        if complete != len(content):
            # in one instant: written anew, all lines would be lost to a kill in the middle
            os.truncate(file, complete)


def wilson(successes: int, episodes: int) -> tuple[float, float]:
    """The 95 % interval of a success rate (Wilson 1927); (0, 1) of no episodes."""
    if episodes == 0:
        return 0.0, 1.0
    z, rate = 1.959964, successes / episodes
    centre = rate + z * z / (2 * episodes)
    half = z * math.sqrt(rate * (1 - rate) / episodes + z * z / (4 * episodes * episodes))
    return max(0.0, (centre - half) / (1 + z * z / episodes)), min(
        1.0, (centre + half) / (1 + z * z / episodes)
    )


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{policy: {task: {episodes, successes, errors, low, high, steps}}} of episodes.jsonl; steps:
    median of the solved.
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
    """The mean over tasks of a policy's success rates; nan where a task has no finished episode."""
    return float(
        np.mean(
            [
                row["successes"] / row["episodes"] if row["episodes"] else math.nan
                for row in rows.values()
            ]
        )
    )


def suites(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{suite: {episodes, successes, low, high}} over the tasks "suite/name" of a policy; empty
    where none is so named.
    """
    by_suite: dict[str, dict[str, Any]] = {}
    for suite in sorted({task.partition("/")[0] for task in rows if "/" in task}):
        suite_rows = [row for task, row in rows.items() if task.startswith(f"{suite}/")]
        episodes, successes = (
            sum(row[key] for row in suite_rows) for key in ("episodes", "successes")
        )
        low, high = wilson(successes, episodes)
        by_suite[suite] = {"episodes": episodes, "successes": successes, "low": low, "high": high}
    return by_suite


def table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """A rich table of episodes.jsonl: success per policy, task and suite with Wilson 95 %
    intervals, and what was published.
    """
    summarised = summary(lines)
    every = [row for rows in summarised.values() for row in rows.values()]
    errors, published = (
        any(row["errors"] for row in every),
        any(suites(rows) for rows in summarised.values()),
    )
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
            steps, wrong = (
                "" if row["steps"] is None else f"{row['steps']:.0f}",
                [str(row["errors"] or "")] if errors else [],
            )
            result.add_row(policy, _words(task), *_cells(row), steps, *wrong)
        for suite, row in suites(rows).items():
            stated = f"{PUBLISHED[suite]} %" if suite in PUBLISHED and policy == "policy" else ""
            result.add_row(
                policy, suite, *_cells(row), "", *([""] if errors else []), stated, style="bold"
            )
        result.add_row(policy, "mean", f"{mean_success(rows):.1%}", end_section=True, style="bold")
    return result


def _words(task: str) -> str:
    """A task's name, of LIBERO's the instruction: it wraps between words."""
    return task.rpartition("/")[2].replace("_", " ")


def ablation_table(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """A rich table of {row: lines}: success by suite with Wilson 95 % intervals, and what was
    published.
    """
    summarised = {row: summary(lines)["policy"] for row, lines in rows.items()}
    names = sorted({suite for suite_rows in summarised.values() for suite in suites(suite_rows)})
    result = Table("row", *names, "mean", "VLA-0, mean of four suites")
    for row, suite_rows in summarised.items():
        cells = [" ".join(_cells(suites(suite_rows)[name])) for name in names]
        result.add_row(
            row,
            *cells,
            f"{mean_success(suite_rows):.1%}",
            f"{PUBLISHED_ROWS[row]} %" if row in PUBLISHED_ROWS else "",
        )
    return result


def _cells(row: Mapping[str, Any]) -> tuple[str, str]:
    return f"{row['successes']} of {row['episodes']}", f"{row['low']:.0%} to {row['high']:.0%}"
