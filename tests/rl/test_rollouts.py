"""Episodes of a round depend on the model and their seeds alone, and what succeeds is learned."""

import functools
import os

import numpy as np
import pytest
import worlds
from conftest import make_spec

from vla0 import InputError
from vla0.checkpoint.tiny import tiny_model
from vla0.core.spec import Observation
from vla0.decode import GreedyDecoder
from vla0.policy import VLA0
from vla0.rl.config import UpdateConfig
from vla0.rl.rollouts import RolloutPool, Turn, greedy, sampled
from vla0.rl.update import Learner
from vla0.rl.weights import weighed
from vla0.sim.workers import ATTEMPTS, RolloutConfig

SMALL = {"width": 48, "layers": 2, "heads": 3}
SMALL |= {"vision_width": 32, "vision_layers": 1, "vision_heads": 2}


class Folder:
    """Stands in for the config that `make_line` reads its folder from."""

    def __init__(self, env):
        self.env = str(env)


def lines(folder, count=2, acting=(4, 1, "mean")):
    make = functools.partial(worlds.make_line, Folder(folder))
    return RolloutPool(RolloutConfig(make_env=make, acting=acting, keep=1), count)


def half_steps(sizes):
    """Half a step a tick, with the number of the query as what is kept; notes who was asked."""

    def answer(jobs, observations):
        sizes.append([job[2] for job, _ in jobs])
        kept = [Turn(([], "", ""), np.array([query])) for _, query in jobs]
        chunks = [np.full((4, 1), 0.25 * (1 + job[2] % 3), np.float32) for job, _ in jobs]
        return list(zip(chunks, kept, strict=True))

    return answer


def test_who_is_answered_together_is_a_function_of_the_jobs(tmp_path):
    jobs = [("member", "line", seed) for seed in range(7)]
    asked = []
    for _ in range(2):
        sizes, pool = [], lines(tmp_path, 3)
        try:
            played = pool.play(jobs, half_steps(sizes))
            again = pool.play(jobs, half_steps(sizes))  # the same processes once more
        finally:
            pool.close()
        asked.append(sizes)
        assert [episode.job for episode in played] == jobs == [episode.job for episode in again]
        for episode in played:  # each query once, in its order
            assert [int(turn.levels[0]) for turn in episode.turns] == [
                *range(episode.line["steps"])
            ]
    assert asked[0] == asked[1]
    assert len(asked[0]) % 2 == 0
    assert asked[0][: len(asked[0]) // 2] == asked[0][len(asked[0]) // 2 :]


@pytest.mark.parametrize("task", ["raises", "dies"])
def test_a_crash_is_tried_again_and_is_neither_success_nor_failure(tmp_path, task):
    jobs = [("member", task, seed) for seed in range(3)]
    pool = lines(tmp_path)
    try:
        played = pool.play(jobs, half_steps([]))
        assert [episode.job for episode in played] == jobs
        for episode in played:  # nothing is left of the attempt that crashed
            assert [int(turn.levels[0]) for turn in episode.turns] == [
                *range(episode.line["steps"])
            ]
        (tmp_path / "always").touch()
        (tmp_path / f"{task}-once").unlink()
        played = pool.play(jobs, half_steps([]))
        assert [episode.job for episode in played] == [jobs[0], jobs[2]]
        assert pool.attempts[jobs[1]] == ATTEMPTS
    finally:
        pool.close()


def test_a_world_that_cannot_be_made_ends_it(tmp_path):
    pool = lines(tmp_path)
    with pytest.raises(InputError, match="a known task"):
        pool.play([("member", "unknown", 0)], half_steps([]))
    assert not pool.processes


@pytest.fixture
def sides(processor):
    """A policy of one number that knows nothing yet, and worlds that want it on one side."""
    spec = make_spec(
        low=(-1.0,), high=(1.0,), cameras=("front",), state=None, chunk_size=1, bins=9, crop=1.0
    )
    pool = RolloutPool(
        RolloutConfig(
            make_env=functools.partial(worlds.make_sides, None), acting=(1, 1, "none"), keep=2
        ),
        count=2,
    )
    yield VLA0(tiny_model(processor, **SMALL, seed=1), processor, spec), pool
    pool.close()


def group_of(side, number):
    return [(f"{number}-{member}", side, 0) for member in range(8)]


def seed_of(job):
    return [int(part) for part in job[0].split("-")] + [len(job[1])]


def test_an_episode_is_a_function_of_the_model_and_its_seed(sides):
    policy, pool = sides
    answer = sampled(policy, 1.0, 1, seed_of)
    first = pool.play(group_of("left", 0), answer)
    among = pool.play([*group_of("right", 0), *group_of("left", 0)], answer)[8:]
    levels = [[int(turn.levels[0, 0]) for turn in episode.turns] for episode in first]
    assert levels == [[int(turn.levels[0, 0]) for turn in episode.turns] for episode in among]
    assert len({tuple(row) for row in levels}) > 2  # members differ
    other = pool.play(group_of("left", 1), answer)
    assert levels != [[int(turn.levels[0, 0]) for turn in episode.turns] for episode in other]


def test_queries_in_a_row_share_their_noise_and_each_is_drawn_as_alone(sides):
    policy, _ = sides
    seen = Observation({"front": np.zeros((8, 8, 3), np.uint8)}, "left")
    queries = [(("0-1", "left", 0), query) for query in range(40)]

    def levels(hold):
        answered = sampled(policy, 1.0, 1, seed_of, hold)(queries, [seen] * len(queries))
        return [int(turn.levels[0, 0]) for _, turn in answered]

    alone = levels(1)
    assert len(set(alone)) > 3
    assert levels(4) == [level for level in alone[:10] for _ in range(4)]


def test_what_succeeds_is_learned_and_the_words_decide(sides):
    """From one half to nearly always, where each of two instructions wants the other side."""
    policy, pool = sides
    learner = Learner(
        policy.model, policy.prompt, UpdateConfig(learning_rate=2e-3, batch_size=32), 1.0
    )
    answer, rates = sampled(policy, 1.0, 1, seed_of), []
    for number in range(30):
        groups = [group_of("left", number), group_of("right", number)]
        played = pool.play([job for group in groups for job in group], answer)
        rates.append(np.mean([episode.success for episode in played]))
        queries = weighed([played[:8], played[8:]], UpdateConfig())
        if queries:
            learner.learn(queries, [number])
    assert np.mean(rates[:3]) < 0.8
    assert np.mean(rates[-5:]) > 0.9, rates
    solved = pool.play([("held out", side, 0) for side in ("left", "right")], greedy(policy, 1))
    assert [episode.success for episode in solved] == [True, True]


def test_a_model_that_cannot_be_drawn_from_is_refused(sides):
    policy, _ = sides
    policy.decoder = GreedyDecoder(policy.model, policy.prompt)
    with pytest.raises(InputError, match="a model that vla0's engine runs"):
        sampled(policy, 1.0, 1, seed_of)


def test_no_process_is_left(tmp_path):
    pool = lines(tmp_path)
    pool.play([("member", "line", 0)], half_steps([]))
    (process,) = list(pool.processes.values())[:1]
    pool.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
