"""Worlds for the tests of evaluation: small enough to reason about, in processes of their own."""

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from vla0 import InputError, Observation, Spec


def looked_at(observation: Observation) -> Observation:
    """An observation whose pictures are drawn, and stay."""
    return replace(observation, images=dict(observation.images))


class Line:
    """Done when the place, which the actions move, passes 3.

    The task's name says what goes wrong.
    """

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


JOINTS = tuple(
    f"{joint}.pos"
    for joint in (
        "shoulder_pan",
        "shoulder_lift",
        "elbow_flex",
        "wrist_flex",
        "wrist_roll",
        "gripper",
    )
)


def arm_spec(**changes) -> Spec:
    """Of a policy for the simulated arm."""
    fields = {
        "low": (-90.0, -60.0, -60.0, -60.0, -90.0, 0.0),
        "high": (90.0, 60.0, 60.0, 60.0, 90.0, 100.0),
        "fps": 20.0,
        "cameras": ("front", "wrist"),
        "base_model": "none",
        "image_size": 56,
        "state": ((-180.0,) * 6, (180.0,) * 6),
        "action_names": JOINTS,
        "state_names": JOINTS,
        "max_step_change": (6.0, 6.0, 6.0, 6.0, 6.0, 20.0),
    }
    return Spec(**{**fields, **changes})


class Reach:
    """What `vla0 serve` needs of a policy: moves the simulated arm to a goal, four degrees a step,
    after a while.
    """

    def __init__(
        self,
        spec: Spec | None = None,
        latency_s=lambda query: 0.0,
        goal=(40.0, 20.0, -20.0, 30.0, 0.0, 30.0),
        wild: float = 0.0,
    ):
        self.spec, self.latency_s, self.goal, self.wild, self.queries = (
            spec or arm_spec(),
            latency_s,
            np.array(goal),
            wild,
            0,
        )

    def predict_batch(self, observations, steps=None):
        time.sleep(self.latency_s(self.queries))
        self.queries += 1
        return np.stack([self.chunk(observation) for observation in observations])

    def predict_stream(self, observation, steps=None):
        yield from self.chunk(observation)

    def chunk(self, observation):
        begun = np.zeros((0, 6)) if observation.action_prefix is None else observation.action_prefix
        place, chunk = begun[-1] if len(begun) else observation.state, list(begun)
        while len(chunk) < self.spec.chunk_size:
            place = place + np.clip(self.goal - place, -4, 4)
            chunk.append(
                place + self.wild * np.random.default_rng(len(chunk) + self.queries).normal(size=6)
            )
        return np.array(chunk, np.float32)


class Sides:
    """Done at once when the first action goes to the side that the instruction names.

    "always" and "never" name none.
    """

    fps, max_steps = 20.0, 1

    def __init__(self, side: str):
        self.side = side

    def reset(self, seed):
        return self._observe()

    def step(self, action):
        right = {"right": True, "left": False}.get(self.side)
        return self._observe(), self.side == "always" or bool(action[0] > 0) == right

    def close(self):
        pass

    def _observe(self):
        return Observation({"front": np.zeros((56, 56, 3), np.uint8)}, f"push {self.side}")


def make_sides(config, side):
    return Sides(side)
