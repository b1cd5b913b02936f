"""The one loop that simulator and robot share, and what it asks of a world and of a policy."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from vla0.core.ensemble import TemporalEnsemble
from vla0.core.relative import Turns
from vla0.core.spec import Episode, Observation
from vla0.errors import InputError


class Env(Protocol):
    """A world that can be acted in: simulator or robot."""

    fps: float
    max_steps: int

    def reset(self, seed: int) -> Observation:
        """Starts the episode that the seed names."""
        ...

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        """Executes an action (D,) for one tick: what is seen then, and whether the task is done."""
        ...

    def close(self) -> None:
        """Gives back what the world holds."""
        ...


class Policy(Protocol):
    """Whatever decides: the model, a scripted expert, a remote one."""

    def reset(self) -> None:
        """Forgets the episode."""
        ...

    def act(self, observation: Observation) -> np.ndarray:
        """The action (D,) for this instant."""
        ...


class ChunkPolicy:
    """A Policy out of `predict`: asks for a chunk every `n_action_steps` steps and executes the
    ensemble of all it has.
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
        """Forgets the episode."""
        self.ensemble.reset()
        self.step = 0
        self.chunks: list[tuple[int, np.ndarray]] = []

    @property
    def looked(self) -> bool:
        """Whether the last action came with a query: whether its observation's pictures were looked
        at.
        """
        return self.step % self.n_action_steps == 1 % self.n_action_steps

    def act(self, observation: Observation) -> np.ndarray:
        """The action (D,) for this instant."""
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
    """(n, D): what a chunk says of the steps after the `n_action_steps` that were executed; its end
    where it says nothing.
    """
    return chunk[min(n_action_steps, len(chunk) - 1) :]


def rollout(
    env: Env,
    policy: Policy,
    seed: int,
    on_step: Callable[[Observation, np.ndarray], None] = lambda observation, action: None,
) -> Episode:
    """One episode: until the task is done or `env.max_steps` have passed.

    on_step sees each observation with the action (D,) that answered it. An action that is not
    finite is an error, and so is any exception of the world or the policy: they rise to the caller
    and never count as a failed episode.
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
