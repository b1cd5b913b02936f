"""Plot a training as one picture: loss, share of right tokens, and what was measured."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from vla0.files import write_whole

BLUE, GREY = "#3b6fd4", "#9aa5b8"


def chart(
    losses: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]], file: Path
) -> None:
    """Draw a training as a PNG.

    Args:
        losses: Lines of the log, with step and loss.
        metrics: Lines of metrics.jsonl, each with "step": "step-N" and numbers.
        file: Where the PNG is written.
    """
    from matplotlib.figure import Figure

    measured = [m for m in metrics if len(m) > 1]
    errors = sorted({name for m in measured for name in m if "error/" in name})
    panels = (
        1
        + any("token_accuracy" in line for line in losses)
        + bool(errors)
        + any("success" in m for m in measured)
    )
    figure = Figure(figsize=(4.2 * panels, 3.2), layout="constrained")
    axes = iter(figure.subplots(1, panels, squeeze=False)[0])

    def steps(lines):
        return [int(str(line["step"]).rpartition("-")[2]) for line in lines]

    def panel(title, *curves):
        axis = next(axes)
        for name, lines, key, style in curves:
            lines = [line for line in lines if key in line]
            axis.plot(steps(lines), [line[key] for line in lines], label=name, **style)
        axis.set(xlabel="training step", title=title)
        axis.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            axis.legend(frameon=False, fontsize=7)
        return axis

    dots = {"marker": "o", "ms": 3}
    held_out = (
        [("held-out", measured, "held_out_loss", {"color": GREY, **dots})]
        if any("held_out_loss" in m for m in measured)
        else []
    )
    plain_log(panel("loss per token", ("training", losses, "loss", {"color": BLUE}), *held_out))
    if any("token_accuracy" in line for line in losses):
        panel("share of right tokens", ("", losses, "token_accuracy", {"color": BLUE}))
    if errors:
        panel(
            "held-out error, dataset's units",
            *((name.replace("error/", ""), measured, name, dots) for name in errors),
        )
    if any("success" in m for m in measured):
        panel(
            "success in the simulator", ("", measured, "success", {"color": BLUE, **dots})
        ).set_ylim(0, 1.05)
    png = BytesIO()
    figure.savefig(png, dpi=100)
    write_whole(file, png.getvalue())


def plain_log(axes: Any) -> None:
    """Give matplotlib axes a logarithmic y axis with plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
