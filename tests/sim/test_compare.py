"""Laws of a comparison: the same episodes, one protocol, honest intervals."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from vla0 import InputError
from vla0.sim.compare import Pair, compare, tables, write_page

SETTINGS = {
    "env": "metaworld",
    "max_steps": 50,
    "fps": 40.0,
    "options": {"start": "above"},
    "versions": {"mujoco": "3.3.2"},
    "checkpoint": "abc",
    "n_action_steps": 1,
    "ensemble": "none",
    "image_size": 112,
}


def evaluated(folder, solved, seeds=range(4), tasks=("press", "close"), policy="policy", **changes):
    """A folder as `vla0 eval` leaves it, in which the (task, seed) of `solved` were solved."""
    folder.mkdir()
    lines = [
        {
            "policy": policy,
            "task": task,
            "seed": seed,
            "success": (task, seed) in solved,
            "steps": 9,
        }
        | {"video": None, "error": None}
        for task in tasks
        for seed in seeds
    ]
    crash = {"success": None, "steps": None, "error": "a crash"}
    lines.insert(0, lines[0] | crash)
    (folder / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "evaluation.json").write_text(json.dumps(SETTINGS | changes))
    return folder


def test_the_pairs_are_the_episodes_that_all_have(tmp_path):
    one = evaluated(tmp_path / "one", {("press", 0), ("press", 1), ("close", 3)})
    other = evaluated(
        tmp_path / "other",
        {("press", 1), ("press", 2), ("close", 2)},
        seeds=range(3),
        ensemble="v1",
    )
    found = compare([one, other])
    assert found.pairs == [Pair(("one", "other"), both=1, first=1, second=2, neither=2)]
    assert found.left_out == 2
    assert {task: row["episodes"] for task, row in found.rows["one"].items()} == {
        "press": 3,
        "close": 3,
    }
    assert found.rows["one"]["press"]["successes"] == 2
    assert found.settings["other"]["ensemble"] == "v1"
    tasks, pairs = tables(found)
    assert (tasks.row_count, pairs.row_count) == (3, 1)
    write_page(found, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "other against one" in page
    assert "2 episodes are left out" in page
    assert "<script" not in page


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_the_interval_holds_the_difference_and_chance_is_the_binomial_test(both, one, two, none):
    if both + one + two + none == 0:
        return
    pair = Pair(("a", "b"), both, one, two, none)
    middle, low, high = pair.difference
    assert -1 <= low <= middle <= high <= 1
    expected = binomtest(one, one + two).pvalue if one + two else 1.0
    assert pair.chance == pytest.approx(expected)
    turned = Pair(("b", "a"), both, two, one, none)
    assert turned.difference == pytest.approx((-middle, -high, -low))


@pytest.mark.parametrize(("one", "two"), [(0.2, 0.1), (0.05, 0.3), (0.02, 0.02), (0.4, 0.4)])
def test_the_interval_covers_the_true_difference_in_95_of_100_comparisons(one, two):
    """By the probability of every outcome of 30 pairs, not by drawing some."""
    covered = 0.0
    for first in range(31):
        for second in range(31 - first):
            rest = 30 - first - second
            ways = math.comb(30, first) * math.comb(30 - first, second)
            chance = ways * one**first * two**second * (1 - one - two) ** rest
            _, low, high = Pair(("a", "b"), rest, first, second, 0).difference
            covered += chance * (low <= two - one <= high)
    assert covered > 0.94


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("fps", 80.0, "fps 40.0 in 'one'; got 80.0 in 'other'"),
        ("options", {}, "options"),
        ("versions", {"mujoco": "3.17"}, "versions"),
        ("max_steps", None, r"max_steps \[50\] in 'one'; got \[150\]"),
        ("env", "libero", "env metaworld"),
    ],
)
def test_evaluations_by_other_protocols_are_refused(tmp_path, key, value, message):
    folders = [
        evaluated(tmp_path / "one", set()), evaluated(tmp_path / "other", set(), **{key: value})
    ]  # fmt: skip
    with pytest.raises(InputError, match=message):
        compare(folders)


def test_a_rate_that_a_simulator_does_not_have_and_a_default_written_out_are_no_difference(
    tmp_path,
):
    one = evaluated(tmp_path / "one", {("press", 0)}, env="libero", fps=10.0, options={})
    other = evaluated(
        tmp_path / "other", set(), env="libero", fps=20.0, options={"quick": False}
    )  # fmt: skip
    assert compare([one, other]).pairs[0].first == 1
    capped = evaluated(tmp_path / "capped", {("press", 0)}, max_steps=150)
    free = evaluated(tmp_path / "free", set(), max_steps=None)
    assert compare([capped, free]).pairs[0].first == 1
    quick = evaluated(tmp_path / "quick", set(), env="libero", options={"quick": True})
    with pytest.raises(InputError, match="options"):
        compare([one, quick])


def test_what_cannot_be_compared_is_refused(tmp_path):
    one = evaluated(tmp_path / "one", set())
    for folders in ([one], [one, tmp_path / "." / "one"]):
        with pytest.raises(InputError, match="two or more folders"):
            compare(folders)
    with pytest.raises(InputError, match="a folder of `vla0 eval`"):
        compare([one, tmp_path / "nothing"])
    with pytest.raises(InputError, match="none in common"):
        compare([one, evaluated(tmp_path / "late", set(), seeds=range(9, 12))])
    with pytest.raises(InputError, match="none in common"):
        compare([one, evaluated(tmp_path / "blank", set(), policy="blank")])


def test_two_folders_of_one_name_are_told_apart(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    folders = [evaluated(tmp_path / place / "eval", {("press", 0)}) for place in "ab"]
    assert list(compare(folders).rows) == [str(folder) for folder in folders]
