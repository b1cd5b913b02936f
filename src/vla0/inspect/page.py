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
from vla0.report import STYLE


def screen(survey: Survey) -> Table:
    """The actions' dimensions, for the terminal; the rest is lines of `facts`."""
    table = Table("action", "values", "bounds", "error", "clipped", "levels", box=None, pad_edge=False)
    for own in survey.dimensions:
        table.add_row(*_cells(own))
    return table


def facts(survey: Survey) -> list[tuple[str, str]]:
    """(what, how much) of everything but the dimensions."""
    least, median, most = survey.lengths
    total = None if survey.prompt_tokens is None else survey.prompt_tokens + survey.answer_tokens
    tokens = f"{survey.answer_tokens:.0f} an answer" + ("" if total is None else f", {total:.0f} a sample")
    hours = "how long is unknown without the model's files" if survey.hours is None else f"about {survey.hours:.2g} hours"
    memory = "unknown without the model's files" if survey.memory is None else f"about {survey.memory / GIB:.2g} GiB"
    return [
        ("dataset", survey.dataset),
        ("episodes", f"{survey.episodes}, {survey.frames} frames, {survey.frames / survey.fps / 3600:.2f} h"),
        ("an episode", f"{least} to {most} frames, median {median}, at {survey.fps:g} a second"),
        ("sentences", "; ".join(f"{text!r} {count}" for text, count in list(survey.sentences.items())[:5])),
        ("cameras", "; ".join(f"{name}: {size}" for name, size in survey.cameras.items())),
        ("idle frames", f"{survey.idle:.1%}"),
        ("tokens", tokens),
        ("training here", f"{survey.steps} steps of {survey.samples} samples, {hours}"),
        ("memory", f"{memory} for {survey.trained}, and what the samples take"),
    ]


def page(survey: Survey, file: Path) -> None:
    """All of it as one HTML page, nothing loaded from elsewhere."""
    rows = "".join(f"<tr><td>{escape(name)}<td>{escape(text)}" for name, text in facts(survey))
    wrong = "".join(f"<p class=no>{escape(text)}</p>" for text in survey.problems) or "<p class=ok>Nothing looks wrong.</p>"
    head = "<tr><th>action<th>values<th>bounds<th>mean error in writing<th>clipped<th>levels used<th>distribution"
    body = "".join(f"<tr><td>{'<td>'.join(map(escape, _cells(own)))}<td>{_bars(own)}" for own in survey.dimensions)
    images = "".join(
        f"<figure><img style='width:100%' src='data:image/png;base64,{_png(own)}'></figure>" for own in survey.pictures
    )
    file.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(survey.dataset)}</title><style>{STYLE}</style><body><h1>{escape(survey.dataset)}</h1>{wrong}"
        f"<table>{rows}</table><h2>Actions</h2><table>{head}{body}</table><h2>What the model sees</h2>"
        f"<div class=grid style='grid-template-columns:repeat(auto-fill,minmax(20rem,1fr))'>{images}</div></body></html>",
        encoding="utf-8",
    )


def _cells(own: Dimension) -> tuple[str, ...]:
    low, high = own.bounds
    return (
        own.name, f"{own.low:.4g} to {own.high:.4g}", f"{low:.4g} to {high:.4g}", f"{own.error:.2g}", f"{own.clipped:.1%}",
        str(own.levels),
    )  # fmt: skip


def _bars(own: Dimension, width: int = 200, height: int = 36) -> str:
    step, top = width / len(own.histogram), max(own.histogram)
    tall = [height * count / top for count in own.histogram]
    bars = "".join(
        f"<rect x='{i * step:.1f}' width='{step * 0.85:.1f}' y='{height - y:.1f}' height='{y:.1f}' fill='#3b6fd4'/>"
        for i, y in enumerate(tall)
    )
    return f"<svg viewBox='0 0 {width} {height}' style='width:{width}px' role='img'>{bars}</svg>"


def _png(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
