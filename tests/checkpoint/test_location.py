"""Laws of where a model comes from, and under which licence."""

import pytest

from vla0.checkpoint.location import restricted
from vla0.core.spec import MAIN
from vla0.train.model_card import card

RESEARCH = "---\nlicense: other\nlicense_name: qwen-research\n---\n# A model\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (RESEARCH, "qwen-research"),
        ("---\nlicense: gemma\n---\n", "gemma"),
        ("---\nlicense: apache-2.0\n---\n", None),
        ("---\nlicense: MIT\n---\n", None),
        ("# without a header\n", None),
        ("---\nlicense: [\n---\n", None),
        (None, None),
    ],
)
def test_a_licence_that_is_not_free_is_named(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert restricted(tmp_path) == expected


@pytest.mark.parametrize("name", ["tiny", "tiny:qwen3_vl", "nobody/has-fetched-it", "a/b/c"])
def test_nothing_is_fetched_for_it(name):
    assert restricted(name) is None


def test_a_card_says_it_of_the_base_model(tmp_path, spec):
    from dataclasses import replace

    (tmp_path / "README.md").write_text(RESEARCH)
    text = card({MAIN: ("someone/data", replace(spec, base_model=str(tmp_path)))}, 3, {})
    assert 'under the licence "qwen-research"' in text
    assert "licence" not in card({MAIN: ("someone/data", spec)}, 3, {})
