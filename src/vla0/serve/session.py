"""The state that a server keeps for one client."""

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

LATELY_S = 1.0  # time constant, in seconds, with which a client's use of the model is forgotten
# seconds without an observation after which old chunks are not averaged with new ones
PAUSE_S = 10.0


@dataclass(eq=False, kw_only=True)
class ClientSession:
    """The state of one client's connection; the chunks of other clients never enter it.

    All times are monotonic seconds.
    """

    ensemble: TemporalEnsemble | None  # None: whole chunks are sent
    n_action_steps: int  # steps that an answer has with an ensemble
    fps: float  # control rate of the checkpoint, Hz
    step: int = 0  # of the episode, of the next answer's first action
    chunk: np.ndarray | None = None  # (T, D), the last
    asked_at: float = 0.0  # when the observation of that chunk arrived
    arrivals: list[float] = field(default_factory=list)  # of the messages in the last second
    heard_at: float = 0.0  # when the last message arrived
    free_at: float = 0.0  # the next message is not read before
    used: float = 0.0  # seconds of the model's time used lately, as of `used_at`
    used_at: float = 0.0
    resets: bool = False  # whether the client says where episodes begin

    def begin(self, reset: bool | None, now: float) -> None:
        """Forget all chunks if an episode begins with this observation, or after a pause.

        Args:
            reset: Whether the client says that an episode begins; None if it does not say.
            now: When the observation arrived, monotonic seconds.

        Raises:
            InputError: There is an ensemble and the client never says where an episode begins, so
                its next episode would be averaged with this one.
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
        """Return the seconds that the model worked for this client lately.

        Seconds of long ago are forgotten exponentially, with the time constant `LATELY_S`.
        """
        return self.used * math.exp((self.used_at - now) / LATELY_S)

    def charge(self, seconds: float) -> None:
        """Delay the client's next message by some seconds."""
        self.free_at = max(self.free_at, time.monotonic()) + seconds

    def reset(self) -> None:
        """Begin a new episode: forget all chunks."""
        self.step, self.chunk = 0, None
        if self.ensemble is not None:
            self.ensemble.reset()

    def expecting(self, observation: Observation, now: float) -> Observation:
        """Add the last chunk's prediction to an observation, as a draft of the next chunk.

        The draft makes decoding faster and does not change its result.

        Args:
            observation: The observation.
            now: When it arrived, monotonic seconds.

        Returns:
            The observation with `draft_actions`; without a last chunk the observation itself.
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
        """Return the actions to send for a chunk.

        Args:
            chunk: (T, D), the chunk that the model decoded.
            now: When its observation arrived, monotonic seconds.

        Returns:
            The chunk; with an ensemble the averaged actions (n_action_steps, D).
        """
        self.chunk, self.asked_at = chunk, now
        if self.ensemble is None:
            return chunk
        self.ensemble.add(chunk, self.step)
        actions = np.stack(
            [self.ensemble.action(self.step + ahead) for ahead in range(self.n_action_steps)]
        )
        self.step += self.n_action_steps
        return actions
