"""What a server remembers of one client."""

from dataclasses import dataclass, field, replace

import numpy as np

from vla0.ensemble import TemporalEnsemble
from vla0.rollout import rest
from vla0.spec import Observation


@dataclass
class Session:
    """What one client's connection remembers. Nobody else's chunks ever come here."""

    ensemble: TemporalEnsemble | None
    replan: int
    fps: float
    step: int = 0
    chunk: np.ndarray | None = None
    asked_at: float = 0.0
    arrivals: list[float] = field(default_factory=list)

    def reset(self) -> None:
        """A new episode: forgets all chunks."""
        self.step, self.chunk = 0, None
        if self.ensemble is not None:
            self.ensemble.reset()

    def expecting(self, observation: Observation, now: float) -> Observation:
        """The observation with what the last chunk said of it, which decodes faster and changes nothing."""
        if self.chunk is None:
            return observation
        steps = self.replan if self.ensemble is not None else round((now - self.asked_at) * self.fps)
        return replace(observation, expected=rest(self.chunk, max(1, steps)))

    def answer(self, chunk: np.ndarray, now: float) -> np.ndarray:
        """(T, D): what is sent of a chunk."""
        self.chunk, self.asked_at = chunk, now
        if self.ensemble is None:
            return chunk
        self.ensemble.add(chunk, self.step)
        actions = np.stack([self.ensemble.action(self.step + ahead) for ahead in range(self.replan)])
        self.step += self.replan
        return actions
