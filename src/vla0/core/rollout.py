"""The loop that simulators and robots share, and its protocols for a world and a policy."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from vla0.core.ensemble import TemporalEnsemble
from vla0.core.relative import Turns
from vla0.core.spec import Episode, Observation
from vla0.errors import InputError


class Env(Protocol):
    """A world in which a policy acts: a simulator or a robot.

    The pictures of an observation may be looked at until the next step, no longer.
    """

    fps: float
    max_steps: int

    def reset(self, seed: int) -> Observation:
        """Start the episode with this seed and return its first observation."""
        ...

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        """Execute a (D,) action for a tick; return the observation and whether the task is done."""
        ...

    def close(self) -> None:
        """Release what the world holds."""
        ...


class Policy(Protocol):
    """Chooses actions: the model, a scripted expert or a remote policy."""

    def reset(self) -> None:
        """Forget the episode."""
        ...

    def act(self, observation: Observation) -> np.ndarray:
        """Return the (D,) action for the present step."""
        ...


class ChunkPolicy:
    """A Policy that calls `predict` every `n_action_steps` steps and averages its chunks.

    `TemporalEnsemble` describes the arguments after the first.

    Args:
        predict: Returns an (H, D) chunk for an observation.
    """

    def __init__(
        self,
        predict: Callable[[Observation], np.ndarray],
        chunk_size: int,
        n_action_steps: int = 1,
        weights: str | Sequence[float] = "v1",
        k: int | None = None,
        periodic: Turns | None = None,
    ):
        self.predict, self.n_action_steps = predict, n_action_steps
        self.ensemble = TemporalEnsemble(chunk_size, n_action_steps, weights, k, periodic)
        self.reset()

    def reset(self) -> None:
        """Forget the episode."""
        self.ensemble.reset()
        self.step = 0
        self.chunks: list[tuple[int, np.ndarray]] = []

    @property
    def looked(self) -> bool:
        """Whether the last action came with a query, so that its observation's images were used."""
        return self.step % self.n_action_steps == 1 % self.n_action_steps

    def act(self, observation: Observation) -> np.ndarray:
        """Return the (D,) action for the present step and advance by one step."""
        if self.step % self.n_action_steps == 0:
            if self.chunks:
                observation = replace(
                    observation, draft_actions=rest(self.chunks[-1][1], self.n_action_steps)
                )
            chunk = self.predict(observation)
            self.ensemble.add(chunk, self.step)
            self.chunks.append((self.step, chunk))
        action = self.ensemble.action(self.step)
        self.step += 1
        return action


def rest(chunk: np.ndarray, n_action_steps: int) -> np.ndarray:
    """Return the (n, D) rows of a chunk after its executed steps, at least its last row."""
    return chunk[min(n_action_steps, len(chunk) - 1) :]


def rollout(
    env: Env,
    policy: Policy,
    seed: int,
    on_step: Callable[[Observation, np.ndarray], None] = lambda observation, action: None,
) -> Episode:
    """Run one episode until the task is done or `env.max_steps` have passed.

    Errors of the world or the policy reach the caller and never count as a failed episode.

    Args:
        env: The world.
        policy: The policy, which is reset first.
        seed: Seed of the episode.
        on_step: Called with each observation and the (D,) action that answered it.

    Raises:
        InputError: When the policy returns an action that is not finite.
    """
    policy.reset()
    observation, actions, success = env.reset(seed), [], False
    while not success and len(actions) < env.max_steps:
        action = np.asarray(policy.act(observation), np.float32)
        if action.ndim != 1 or not np.isfinite(action).all():
            raise InputError(
                "a finite action (D,)", f"{action}", "the policy is broken: nothing was executed"
            )
        on_step(observation, action)
        actions.append(action)
        observation, success = env.step(action)
    return Episode(seed, success, np.stack(actions), tuple(getattr(policy, "chunks", ())))
