"""The soak's kills, in short: `make soak` goes on with them for as long as one likes."""

import shutil

from soak import Until, kills


def test_a_training_that_is_killed_ends_as_one_that_was_not(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "data")
    every, *bars = kills.training(Until(tries=3), 5, tmp_path)
    assert [text for bar in (every, *bars) for text in bar.wrong] == []
    assert every.done == sum(bar.done for bar in bars) >= 3


def test_an_evaluation_that_is_killed_loses_and_doubles_nothing(tmp_path):
    (bar,) = kills.evaluation(Until(tries=2), 5, tmp_path)
    assert bar.wrong == []
    assert bar.done >= 2
