"""What imitation draws from: all tasks alike, hard initial states more often, rounds that stay."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vla0 import InputError
from vla0.rl.rollouts import Played, Turn
from vla0.rl.successes import Successes

GROUPS = st.lists(
    st.tuples(
        st.sampled_from(["button", "drawer", "window"]),
        st.lists(st.tuples(st.booleans(), st.integers(1, 4)), min_size=2, max_size=6),
    ),
    min_size=1,
    max_size=6,
)


@given(GROUPS, st.integers(0, 9))
def test_all_tasks_come_alike_and_what_others_failed_at_more_often(groups, seed):
    """Each group is a task, and of each episode its success and its queries."""
    made = [
        [
            Played(("a", task, 0), {"success": success}, [Turn((number, place), task)] * queries)  # type: ignore[arg-type]
            for place, (success, queries) in enumerate(episodes)
        ]
        for number, (task, episodes) in enumerate(groups)
    ]
    successes = Successes(None, 1)  # type: ignore[arg-type]
    successes.add(1, made)
    found = successes.draw([seed])
    assert abs(len(found) - sum(q for _, eps in groups for success, q in eps if success)) <= 1
    if not found:
        return
    assert {query.advantage for query in found} == {1.0}
    by_task = Counter(query.turn.levels for query in found)
    by_episode = Counter(query.turn.seen for query in found)
    solved = {task for task, episodes in groups if any(success for success, _ in episodes)}
    assert all(abs(by_task[task] - len(found) / len(solved)) <= 1 for task in solved)
    failed = [np.mean([not success for success, _ in episodes]) for _, episodes in groups]
    for one, count in by_episode.items():
        for other, less in by_episode.items():
            same = groups[one[0]][0] == groups[other[0]][0]
            if same and failed[one[0]] > failed[other[0]]:
                assert count > less - 2  # each comes as often as it should, or once more or less


def group(name, *successes, queries=3):
    turns = [
        Turn(([np.full((4, 4, 3), place, np.uint8)], f"{name} {place}", name), np.array([[place]]))
        for place in range(queries)
    ]
    return [Played((name, "open", 0), {"success": success}, turns) for success in successes]


def names(found):
    return Counter(query.turn.seen[2] for query in found)


def test_successes_of_earlier_rounds_come_again_until_they_have_stayed_long_enough(tmp_path):
    successes = Successes(tmp_path / "successes", 2)
    successes.add(1, [group("first", True, False), group("lost", False, False)])
    assert names(successes.draw([0])) == {"first": 3}
    successes.add(2, [group("second", True, False, queries=6)])
    assert names(successes.draw([0])) == {"first": 3, "second": 3}  # as many as the newest has
    successes.add(3, [])
    assert successes.draw([0]) == []
    successes.add(4, [group("fourth", True, False)])
    assert names(successes.draw([0])) == {"fourth": 3}


def test_what_is_read_again_is_drawn_as_before(tmp_path):
    successes = Successes(tmp_path / "successes", 3)
    for number in range(1, 6):
        successes.add(number, [group(f"round {number}", True, True, False)])
        successes.prune(number - 1)
    successes.prune(5)
    assert sorted(file.name for file in (tmp_path / "successes").iterdir()) == [
        "000004-0.pt",  # what round 6 draws from
        "000005-0.pt",
    ]
    left = tmp_path / "successes" / "000006-3.pt"  # a kill's, and of a process that is no more
    left.write_bytes(b"")
    resumed = Successes(tmp_path / "successes", 3)
    resumed.load(5)
    assert not left.exists()
    for each in (successes, resumed):
        each.add(6, [group("round 6", True, False)])
    for one, other in zip(successes.draw([3]), resumed.draw([3]), strict=True):
        np.testing.assert_array_equal(one.turn.seen[0], other.turn.seen[0])
        assert one.turn.seen[1:] == other.turn.seen[1:]
        np.testing.assert_array_equal(one.turn.levels, other.turn.levels)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text", "other"])
def test_a_file_that_is_damaged_is_told(tmp_path, damage):
    successes = Successes(tmp_path, 2)
    successes.add(1, [group("first", True, False)])
    file = tmp_path / "000001-0.pt"
    content = {"empty": b"", "cut": file.read_bytes()[:200], "text": b"{}"}
    if damage == "missing":
        file.unlink()
    elif damage == "other":
        torch.save([1, 2], file)
    else:
        file.write_bytes(content[damage])
    with pytest.raises(InputError, match=r"the successes of|whole in '.*000001-0\.pt'"):
        Successes(tmp_path, 2).load(1)
