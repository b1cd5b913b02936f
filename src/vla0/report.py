"""episodes.jsonl → a report.html to look at: success per task, videos, predicted against executed actions."""

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from vla0.errors import InputError
from vla0.table import PUBLISHED, mean_success, read_episodes, suites, summary

CONTROLS = {  # policies to compare with, and what the page says of them
    "blank": "The policy was given black pictures; the videos show what was there. ",
    "exchanged": "The policy was given the next task's sentence. ",
    "random": "Uniform actions between the bounds. ",
    "untrained": "The same architecture before training. ",
}
SHOWN = 6  # episodes of each policy and task that the page holds; the others stay in videos/
STUCK = 20  # the same action so often at a failure's end is worth saying

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:76rem;padding:0 1rem;color:#1c2330;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid #d9dee7}
table{border-collapse:collapse}td,th{padding:.25rem .9rem .25rem 0;text-align:left}th{color:#5b6472;font-weight:500}
.bar{position:relative;width:16rem;height:.9rem;background:#eef1f6;border-radius:3px}
.bar i{position:absolute;left:0;top:0;bottom:0;background:#3b6fd4;border-radius:3px}
.bar b{position:absolute;top:.4rem;height:.1rem;background:#1c2330}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(11rem,1fr));gap:1rem}
figure{margin:0}video{width:100%;border-radius:4px;background:#000;display:block}
figcaption{font-size:.82rem;color:#5b6472}.ok{color:#12784a}.no{color:#b3261e}
svg{width:100%;height:auto;margin-top:.3rem}details{margin:.6rem 0}
@media(prefers-color-scheme:dark){body{color:#dde3ee;background:#12161d}.bar{background:#252c38}.bar b{background:#dde3ee}}
"""


def write_report(out: str | Path, title: str = "vla0 evaluation") -> Path:
    """Writes `out`/report.html from `out`/episodes.jsonl: one file, nothing loaded from elsewhere."""
    out = Path(out)
    lines = read_episodes(out / "episodes.jsonl")
    if not lines:
        raise InputError(f"episodes in '{out}'", "none", "run `vla0 eval` first")
    parts = [f"<h1>{escape(title)}</h1>", _table(lines), _settings(out / "evaluation.json")]
    for policy, rows in summary(lines).items():
        for task in rows:
            parts.append(_section(out, policy, task, [e for e in lines if e["policy"] == policy and e["task"] == task]))
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style><body>{''.join(parts)}</body></html>"
    )
    file = out / "report.html"
    file.write_text(page, encoding="utf-8")
    return file


def _table(lines: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for policy, tasks in summary(lines).items():
        for task, row in tasks.items():
            rate = row["successes"] / row["episodes"] if row["episodes"] else 0.0
            bar = (
                f"<div class=bar><i style='width:{rate:.1%}'></i>"
                f"<b style='left:{row['low']:.1%};width:{row['high'] - row['low']:.1%}'></b></div>"
            )
            steps = "" if row["steps"] is None else f"{row['steps']:.0f}"
            rows.append(
                f"<tr><td>{escape(policy)}<td>{escape(task)}<td>{row['successes']} of {row['episodes']}<td>{bar}"
                f"<td>{row['low']:.0%} to {row['high']:.0%}<td>{steps}<td>{row['errors'] or ''}"
            )
        for suite, row in suites(tasks).items():
            rows.append(
                f"<tr><td>{escape(policy)}<td><strong>{escape(suite)}</strong><td>{row['successes']} of {row['episodes']}<td>"
                f"<td>{row['low']:.0%} to {row['high']:.0%}<td><td>"
                + (f"<td>VLA-0: {PUBLISHED[suite]} %" if suite in PUBLISHED and policy == "policy" else "")
            )
        rows.append(
            f"<tr><td><strong>{escape(policy)}</strong><td><strong>mean</strong><td><strong>{mean_success(tasks):.1%}</strong>"
        )
    head = "<tr><th>policy<th>task<th>success<th><th>95 % interval<th>median steps<th>errors"
    return f"<table>{head}{''.join(rows)}</table>"


def _settings(file: Path) -> str:
    """What the results depend on, and what spoils a comparison."""
    if not file.is_file():
        return ""
    text = file.read_text(encoding="utf-8")
    count = json.loads(text).get("versions", {}).get("stand-in assets", 0)
    warning = (
        f"<p class=no>{count} of the meshes are stand-ins: no rate here compares with a published one.</p>" if count else ""
    )
    return f"{warning}<details><summary>settings and versions</summary><pre>{escape(text)}</pre></details>"


def _section(out: Path, policy: str, task: str, lines: Sequence[Mapping[str, Any]]) -> str:
    ended = [line for line in lines if line["error"] is None]
    shown = sorted(ended, key=lambda line: (line["success"], line["seed"]))[:SHOWN]  # failures first
    figures = "".join(_figure(out, line) for line in shown)
    errors = "".join(f"<p class=no>seed {line['seed']}: {escape(line['error'])}</p>" for line in lines if line["error"])
    return (
        f"<h2>{escape(policy)}: {escape(task)}</h2><p>{CONTROLS.get(policy, '')}"
        f"{len(shown)} of {len(ended)} episodes, failures first; "
        f"the others are in videos/. Below a video each action dimension over time: executed in blue, predicted chunks "
        f"in orange.</p><div class=grid>{figures}</div>{errors}"
    )


def _figure(out: Path, line: Mapping[str, Any]) -> str:
    word = "<span class=ok>solved</span>" if line["success"] else "<span class=no>not solved</span>"
    video = base64.b64encode((out / line["video"]).read_bytes()).decode()
    with np.load((out / line["video"]).with_suffix(".npz")) as arrays:
        plot = plot_actions(actions := arrays["actions"], arrays["queries"], arrays["chunks"])
    alike = len(actions) - int(np.flatnonzero((actions != actions[-1]).any(1)).max(initial=-1)) - 1
    # A picture that an action does not change gives that action again, until the episode ends.
    stuck = f", the last {alike} actions alike" if alike >= STUCK and not line["success"] else ""
    return (
        f"<figure><video controls muted loop playsinline preload=metadata src='data:video/mp4;base64,{video}'></video>"
        f"{plot}<figcaption>seed {line['seed']}: {word} in {line['steps']} steps{stuck}</figcaption></figure>"
    )


def plot_actions(actions: np.ndarray, queries: np.ndarray, chunks: np.ndarray, width: int = 240, row: int = 44) -> str:
    """SVG of executed actions (T, D) and the chunks (Q, H, D) predicted at steps queries (Q,), a row per dimension."""
    dimensions = actions.shape[1]
    low = np.minimum(actions.min(0), chunks.min((0, 1)))
    span = np.maximum(np.maximum(actions.max(0), chunks.max((0, 1))) - low, 1e-9)
    longest = max(len(actions) - 1, 1)

    def line(first, values, d, style):
        y = (d + 1) * row - 4 - (values - low[d]) / span[d] * (row - 12)
        x = (first + np.arange(len(values))) / longest * width
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        return f"<polyline points='{points}' fill='none' {style}/>"

    drawn = []
    for d in range(dimensions):
        drawn.append(
            f"<line x1='0' x2='{width}' y1='{(d + 1) * row}' y2='{(d + 1) * row}' stroke='#d9dee7' stroke-width='.5'/>"
        )
        for query, chunk in zip(queries, chunks, strict=True):
            drawn.append(line(int(query), chunk[:, d], d, "stroke='#e08a1e' stroke-width='2.6' stroke-opacity='.55'"))
        drawn.append(line(0, actions[:, d], d, "stroke='#3b6fd4' stroke-width='1'"))
        drawn.append(f"<text x='2' y='{d * row + 10}' font-size='9' fill='#5b6472'>dimension {d}</text>")
    return f"<svg viewBox='0 0 {width} {dimensions * row + 2}' role='img'>{''.join(drawn)}</svg>"
