"""Show a Survey on the screen and as a page."""

import base64
import io
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image
from rich.table import Table

from vla0.doctor import GIB
from vla0.inspect.examine import Dimension, Survey
from vla0.sim.report import STYLE

OWN = """
.grid{grid-template-columns:repeat(auto-fill,minmax(20rem,1fr))}img{width:100%;border-radius:4px;display:block}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#eef1f6;padding:.6rem .9rem;border-radius:4px}
@media(prefers-color-scheme:dark){pre{background:#252c38}}
"""  # noqa: E501


def survey_table(survey: Survey) -> Table:
    """Return a table of the actions' dimensions for the terminal; `facts` has the rest."""
    table = Table(
        "action", "values", "bounds", "error", "clipped", "levels", box=None, pad_edge=False
    )
    for dimension in survey.dimensions:
        table.add_row(*_cells(dimension))
    return table


def facts(survey: Survey) -> list[tuple[str, str]]:
    """Return (name, text) of each fact about a dataset, except the dimensions."""
    shortest, median, longest = survey.lengths
    total = None if survey.prompt_tokens is None else survey.prompt_tokens + survey.answer_tokens
    tokens = f"{survey.answer_tokens:.0f} an answer" + (
        "" if total is None else f", {total:.0f} a sample"
    )
    time = (
        "how long is unknown without the model's files"
        if survey.seconds is None
        else f"about {duration(survey.seconds)}"
    )
    rounds = survey.steps * survey.samples / survey.frames
    memory = (
        "unknown without the model's files"
        if survey.memory is None
        else f"about {survey.memory / GIB:.2g} GiB"
    )
    return [
        ("dataset", survey.dataset),
        (
            "episodes",
            f"{survey.episodes}, {survey.frames} frames, {duration(survey.frames / survey.fps)}",
        ),
        (
            "an episode",
            f"{shortest} to {longest} frames, median {median}, at {survey.fps:g} a second",
        ),
        (
            "instructions",
            "; ".join(f"{text!r} {count}" for text, count in list(survey.instructions.items())[:5]),
        ),
        ("cameras", "; ".join(f"{name}: {size}" for name, size in survey.cameras.items())),
        ("idle frames", f"{survey.idle:.1%}"),
        ("estimate for", f"{survey.estimated}; for another: --config FILE"),
        ("tokens", tokens),
        (
            "training here",
            f"{survey.steps} steps of {survey.samples} samples, {rounds:.1f} times through the "
            f"data, {time}",
        ),
        ("memory", f"{memory} for {survey.trained}, and what the samples take"),
    ]


def duration(seconds: float) -> str:
    """Write a duration in s, min or h, with at least two digits."""
    unit, length = next(
        (choice for choice in (("s", 1), ("min", 60)) if seconds < 100 * choice[1]), ("h", 3600)
    )
    value = seconds / length
    return f"{value:.2g} {unit}" if value < 10 else f"{value:.0f} {unit}"


def page(survey: Survey, file: Path) -> None:
    """Write a survey as one HTML page that loads nothing, and make its folder if there is none."""
    rows = "".join(f"<tr><td>{escape(name)}<td>{escape(text)}" for name, text in facts(survey))
    wrong = (
        "".join(f"<p class=no>{escape(text)}</p>" for text in survey.problems)
        or "<p class=ok>Nothing looks wrong.</p>"
    )
    head = (
        "<tr><th>action<th>values<th>bounds<th>mean error in writing<th>clipped<th>levels "
        "used<th>distribution"
    )
    body = "".join(
        f"<tr><td>{'<td>'.join(map(escape, _cells(dimension)))}<td>{_bars(dimension)}"
        for dimension in survey.dimensions
    )
    images = "".join(
        f"<figure><img src='data:image/png;base64,{_png(picture.pixels)}'>"
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
        for picture in survey.pictures
    )
    squeezed = f"<p>{escape(survey.squeezed)}.</p>" if survey.squeezed else ""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport "
        f"content='width=device-width'>"
        f"<title>{escape(survey.dataset)}</title><style>{STYLE}{OWN}</style><body><h1>{escape(survey.dataset)}</h1>{wrong}"
        f"<table>{rows}</table><h2>Actions</h2><table>{head}{body}</table><h2>What the model "
        f"sees</h2>{squeezed}"
        f"<div class=grid>{images}</div><h2>What the model reads and writes</h2><p>At the first "
        f"of these pictures. "
        f"Before its answer:</p><pre>{escape(survey.prompt)}</pre><p>The answer that it "
        f"learns:</p>"
        f"<pre>{escape(survey.answer)}</pre></body></html>",
        encoding="utf-8",
    )


def _cells(dimension: Dimension) -> tuple[str, ...]:
    """Return the cells of a dimension's row."""
    low, high = dimension.bounds
    return (
        dimension.name,
        f"{dimension.low:.4g} to {dimension.high:.4g}",
        f"{low:.4g} to {high:.4g}",
        f"{dimension.error:.2g}",
        f"{dimension.clipped:.1%}",
        str(dimension.levels),
    )


def _bars(dimension: Dimension, width: int = 200, height: int = 36) -> str:
    """Draw a dimension's histogram as an SVG."""
    step, top = width / len(dimension.histogram), max(dimension.histogram)
    heights = [height * count / top for count in dimension.histogram]
    bars = "".join(
        f"<rect x='{i * step:.1f}' width='{step * 0.85:.1f}' y='{height - y:.1f}' "
        f"height='{y:.1f}' fill='#3b6fd4'/>"
        for i, y in enumerate(heights)
    )
    return f"<svg viewBox='0 0 {width} {height}' style='width:{width}px' role='img'>{bars}</svg>"


def _png(picture: np.ndarray) -> str:
    """Encode a picture as a PNG in base64."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
