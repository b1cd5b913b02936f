"""Turn episodes.jsonl into report.html.

The page shows the success per task, videos, and the predicted and executed actions.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from vla0.errors import InputError, nearest
from vla0.sim.published import BESIDE
from vla0.sim.results import mean_success, read_episodes, suites, summary, wilson

BASELINES = {  # the policies to compare with, and what the page says about each
    "blank": "the policy was given black pictures; the videos show what was there",
    "swapped": "the policy was given the next task's instruction",
    "random": "uniform actions between the bounds",
    "untrained": "the same architecture before training",
}


def refuse_unknown_baselines(names: Sequence[str]) -> None:
    """Raise InputError for an unknown baseline."""
    if wrong := [name for name in names if name not in BASELINES]:
        raise InputError(
            f"a baseline of {tuple(BASELINES)}", f"'{wrong[0]}'", nearest(wrong[0], BASELINES)
        )


SHOWN = 6  # the page shows so many episodes of each policy and task; the others stay in videos/
STUCK = 20  # the page says so when a failure ends with the same action so many times

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:76rem;padding:0 1rem;color:#1c2330;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid #d9dee7}.says{font-size:1.15rem}
table{border-collapse:collapse}.wide{overflow-x:auto}td,th{padding:.25rem .9rem .25rem 0;text-align:left;vertical-align:top}
th,small{color:#5b6472;font-weight:500}td small{display:block}
.bar{position:relative;width:7rem;height:.5rem;background:#eef1f6;border-radius:3px;margin:.2rem 0}
.bar i{position:absolute;left:0;top:0;bottom:0;background:#3b6fd4;border-radius:3px}
.bar b{position:absolute;top:.2rem;height:.1rem;background:#1c2330}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%),1fr));gap:1.4rem 1rem}
figure{margin:0}video{width:100%;border-radius:4px;background:#000;display:block}
figcaption{font-size:.82rem;color:#5b6472}.ok{color:#12784a}.no{color:#b3261e}
svg{width:100%;height:auto;margin-top:.3rem}details{margin:.6rem 0}
@media(prefers-color-scheme:dark){body{color:#dde3ee;background:#12161d}.bar{background:#252c38}.bar b{background:#dde3ee}}
"""  # noqa: E501


def write_report(
    out: str | Path, title: str = "vla0 evaluation", names: Sequence[str] | None = None
) -> Path:
    """Write `out`/report.html from `out`/episodes.jsonl, as one file that loads nothing.

    Args:
        out: Folder of the results.
        title: Title of the page.
        names: Names of the action's dimensions, where they are known.

    Returns:
        The file that was written.

    Raises:
        InputError: When there are no episodes, or their files were not made by vla0.
    """
    out = Path(out)
    lines = read_episodes(out / "episodes.jsonl")
    if not lines:
        raise InputError(f"episodes in '{out}'", "none", "run `vla0 eval` first")
    summarised = summary(lines)
    lines_of = {
        (policy, task): [
            line for line in lines if line["policy"] == policy and line["task"] == task
        ]
        for policy, tasks in summarised.items()
        for task in tasks
    }
    shown = {section: _shown(out, its_lines) for section, its_lines in lines_of.items()}
    scale = _scale([drawn for figures in shown.values() for _, drawn in figures])
    parts = [
        f"<h1>{escape(title)}</h1><p class=says>{_headline(summarised)}</p>",
        _table(summarised),
        _settings(out / "evaluation.json"),
    ]
    parts += [
        _section(out, *section, lines_of[section], shown[section], scale, names)
        for section in lines_of
    ]
    file = out / "report.html"
    page(file, title, parts)
    return file


def page(file: Path, title: str, parts: Sequence[str]) -> None:
    """Write parts of HTML as one file that loads nothing."""
    file.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport "
        f"content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style><body>{''.join(parts)}</body></html>",
        encoding="utf-8",
    )


Rows = Mapping[str, Mapping[str, Any]]  # the summary of each task
# What is drawn of an episode: actions (T, D), queries (Q,), chunks (Q, H, D)
Drawn = tuple[np.ndarray, np.ndarray, np.ndarray]
Scale = tuple[np.ndarray, np.ndarray]  # (D,) low and high


def _headline(summarised: Mapping[str, Rows]) -> str:
    """Return the result of the first policy in one sentence."""
    policy, tasks = next(iter(summarised.items()))
    solved, ended = (sum(row[key] for row in tasks.values()) for key in ("successes", "episodes"))
    if not ended:
        return f"No episode of {escape(policy)} came to its end."
    low, high = wilson(solved, ended)
    who = "The policy" if policy == "policy" else escape(policy)
    over = f"{len(tasks)} tasks" if len(tasks) > 1 else "one task"
    success = f"{solved / ended:.1%} success, 95 % interval {low:.0%} to {high:.0%}"
    return f"{who} solved {solved} of {ended} episodes over {over}: {success}."


def _table(summarised: Mapping[str, Rows]) -> str:
    """Return a table with a row per task and suite and for the mean, and a column per policy.

    Where results of these suites were published, they have a column too.
    """
    grouped = {policy: suites(tasks) for policy, tasks in summarised.items()}
    all_tasks = sorted({task for tasks in summarised.values() for task in tasks})
    published = any(suite in BESIDE for suite in grouped.get("policy", {}))
    rows = [
        f"<tr><td>{wrapping(task)}{_cells([tasks.get(task) for tasks in summarised.values()])}"
        for task in all_tasks
    ]
    for suite in sorted({suite for rows_of in grouped.values() for suite in rows_of}):
        stated = f"<td>{BESIDE[suite]}" if published and suite in BESIDE else ""
        cells = _cells([rows_of.get(suite) for rows_of in grouped.values()])
        rows.append(f"<tr><td><strong>{wrapping(suite)}</strong>{cells}{stated}")
    means = "".join(
        f"<td>{'' if math.isnan(mean := mean_success(tasks)) else f'<strong>{mean:.1%}</strong>'}"
        for tasks in summarised.values()
    )
    rows.append(f"<tr><td><strong>mean</strong>{means}")
    head = "".join(f"<th>{escape(policy)}" for policy in summarised) + (
        "<th>published" if published else ""
    )
    explained = "".join(
        f"<br>{name}: {BASELINES[name]}" for name in summarised if name in BASELINES
    )
    note = (
        f"Episodes that were solved, 95 % intervals, and the median of the steps that the "
        f"solved ones took.{explained}"
    )
    table = f"<table><tr><th>task{head}{''.join(rows)}</table>"
    return f"<div class=wide>{table}</div><p><small>{note}</small></p>"


def _cells(rows: Sequence[Mapping[str, Any] | None]) -> str:
    """Return the cells of a row of the table."""
    return "".join(f"<td>{'' if row is None else cell(row)}" for row in rows)


def cell(row: Mapping[str, Any]) -> str:
    """Return what a cell says: successes, a bar, the interval, steps and errors."""
    rate, low, high = row["successes"] / max(row["episodes"], 1), row["low"], row["high"]
    steps = f", {row['steps']:.0f} steps" if row.get("steps") is not None else ""
    errors = (
        f"<small class=no>{row['errors']} error{'s' * (row['errors'] > 1)}</small>"
        if row.get("errors")
        else ""
    )
    return (
        f"{row['successes']} of {row['episodes']}<div class=bar><i style='width:{rate:.1%}'></i>"
        f"<b style='left:{low:.1%};width:{high - low:.1%}'></b></div><small>{low:.0%} to "
        f"{high:.0%}{steps}</small>{errors}"
    )


def wrapping(name: str) -> str:
    """Escape a name and let it wrap at underscores and slashes."""
    return escape(name).replace("_", "_<wbr>").replace("/", "/<wbr>")


def _settings(file: Path) -> str:
    """Show what the results depend on."""
    if not file.is_file():
        return ""
    text = escape(file.read_text(encoding="utf-8"))
    return f"<details><summary>settings and versions</summary><pre>{text}</pre></details>"


def _shown(out: Path, lines: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Drawn]]:
    """Return the episodes of a policy and a task that the page shows, failures first.

    Each comes with what is drawn of it.
    """
    ended = sorted(
        (line for line in lines if line["error"] is None),
        key=lambda line: (line["success"], line["seed"]),
    )
    with_actions = []
    for line in ended[:SHOWN]:
        with np.load(_inside(out, line["video"]).with_suffix(".npz")) as arrays:
            with_actions.append((line, (arrays["actions"], arrays["queries"], arrays["chunks"])))
    return with_actions


def _inside(out: Path, video: str) -> Path:
    """Return the file of a video.

    InputError is raised when it is not an mp4 in the videos folder of the results.
    """
    file = (out / video).resolve()
    if not file.is_relative_to((out / "videos").resolve()) or file.suffix != ".mp4":
        raise InputError(
            f"videos in '{out / 'videos'}'",
            f"'{video}'",
            "these results were not made by vla0: do not show them",
        )
    return file


def _scale(drawn: Sequence[Drawn]) -> Scale:
    """Return each dimension's lowest and highest value over all episodes of the page."""
    series = [
        values.reshape(-1, values.shape[-1])
        for actions, _, chunks in drawn
        for values in (actions, chunks)
    ]
    values = np.concatenate(series) if series else np.zeros((1, 1))
    return values.min(0), values.max(0)


def _section(
    out: Path, policy: str, task: str, lines, shown, scale: Scale, names: Sequence[str] | None
) -> str:
    """Return the section of a policy and a task: its episodes and its errors."""
    ended = sum(line["error"] is None for line in lines)
    figures = "".join(_figure(out, line, drawn, scale, names) for line, drawn in shown)
    errors = "".join(
        f"<p class=no>seed {line['seed']}: {escape(line['error'])}</p>"
        for line in lines
        if line["error"]
    )
    chunks = (
        ", predicted chunks in orange"
        if any(chunks.shape[1] > 1 for _, (_, _, chunks) in shown)
        else ""
    )
    return (
        f"<h2>{escape(policy)}: {wrapping(task)}</h2><p>{len(shown)} of {ended} episodes, "
        f"failures first; the others are in "
        f"videos/. Below a video each action dimension over time: executed in blue{chunks}.</p>"
        f"<div class=grid>{figures}</div>{errors}"
    )


def _figure(
    out: Path, line: Mapping[str, Any], drawn: Drawn, scale: Scale, names: Sequence[str] | None
) -> str:
    """Return the figure of an episode: its video, what came of it, and its actions."""
    word = "<span class=ok>solved</span>" if line["success"] else "<span class=no>not solved</span>"
    video = base64.b64encode(_inside(out, line["video"]).read_bytes()).decode()
    actions = drawn[0]
    alike = len(actions) - int(np.flatnonzero((actions != actions[-1]).any(1)).max(initial=-1)) - 1
    # Where an action does not change the picture, the policy repeats it until the episode ends.
    stuck = f", the last {alike} actions alike" if alike >= STUCK and not line["success"] else ""
    return (
        f"<figure><video controls autoplay muted loop playsinline preload=metadata "
        f"src='data:video/mp4;base64,{video}'></video>"
        f"<figcaption>seed {line['seed']}: {word} in {line['steps']} steps{stuck}</figcaption>"
        f"{plot_actions(*drawn, scale, names)}</figure>"
    )


def plot_actions(
    actions: np.ndarray,
    queries: np.ndarray,
    chunks: np.ndarray,
    scale: Scale | None = None,
    names: Sequence[str] | None = None,
    width: int = 240,
    row: int = 36,
) -> str:
    """Draw executed actions and predicted chunks as an SVG, with a row per dimension.

    A chunk of one step is not drawn, because it is the action that is executed.

    Args:
        actions: (T, D) executed actions.
        queries: (Q,) steps at which the policy was queried.
        chunks: (Q, H, D) chunks that it predicted then.
        scale: (D,) low and high ends of the rows. None takes the range of the values.
        names: Names of the dimensions.
        width: Width of the drawing.
        row: Height of a row.
    """
    low, high = _scale([(actions, queries, chunks)]) if scale is None else scale
    # The room at the right is for the numbers of the scale.
    last_step, room = max(len(actions) - 1, 1), width - 28

    def height(values, d):
        share = (
            (values - low[d]) / (high[d] - low[d])
            if high[d] > low[d]
            else np.full(np.shape(values), 0.5)
        )
        return (d + 1) * row - 3 - share * (row - 14)

    def line(first, values, d, style):
        x = (first + np.arange(len(values))) / last_step * room
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, height(values, d), strict=True))
        return f"<polyline points='{points}' fill='none' {style}/>"

    drawn = []
    for d in range(actions.shape[1]):
        drawn.append(
            f"<line x2='{width}' y1='{(d + 1) * row}' y2='{(d + 1) * row}' stroke='#d9dee7' "
            f"stroke-width='.5'/>"
        )
        for query, chunk in zip(queries, chunks, strict=True):
            if len(chunk) > 1:
                drawn.append(
                    line(
                        int(query),
                        chunk[:, d],
                        d,
                        "stroke='#e08a1e' stroke-width='2.6' stroke-opacity='.55'",
                    )
                )
        drawn.append(line(0, actions[:, d], d, "stroke='#3b6fd4' stroke-width='1'"))
        drawn.append(
            f"<text y='{d * row + 8}'>{escape(names[d]) if names else f'dimension {d}'}</text>"
        )
        for value in sorted({float(low[d]), float(high[d])}):
            drawn.append(
                f"<text x='{width}' y='{height(value, d) + 2.5:.1f}' "
                f"text-anchor='end'>{value:.3g}</text>"
            )
    text = f"<g font-size='8' fill='#5b6472'>{''.join(drawn)}</g>"
    return f"<svg viewBox='0 0 {width} {actions.shape[1] * row + 2}' role='img'>{text}</svg>"
