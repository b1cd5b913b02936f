"""Draw a run of reinforcement learning: success by round, and what a round costs."""

import base64
import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from vla0.files import write_whole
from vla0.sim.report import page
from vla0.sim.results import wilson
from vla0.train.checkpoints import FINISHED, measured
from vla0.train.plots import BLUE, GREY

PARTS = (  # of a round: key, name, colour
    ("decode_s", "decoding", BLUE),
    ("world_s", "simulators", GREY),
    ("update_s", "learning", "#d98a3b"),
)


def write_report(output: Path) -> Path:
    """Write training.png and report.html of a run, from rounds.jsonl and metrics.jsonl.

    Args:
        output: The folder of the run.

    Returns:
        The page, which loads nothing.
    """
    file = output / "rounds.jsonl"
    rounds = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for line in rounds:
        line["world_s"] = line["play_s"] - line["decode_s"]
    held_out = [
        {**line, "round": int(line["step"].removeprefix("step-"))} for line in measured(output)
    ]
    png = _drawn(rounds, held_out)
    write_whole(output / FINISHED, png)
    picture = base64.b64encode(png).decode()
    parts = [
        "<h1>Learning from success</h1>",
        f"<p class=says>{_headline(held_out)}</p>",
        f"<img alt='success and time by round' style='max-width:100%' "
        f"src='data:image/png;base64,{picture}'>",
        _table(held_out),
    ]
    page(output / "report.html", "vla0 rl", parts)
    return output / "report.html"


def _interval(rate: float, episodes: float) -> tuple[float, float]:
    """Return the 95 % interval of a mean success."""
    return wilson(round(rate * episodes), round(episodes))


def _headline(held_out: Sequence[Mapping[str, Any]]) -> str:
    """Return the first and the best held-out success in a sentence."""
    if not held_out:
        return "Nothing has been measured yet."
    first, best = held_out[0], max(held_out, key=lambda line: line["success"])

    def said(line: Mapping[str, Any]) -> str:
        low, high = _interval(line["success"], line["episodes"])
        return f"{line['success']:.1%} ({low:.0%} to {high:.0%})"

    return (
        f"Held-out success, greedily: {said(first)} at the start, {said(best)} at best, "
        f"after round {best['round']}."
    )


def _table(held_out: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of what was measured."""
    keys = sorted({key for line in held_out for key in line if key.startswith("success")})
    heads = "".join(f"<th>{key.removeprefix('success/')}" for key in keys)
    rows = "".join(
        f"<tr><td>{line['round']}" + "".join(f"<td>{line.get(key, 0):.1%}" for key in keys)
        for line in held_out
    )
    return f"<div class=wide><table><tr><th>after round{heads}{rows}</table></div>"


def _drawn(rounds: Sequence[Mapping[str, Any]], held_out: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw success and time by round as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    numbers = [line["round"] for line in rounds]
    if rounds:
        rates = [line["success"] for line in rounds]
        bounds = [_interval(line["success"], line["episodes"]) for line in rounds]
        left.plot(numbers, rates, color=GREY, label="played at random")
        left.fill_between(numbers, *zip(*bounds, strict=True), color=GREY, alpha=0.25, lw=0)
        foot = [0.0] * len(rounds)
        for key, name, colour in PARTS:
            height = [line.get(key, 0.0) for line in rounds]
            right.bar(numbers, height, bottom=foot, color=colour, label=name)
            foot = [below + more for below, more in zip(foot, height, strict=True)]
        right.set_ylim(top=1.15 * max(foot) or 1.0)  # the legend covers no bar
        right.legend(frameon=False, fontsize=7, loc="upper left", ncols=len(PARTS))
    if held_out:
        rates = [line["success"] for line in held_out]
        bounds = [_interval(line["success"], line["episodes"]) for line in held_out]
        apart = [
            [max(0.0, rate - low) for rate, (low, _) in zip(rates, bounds, strict=True)],
            [max(0.0, high - rate) for rate, (_, high) in zip(rates, bounds, strict=True)],
        ]
        left.errorbar(
            [line["round"] for line in held_out], rates, yerr=apart, color=BLUE, marker="o", ms=4,
            capsize=2, label="held out, greedy",
        )  # fmt: skip
    if rounds or held_out:
        left.legend(frameon=False, fontsize=7, loc="lower right")
    left.set(xlabel="round", title="success", ylim=(0, 1.03))
    right.set(xlabel="round", title="seconds")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    png = BytesIO()
    figure.savefig(png, dpi=100)
    return png.getvalue()
