"""What a server remembers of one client."""

import logging
import math
import time
from dataclasses import dataclass, field, replace

import numpy as np

from vla0.core.ensemble import TemporalEnsemble
from vla0.core.rollout import rest
from vla0.core.spec import Observation
from vla0.errors import InputError

logger = logging.getLogger(__name__)

LATELY_S = 1.0  # how long it is remembered who made the model work
# without a question, after which what was predicted before is not averaged with what comes
PAUSE_S = 10.0


@dataclass(eq=False, kw_only=True)
class ClientSession:
    """What one client's connection remembers. Nobody else's chunks ever come here."""

    ensemble: TemporalEnsemble | None
    n_action_steps: int
    fps: float
    step: int = 0
    chunk: np.ndarray | None = None
    asked_at: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    heard_at: float = 0.0  # monotonic seconds, of its last message
    free_at: float = 0.0  # before which its next is not read
    used: float = 0.0  # seconds of the model's, lately, at `used_at`
    used_at: float = 0.0
    resets: bool = False  # whether the client says where episodes begin

    def begin(self, reset: bool | None, now: float) -> None:
        """Before an observation: forgets all chunks where an episode begins, or after a pause.

        reset: what the client says.

        Raises InputError for an ensemble and a client that never says it: its next episode would be
        averaged with this one.
        """
        self.resets |= reset is not None
        if self.ensemble is not None and not self.resets:
            remedy = (
                "send it with each observation, true at an episode's first; or serve "
                "without --ensemble: whole chunks"
            )
            raise InputError(
                "'vla0/reset', which says where an episode begins: the ensemble ends there",
                "none",
                remedy,
            )
        if self.ensemble is not None and self.chunk is not None and now - self.asked_at > PAUSE_S:
            logger.info(
                "a client was silent for %.0f s: what was predicted before is forgotten",
                now - self.asked_at,
            )
            reset = True
        if reset:
            self.reset()

    def lately(self, now: float) -> float:
        """Seconds that the model worked for it, those of long ago forgotten."""
        return self.used * math.exp((self.used_at - now) / LATELY_S)

    def charge(self, seconds: float) -> None:
        """For what it has made others wait, it waits itself."""
        self.free_at = max(self.free_at, time.monotonic()) + seconds

    def reset(self) -> None:
        """A new episode: forgets all chunks."""
        self.step, self.chunk = 0, None
        if self.ensemble is not None:
            self.ensemble.reset()

    def expecting(self, observation: Observation, now: float) -> Observation:
        """The observation with what the last chunk said of it, which decodes faster and changes
        nothing.
        """
        if self.chunk is None:
            return observation
        steps = (
            self.n_action_steps
            if self.ensemble is not None
            else round((now - self.asked_at) * self.fps)
        )
        return replace(observation, draft_actions=rest(self.chunk, max(1, steps)))

    def answer(self, chunk: np.ndarray, now: float) -> np.ndarray:
        """(T, D): what is sent of a chunk."""
        self.chunk, self.asked_at = chunk, now
        if self.ensemble is None:
            return chunk
        self.ensemble.add(chunk, self.step)
        actions = np.stack(
            [self.ensemble.action(self.step + ahead) for ahead in range(self.n_action_steps)]
        )
        self.step += self.n_action_steps
        return actions
