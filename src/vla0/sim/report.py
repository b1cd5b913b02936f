"""episodes.jsonl → a report.html to look at: success per task, videos, predicted against executed
actions.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from vla0.errors import InputError, nearest
from vla0.files import read_json
from vla0.sim.results import PUBLISHED, mean_success, read_episodes, suites, summary, wilson

BASELINES = {  # policies to compare with, and what the page says of them
    "blank": "the policy was given black pictures; the videos show what was there",
    "swapped": "the policy was given the next task's instruction",
    "random": "uniform actions between the bounds",
    "untrained": "the same architecture before training",
}


def refuse_unknown_baselines(names: Sequence[str]) -> None:
    """Raises InputError for a baseline that there is not."""
    if wrong := [name for name in names if name not in BASELINES]:
        raise InputError(
            f"a baseline of {tuple(BASELINES)}", f"'{wrong[0]}'", nearest(wrong[0], BASELINES)
        )


SHOWN = 6  # episodes of each policy and task that the page holds; the others stay in videos/
STUCK = 20  # the same action so often at a failure's end is worth saying

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
    """Writes `out`/report.html from `out`/episodes.jsonl: one file, nothing loaded from elsewhere.

    names: of the action's dimensions, where they are known.
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
    shown = {place: _shown(out, those) for place, those in lines_of.items()}
    scale = _scale([drawn for figures in shown.values() for _, drawn in figures])
    parts = [
        f"<h1>{escape(title)}</h1><p class=says>{_headline(summarised)}</p>",
        _table(summarised),
        _settings(out / "evaluation.json"),
    ]
    parts += [
        _section(out, *place, lines_of[place], shown[place], scale, names) for place in lines_of
    ]
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport "
        f"content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style><body>{''.join(parts)}</body></html>"
    )
    file = out / "report.html"
    file.write_text(page, encoding="utf-8")
    return file


Rows = Mapping[str, Mapping[str, Any]]  # task → what `summary` found
# of an episode: actions (T, D), queries (Q,), chunks (Q, H, D)
Drawn = tuple[np.ndarray, np.ndarray, np.ndarray]
Scale = tuple[np.ndarray, np.ndarray]  # (D,) low and high


def _headline(summarised: Mapping[str, Rows]) -> str:
    """What came of the first policy, in one line."""
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
    """A row for each task, suite and the mean; a column for each policy, and for what was published
    where something was.
    """
    grouped = {policy: suites(tasks) for policy, tasks in summarised.items()}
    every = sorted({task for tasks in summarised.values() for task in tasks})
    published = any(suite in PUBLISHED for suite in grouped.get("policy", {}))
    rows = [
        f"<tr><td>{_wrapping(task)}{_cells([tasks.get(task) for tasks in summarised.values()])}"
        for task in every
    ]
    for suite in sorted({suite for rows_of in grouped.values() for suite in rows_of}):
        stated = f"<td>{PUBLISHED[suite]} %" if published and suite in PUBLISHED else ""
        cells = _cells([rows_of.get(suite) for rows_of in grouped.values()])
        rows.append(f"<tr><td><strong>{_wrapping(suite)}</strong>{cells}{stated}")
    means = "".join(
        f"<td>{'' if math.isnan(mean := mean_success(tasks)) else f'<strong>{mean:.1%}</strong>'}"
        for tasks in summarised.values()
    )
    rows.append(f"<tr><td><strong>mean</strong>{means}")
    head = "".join(f"<th>{escape(policy)}" for policy in summarised) + (
        "<th>VLA-0, published" if published else ""
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
    return "".join(f"<td>{'' if row is None else _cell(row)}" for row in rows)


def _cell(row: Mapping[str, Any]) -> str:
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


def _wrapping(name: str) -> str:
    return escape(name).replace("_", "_<wbr>").replace("/", "/<wbr>")


def _settings(file: Path) -> str:
    """What the results depend on, and what spoils a comparison."""
    if not file.is_file():
        return ""
    text = file.read_text(encoding="utf-8")
    versions = read_json(file, "evaluate into another folder").get("versions")
    count = versions.get("stand-in assets", 0) if isinstance(versions, dict) else 0
    shown = (
        f"{escape(str(count))} of the meshes are stand-ins: no rate here compares with a "
        f"published one."
    )
    warning = f"<p class=no>{shown}</p>" if count else ""
    return (
        f"{warning}<details><summary>settings and "
        f"versions</summary><pre>{escape(text)}</pre></details>"
    )


def _shown(out: Path, lines: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Drawn]]:
    """The episodes of a policy and a task that the page holds, with what is drawn of each: failures
    first.
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
    """A video's file.

    Raises InputError for one that does not lie in the results' own folder, or is none.
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
    """One for each dimension, over all episodes of the page."""
    each = [
        values.reshape(-1, values.shape[-1])
        for actions, _, chunks in drawn
        for values in (actions, chunks)
    ]
    values = np.concatenate(each) if each else np.zeros((1, 1))
    return values.min(0), values.max(0)


def _section(
    out: Path, policy: str, task: str, lines, shown, scale: Scale, names: Sequence[str] | None
) -> str:
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
        f"<h2>{escape(policy)}: {_wrapping(task)}</h2><p>{len(shown)} of {ended} episodes, "
        f"failures first; the others are in "
        f"videos/. Below a video each action dimension over time: executed in blue{chunks}.</p>"
        f"<div class=grid>{figures}</div>{errors}"
    )


def _figure(
    out: Path, line: Mapping[str, Any], drawn: Drawn, scale: Scale, names: Sequence[str] | None
) -> str:
    word = "<span class=ok>solved</span>" if line["success"] else "<span class=no>not solved</span>"
    video = base64.b64encode(_inside(out, line["video"]).read_bytes()).decode()
    actions = drawn[0]
    alike = len(actions) - int(np.flatnonzero((actions != actions[-1]).any(1)).max(initial=-1)) - 1
    # A picture that an action does not change gives that action again, until the episode ends.
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
    """SVG of executed actions (T, D) and the chunks (Q, H, D) predicted at steps queries (Q,), a
    row per dimension.

    scale: what the rows span; None: what is drawn. A chunk of one step is what is executed, and not
    drawn again.
    """
    low, high = _scale([(actions, queries, chunks)]) if scale is None else scale
    longest, room = max(len(actions) - 1, 1), width - 28  # at the right the scale's numbers

    def height(values, d):
        share = (
            (values - low[d]) / (high[d] - low[d])
            if high[d] > low[d]
            else np.full(np.shape(values), 0.5)
        )
        return (d + 1) * row - 3 - share * (row - 14)

    def line(first, values, d, style):
        x = (first + np.arange(len(values))) / longest * room
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
