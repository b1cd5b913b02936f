"""A Survey → the screen, and a page to look at."""

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
    """The actions' dimensions, for the terminal; the rest is lines of `facts`."""
    table = Table(
        "action", "values", "bounds", "error", "clipped", "levels", box=None, pad_edge=False
    )
    for own in survey.dimensions:
        table.add_row(*_cells(own))
    return table


def facts(survey: Survey) -> list[tuple[str, str]]:
    """(what, how much) of everything but the dimensions."""
    least, median, most = survey.lengths
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
        ("an episode", f"{least} to {most} frames, median {median}, at {survey.fps:g} a second"),
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
    """In the unit that suits it, two digits or more."""
    unit, length = next(
        (own for own in (("s", 1), ("min", 60)) if seconds < 100 * own[1]), ("h", 3600)
    )
    value = seconds / length
    return f"{value:.2g} {unit}" if value < 10 else f"{value:.0f} {unit}"


def page(survey: Survey, file: Path) -> None:
    """All of it as one HTML page, nothing loaded from elsewhere; its folder is made where there is
    none.
    """
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
        f"<tr><td>{'<td>'.join(map(escape, _cells(own)))}<td>{_bars(own)}"
        for own in survey.dimensions
    )
    images = "".join(
        f"<figure><img "
        f"src='data:image/png;base64,{_png(own.pixels)}'><figcaption>{escape(own.caption)}</figcaption></figure>"
        for own in survey.pictures
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


def _cells(own: Dimension) -> tuple[str, ...]:
    low, high = own.bounds
    return (
        own.name,
        f"{own.low:.4g} to {own.high:.4g}",
        f"{low:.4g} to {high:.4g}",
        f"{own.error:.2g}",
        f"{own.clipped:.1%}",
        str(own.levels),
    )


def _bars(own: Dimension, width: int = 200, height: int = 36) -> str:
    step, top = width / len(own.histogram), max(own.histogram)
    tall = [height * count / top for count in own.histogram]
    bars = "".join(
        f"<rect x='{i * step:.1f}' width='{step * 0.85:.1f}' y='{height - y:.1f}' "
        f"height='{y:.1f}' fill='#3b6fd4'/>"
        for i, y in enumerate(tall)
    )
    return f"<svg viewBox='0 0 {width} {height}' style='width:{width}px' role='img'>{bars}</svg>"


def _png(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
