"""Worlds for the tests of evaluation: small enough to reason about, in processes of their own."""

import os
from pathlib import Path

import numpy as np

from vla0 import InputError, Observation


class Line:
    """Done when the place, which the actions move, passes 3. The task's name says what goes wrong."""

    fps, max_steps = 20.0, 8

    def __init__(self, task: str, folder: Path):
        self.task, self.folder = task, folder
        if task == "unknown":
            raise InputError("a known task", "'unknown'", "choose another")

    def reset(self, seed):
        self.place, self.seed = 0.0, seed
        return self._observe()

    def step(self, action):
        self.place += float(action[0])
        if self.place > 1 and self.seed == 1 and self._goes_wrong():
            if self.task == "raises":
                raise RuntimeError("the simulator is broken\nbadly")
            if self.task == "dies":
                os._exit(7)
        return self._observe(), self.place > 3

    def close(self):
        pass

    def _goes_wrong(self) -> bool:
        """Once, or always, as the file says."""
        flag = self.folder / f"{self.task}-once"
        if flag.exists():
            return False
        if not (self.folder / "always").exists():
            flag.touch()
        return True

    def _observe(self):
        frame = np.full((16, 16, 3), int(min(self.place, 3) * 60), np.uint8)
        return Observation({"front": frame}, self.task, np.array([self.place]))


def make_line(config, task):
    """The world of a task; `config.env` holds the folder of its flags."""
    return Line(task, Path(config.env))


def walk(observations):
    """Half a step a tick: solves in seven."""
    return np.full((len(observations), 4, 1), 0.5, np.float32)


def load_walk():
    """Policies as the machines of a cluster load them."""
    return {"policy": walk}


def load_broken():
    def predict(observations):
        raise InputError("a policy", "a broken one", "mend it")

    return {"policy": predict}


def load_absent():
    raise InputError("a checkpoint", "none", "copy it")
