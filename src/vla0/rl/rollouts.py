"""Play groups of episodes at random from the same initial states, and keep what was written."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from vla0.core.codec import Grammar
from vla0.core.prompt import Seen
from vla0.core.spec import Observation
from vla0.decode.sampling import Sampling, noise_for
from vla0.decode.speculative import SpeculativeDecoder
from vla0.errors import InputError
from vla0.policy import VLA0
from vla0.sim.workers import IDLE_S, Job, RolloutConfig, WorkerPool


@dataclass(frozen=True)
class Turn:
    """One query of an episode.

    Args:
        seen: What the model saw.
        levels: (n, D) what it wrote.
    """

    seen: Seen
    levels: np.ndarray


@dataclass
class Played:
    """An episode that has ended.

    Args:
        job: The name of its member, the task and the seed.
        line: Its line of episodes.jsonl.
        turns: What was seen and written.
    """

    job: Job
    line: dict[str, Any]
    turns: list[Turn] = field(default_factory=list)

    @property
    def success(self) -> bool:
        """Whether the task was solved."""
        return bool(self.line["success"])


# Answers a batch: the jobs with the number of queries that each has had, and what they see → for
# each, a chunk (H, D) and what is kept of it.
Answer = Callable[
    [Sequence[tuple[Job, int]], Sequence[Observation]], Sequence[tuple[np.ndarray, Turn | None]]
]


class RolloutPool(WorkerPool):
    """Worlds that stay between rounds, and are answered in an order that no clock decides.

    Which episodes are decoded together changes the last bits of their probabilities. Here that is a
    function of the jobs alone, so that a run that resumes ends as one that was not interrupted: all
    worlds are waited for. One that begins an episode has the time of a decode to reset.

    Args:
        rollout: How the processes roll out episodes.
        count: Number of processes.
    """

    def __init__(self, rollout: RolloutConfig, count: int):
        super().__init__({}, rollout, None, count)
        self.turns: dict[Job, list[Turn]] = {}
        self.answer: Answer
        self.seconds = 0.0  # that decoding took in the last `play`

    def play(self, jobs: Iterable[Job], answer: Answer) -> list[Played]:
        """Play episodes to their ends.

        Args:
            jobs: The name of the member, the task and the seed of each. No two are the same.
            answer: Gives the chunks.

        Returns:
            The episodes, in the order of the jobs. Those that were given up after crashes of the
            simulator are missing; the log names them.

        Raises:
            InputError: When a world cannot be made.
        """
        self.answer, self.turns, self.attempts, self.seconds = answer, {}, {}, 0.0
        order = list(jobs)
        ended: dict[Job, Played] = {}

        def record(line: dict[str, Any]) -> None:
            job = (line["policy"], line["task"], line["seed"])
            turns = self.turns.pop(job)
            if line["error"] is None:
                ended[job] = Played(job, line, turns)

        try:
            self.run(deque(order), record)
        except BaseException:
            self.close()
            raise
        return [ended[job] for job in order if job in ended]

    def run(self, jobs: deque[Job], record: Callable[[dict[str, Any]], None]) -> None:
        """Work through the jobs, and leave the processes for the next call."""
        while len(self.processes) < min(self.count, len(jobs)):
            self._spawn()
        while jobs or self.busy:
            while missing := [pipe for pipe in self.busy if pipe not in self.asking]:
                for pipe in wait(missing, timeout=IDLE_S):
                    self._receive(pipe, jobs, record)  # type: ignore[arg-type]
                self._drop_silent(jobs, record)
            asking, self.asking = self.asking, {}
            for pipe in [pipe for pipe in self.processes if pipe not in self.busy]:
                if jobs:
                    self._assign(pipe, jobs.popleft(), jobs, record)
            if asking:
                self._reply([pipe for pipe in self.processes if pipe in asking], asking)

    def close(self) -> None:
        """End the processes."""
        super().close()
        self.busy, self.asking = {}, {}

    def _assign(self, pipe, job, jobs, record) -> None:
        self.turns[job] = []
        super()._assign(pipe, job, jobs, record)

    def _reply(self, pipes: Sequence[Connection], asking: Mapping[Connection, Observation]) -> None:
        """Decode one batch, and send the chunks."""
        jobs, started = [self.busy[pipe][0] for pipe in pipes], time.monotonic()
        counted = [(job, len(self.turns[job])) for job in jobs]
        answers = self.answer(counted, [asking[pipe] for pipe in pipes])
        self.seconds += time.monotonic() - started
        for pipe, job, (chunk, turn) in zip(pipes, jobs, answers, strict=True):
            if turn is not None:
                self.turns[job].append(turn)
            with suppress(OSError):  # the process has died; `wait` reports it
                pipe.send(chunk)
        self._all_heard()


def drawing(policy: VLA0) -> SpeculativeDecoder:
    """Return the decoder that draws, or raise InputError where the model has none."""
    if not isinstance(policy.decoder, SpeculativeDecoder):
        got = type(policy.model).__name__
        raise InputError("a model that vla0's engine runs", got, "take another (docs/models.md)")
    return policy.decoder


def sampled(
    policy: VLA0,
    temperature: float,
    num_steps: int,
    seed_of: Callable[[Job], Sequence[int]],
    noise_hold: int = 1,
) -> Answer:
    """Return what draws chunks at random, each a function of model, episode and step.

    Args:
        policy: Whose probabilities count.
        temperature: Divides the log-probabilities.
        num_steps: Steps that are written, as many as are used.
        seed_of: The seed of all that is drawn in an episode.
        noise_hold: Queries in a row that are drawn with the same noise. Each chunk is drawn from
            the model's probabilities all the same, but those of a row stray to the same side.

    Raises:
        InputError: When the model has no decoder that draws.
    """
    decoder = drawing(policy)
    grammar = Grammar(policy.spec.bins, policy.spec.numbers)

    def answer(jobs, observations):
        seeds = [[*seed_of(job), query // noise_hold] for job, query in jobs]
        noise = [noise_for(grammar, np.random.default_rng(seed)) for seed in seeds]
        seen = [policy.prompt.see(observation) for observation in observations]
        *_, levels = decoder.stream(
            policy.prompt.gather(seen),
            num_steps,
            [policy.guess(observation) for observation in observations],
            sampling=Sampling(temperature, noise),
        )
        return [
            (policy.actions(row, observation), Turn(look, row))
            for row, observation, look in zip(levels, observations, seen, strict=True)
        ]

    return answer


def greedy(policy: VLA0, num_steps: int) -> Answer:
    """Return what writes the likeliest chunks, of which nothing is kept."""

    def answer(jobs, observations):
        return [(chunk, None) for chunk in policy.predict_batch(observations, num_steps)]

    return answer
