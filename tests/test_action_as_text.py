"""The picture of the README: examples/action_as_text.py."""

import importlib.util
from pathlib import Path

import pytest
import typer
from conftest import make_spec
from matplotlib import pyplot

from vla0.policy import VLA0

FILE = Path(__file__).parents[1] / "examples" / "action_as_text.py"


def test_all_numbers_are_written_and_only_what_moves_is_drawn(policy, dataset, tmp_path):
    content = importlib.util.spec_from_file_location("action_as_text", FILE)
    module = importlib.util.module_from_spec(content)
    content.loader.exec_module(module)
    names = ("x", "gripper", "z")
    spec = make_spec(
        low=(-1.0, 1.0, -1.0),
        high=(1.0, 1.0, 1.0),
        cameras=("top",),
        state=None,
        chunk_size=6,
        action_names=names,
    )
    VLA0(policy.model, policy.processor, spec).save_pretrained(tmp_path / "checkpoint")
    out = tmp_path / "new" / "picture.png"
    module.draw(tmp_path / "checkpoint", dataset, 3, out)
    assert out.stat().st_size > 10_000
    _, middle, right = pyplot.gcf().axes
    written = [text.get_text() for text in middle.texts]
    columns = [written[d * 7 : d * 7 + 7] for d in range(3)]  # a name and six numbers each
    assert tuple(column[0] for column in columns) == names
    moving = [name for name, *numbers in columns if len(set(numbers)) > 1]
    assert "gripper" not in moving
    assert [line.get_label() for line in right.lines] == moving
    assert moving
    pyplot.close("all")
    with pytest.raises(typer.BadParameter, match="15 rows"):
        module.draw(tmp_path / "checkpoint", dataset, 15, out)
