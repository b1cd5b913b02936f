"""Play the groups of a round, and the held-out episodes."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vla0.core.ensemble import steps_used
from vla0.errors import InputError
from vla0.policy import VLA0
from vla0.rl import processes
from vla0.rl.config import IMITATION, RLConfig
from vla0.rl.rollouts import Played, RolloutPool, drawing, greedy, sampled
from vla0.rl.update import memory
from vla0.sim.evaluate import EvalConfig
from vla0.sim.workers import Job


@dataclass
class Round:
    """What was played in a round.

    Args:
        own: This process's groups from which something is learned.
        useful: How many such groups there are in all processes.
        lines: Lines of episodes.jsonl of all episodes in all processes, of the other groups too.
        groups: How many groups were played in all processes.
        seconds: {"play_s": until the last episode had ended, "decode_s": of that, the model's}.
    """

    own: list[list[Played]] = field(default_factory=list)
    useful: int = 0
    lines: list[dict[str, Any]] = field(default_factory=list)
    groups: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"play_s": 0.0, "decode_s": 0.0})


# Of each task: episodes that succeeded and all, of the rounds before; those long ago count less.
Tried = Mapping[str, Sequence[float]]
LEAST = 0.05  # of a task's weight, where an even chance has 0.25: what is solved must stay solved


def remembered(tried: Tried, lines: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return what was tried up to and with a round, whose lines of episodes.jsonl these are."""
    counts = {task: [solved / 2, total / 2] for task, (solved, total) in tried.items()}
    for line in lines:
        count = counts.setdefault(line["task"], [0.0, 0.0])
        count[0] += bool(line["success"])
        count[1] += 1
    return counts


def shares(tasks: Sequence[str], tried: Tried) -> np.ndarray:
    """Return which share of the initial states each task gets.

    Groups differ where success is uncertain: a task's weight is the variance of its success.

    Args:
        tasks: The tasks.
        tried: How they went so far. A task that was not tried counts as an even chance.
    """
    rates = np.array(
        [(solved + 1) / (total + 2) for solved, total in (tried.get(t, (0, 0)) for t in tasks)]
    )
    weights = np.maximum(rates * (1 - rates), LEAST)
    return weights / weights.sum()


class Player:
    """Plays what a config says.

    Args:
        config: The config of the run.
        settings: How to act; with the seeds of the held-out episodes.
        seeds: The simulator's seeds of initial states that rounds may have.
        policy: The policy.
        pool: The worlds.
    """

    def __init__(
        self, config: RLConfig, settings: EvalConfig, seeds: range, policy: VLA0, pool: RolloutPool
    ):
        self.config, self.settings, self.seeds = config, settings, seeds
        self.policy, self.pool = policy, pool
        self.imitates = config.update.method == IMITATION
        self.heavy = pool.rollout.keep < len(settings.tasks)  # not all worlds of a process stay
        chunk_size = policy.spec.chunk_size
        self.steps = steps_used(chunk_size, settings.n_action_steps, settings.ensemble)
        held_out = settings.first_seed or 0
        if seeds.start < held_out + settings.episodes and held_out < seeds.stop:
            expected = f"held-out seeds beside those of rounds, {seeds.start}..{seeds.stop - 1}"
            got = f"{held_out}..{held_out + settings.episodes - 1}"
            raise InputError(expected, got, "leave simulator.first_seed out, or change it")
        first = config.rollouts.first_seed
        self.first = seeds[len(seeds) // 2] if first is None else first
        if self.first not in seeds:
            expected = f"rollouts.first_seed in {seeds.start}..{seeds.stop - 1}"
            raise InputError(expected, f"{first}", "the others are those of evaluations")

    def measure(self) -> dict[str, float]:
        """Act greedily at held-out seeds.

        Returns:
            The mean "success" of the tasks, that of each where there are several, and "episodes".

        Raises:
            InputError: When episodes were given up after crashes.
        """
        first, settings = self.settings.first_seed or 0, self.settings
        jobs = [
            ("held out", task, seed)
            for seed in range(first, first + settings.episodes)
            for task in settings.tasks
        ]
        if self.heavy:
            jobs.sort(key=lambda job: settings.tasks.index(job[1]))
        rank, count = processes.joined()
        if self.heavy:  # neighbours share a world
            size = -(-len(jobs) // count)
            own_jobs = jobs[rank * size : (rank + 1) * size]
        else:
            own_jobs = jobs[rank::count]
        with self._memory():
            drawing(self.policy).forget()
            played = self.pool.play(own_jobs, greedy(self.policy, self.steps))
        ended = [
            (episode.job[1], episode.success)
            for own in processes.gathered(played)
            for episode in own
        ]
        if len(ended) < len(jobs):
            got = f"{len(jobs) - len(ended)} given up after crashes"
            raise InputError("every episode to end", got, "see the log")
        rates = {
            name: float(np.mean([success for task, success in ended if task == name]))
            for name in settings.tasks
        }
        mean = float(np.mean(list(rates.values())))
        each = {f"success/{task}": rate for task, rate in rates.items()} if len(rates) > 1 else {}
        return {"success": mean, "episodes": float(len(ended)), **each}

    def play(self, number: int, start: int, tried: Tried) -> Round:
        """Play groups until enough of them are useful, or enough initial states were tried.

        GRPO learns from groups whose episodes differ in success, imitation from all successes.

        Args:
            number: The number of the round.
            start: How many initial states the rounds before have used.
            tried: How the tasks went in them.
        """
        rollouts, result = self.config.rollouts, Round()
        drawing(self.policy).forget()  # or the last bits would depend on the rounds before
        answer = sampled(
            self.policy,
            rollouts.temperature,
            self.steps,
            lambda job: self._seed(number, job),
            rollouts.noise_hold,
        )
        rank, count = processes.joined()
        for _ in range(rollouts.waves):
            missing = rollouts.groups - result.useful
            if missing <= 0:
                break
            first = start + result.groups
            # In the tasks' order, so that a process builds a heavy world once for several groups
            tasks = self._tasks(first, missing, remembered(tried, result.lines))
            groups = [self._group(number, first + place, task) for place, task in enumerate(tasks)]
            own = groups[rank::count]
            started = time.monotonic()
            with self._memory():
                played = self.pool.play([job for group in own for job in group], answer)
            result.seconds["play_s"] += time.monotonic() - started
            result.seconds["decode_s"] += self.pool.seconds
            by_job = {episode.job: episode for episode in played}
            useful = 0
            for group in own:
                ended = [by_job[job] for job in group if job in by_job]
                solved = [episode for episode in ended if episode.success]
                compared = ended if 0 < len(solved) < len(ended) else []
                learned = solved if self.imitates else compared
                if learned:
                    result.own.append(ended)
                    useful += 1
                for episode in ended:  # what is not learned takes memory
                    if not learned or (self.imitates and not episode.success):
                        episode.turns.clear()
            told = processes.gathered((useful, [episode.line for episode in played]))
            for others, lines in told:
                result.useful += others
                result.lines += lines
            result.groups += len(groups)
        return result

    def _memory(self) -> Any:
        """Explain a lack of memory while episodes are played."""
        remedy = "rollouts.workers=16 or fewer: as many chunks are decoded together"
        return memory(f"{self.pool.count} worlds at once", remedy)

    def _tasks(self, start: int, count: int, tried: Tried) -> list[str]:
        """Return the tasks of a wave's groups, each as often as its share, rounded by chance."""
        ends = np.cumsum(shares(self.settings.tasks, tried))
        offset = np.random.default_rng([self.config.seed, start]).random()
        places = np.searchsorted(ends[:-1], (np.arange(count) + offset) / count, side="right")
        return [self.settings.tasks[place] for place in places]

    def _group(self, number: int, start: int, task: str) -> list[Job]:
        """Return the jobs of a group: the same task and initial state for all its members."""
        seeds = self.seeds
        seed = seeds.start + (self.first - seeds.start + start) % len(seeds)
        return [
            (f"round-{number}-start-{start}-member-{member}", task, seed)
            for member in range(self.config.rollouts.group_size)
        ]

    def _seed(self, number: int, job: Job) -> Sequence[int]:
        """Return the seed of what is drawn in an episode."""
        name, task, seed = job
        start, member = (int(name.split("-")[place]) for place in (3, 5))
        return [
            self.config.seed, number, start, member, self.settings.tasks.index(task), seed
        ]  # fmt: skip
