"""A desk arm on MuJoCo as an Env, and its expert: the world of `vla0 robot --robot sim`, here in
simulated time.

Six joints with the names, the order and the units of an SO-101 (degrees; the gripper 0 to 100),
position servos, two cameras, a cube and a mark on a table. Actions are absolute joint positions, as
LeRobot's desk arms take them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

import mujoco
import numpy as np

from vla0.core.spec import Observation
from vla0.errors import InputError, nearest
from vla0.sim.simulator import refuse_suite, renderer

mujoco: Any  # its names come from a binary

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
# as commanded
RANGES = (
    (-110.0, 110.0),
    (-100.0, 100.0),
    (-97.0, 97.0),
    (-95.0, 95.0),
    (-157.0, 157.0),
    (0.0, 100.0),
)
# ours → key in a dataset
CAMERAS = {"front": "observation.images.front", "wrist": "observation.images.wrist"}
SWITCHES = ()  # actions of which only the sign counts
ACTIONS = STATES = tuple(f"{joint}.pos" for joint in JOINTS)
IMAGE_SIZE = 112
FPS = 10.0
STEPS = 40  # after which an episode has failed
SEEDS = range(10_000)  # of demonstrations
FIRST_SEED = 10_000  # of an evaluation: what is tested was never seen
EVALUATION_SEEDS = range(FIRST_SEED, 2**31)
NOISE = (0.3, 3.0)  # share of a demonstration's steps that are disturbed, and how much, degrees
TASKS = {"touch-cube": "touch the red cube", "touch-mark": "touch the blue mark"}
UP = np.array([0.0, 0.0, 1.0])
NEAR = 0.025  # m from the fingertips to what they touch
OPEN = math.radians(100)  # of the jaw at 100
# m: its height; lengths, the last to between the fingertips
SHOULDER, UPPER, FOREARM, HAND = 0.12, 0.12, 0.13, 0.13
WORLD = """
<mujoco>
  <option timestep="0.004" integrator="implicitfast"/>
  <visual><global offwidth="1280" offheight="960"/><quality shadowsize="0" offsamples="0"/></visual>
  <default>
    <joint damping="0.6" armature="0.03"/>
    <geom rgba="0.95 0.75 0.2 1" friction="1.2"/>
    <position kp="80" kv="4" forcerange="-12 12"/>
  </default>
  <worldbody>
    <light pos="0.2 -0.3 1.2" dir="-0.1 0.2 -1"/>
    <geom type="plane" size="1 1 0.1" rgba="0.55 0.6 0.65 1"/>
    <body name="cube" pos="0.22 0.06 0.02">
      <freejoint/><geom type="box" size="0.02 0.02 0.02" mass="0.05" rgba="0.85 0.15 0.15 1"/>
    </body>
    <body name="mark" mocap="true" pos="0.2 -0.12 0.001">
      <geom type="cylinder" size="0.03 0.001" rgba="0.1 0.4 0.8 1" contype="0" conaffinity="0"/>
    </body>
    <camera name="front" pos="0.7 0 0.45" xyaxes="0 1 0 -0.59 0 0.81" fovy="34"/>
    <body pos="0 0 0.06">
      <joint name="shoulder_pan" axis="0 0 -1"/><geom type="cylinder" size="0.035 0.05" mass="0.3"/>
      <body pos="0 0 0.06">
        <joint name="shoulder_lift" axis="0 1 0"/><geom type="capsule" fromto="0 0 0 0 0 0.12" size="0.018" mass="0.2"/>
        <body pos="0 0 0.12" euler="0 90 0">
          <joint name="elbow_flex" axis="0 1 0"/><geom type="capsule" fromto="0 0 0 0 0 0.13" size="0.016" mass="0.15"/>
          <body pos="0 0 0.13" euler="0 45 0">
            <joint name="wrist_flex" axis="0 1 0"/><geom type="capsule" fromto="0 0 0 0 0 0.05" size="0.014" mass="0.08"/>
            <body pos="0 0 0.05">
              <joint name="wrist_roll" axis="0 0 1"/><geom type="box" size="0.02 0.03 0.015" mass="0.05"/>
              <camera name="wrist" pos="0.06 0 0" xyaxes="0 1 0 1 0 0.35" fovy="70"/>
              <site name="tip" pos="0 0 0.08" rgba="0 0 0 0"/>
              <geom type="box" pos="0 0.02 0.05" size="0.01 0.004 0.04" mass="0.02"/>
              <body pos="0 -0.02 0.015">
                <joint name="gripper" axis="1 0 0"/><geom type="box" pos="0 0 0.035" size="0.01 0.004 0.04" mass="0.02"/>
              </body>
            </body>
          </body>
        </body>
      </body>
    </body>
  </worldbody>
  <actuator>
    <position joint="shoulder_pan"/><position joint="shoulder_lift"/><position joint="elbow_flex"/>
    <position joint="wrist_flex"/><position joint="wrist_roll"/><position joint="gripper" kp="6" kv="0.5"/>
  </actuator>
</mujoco>
"""  # noqa: E501


@cache
def provenance() -> dict[str, str]:
    """The versions that a result depends on."""
    return {"mujoco": metadata.version("mujoco")}


def check_task(task: str) -> None:
    """Raises InputError for an unknown task."""
    if task not in TASKS:
        raise InputError(f"a task of {tuple(TASKS)}", f"'{task}'", nearest(task, TASKS))


def instruction(task: str) -> str:
    """The instruction of a task."""
    check_task(task)
    return TASKS[task]


def within(goal: np.ndarray) -> np.ndarray:
    """Joint positions (6,), clipped to what the servos can do."""
    return np.clip(goal, *np.array(RANGES).T)


class ArmPhysics:
    """Arm, table and what lies on it. Joints in degrees, places in metres."""

    def __init__(self, height: int, width: int):
        self.model = mujoco.MjModel.from_xml_string(WORLD)
        self.data = mujoco.MjData(self.model)
        self.renderer = renderer(self.model, height, width)
        mujoco.mj_forward(self.model, self.data)

    def place(self, seed: int) -> None:
        """The arm, the cube and the mark at rest where the seed puts them."""
        rng = np.random.default_rng([seed, 2])
        mujoco.mj_resetData(self.model, self.data)
        joints = np.r_[
            rng.uniform(-25, 25), rng.uniform(-15, 15, 3), rng.uniform(-5, 5), rng.uniform(10, 30)
        ]
        side = rng.choice([-1, 1])  # the cube at one, the mark at the other
        for sign, at in ((side, self.data.qpos), (-side, self.data.mocap_pos[0])):
            angle, far = math.radians(sign * rng.uniform(10, 45)), rng.uniform(0.16, 0.24)
            at[:2] = far * math.cos(angle), far * math.sin(angle)
        self.data.qpos[7:13] = self.data.ctrl[:] = _radians(joints)
        mujoco.mj_forward(self.model, self.data)

    def command(self, goal: np.ndarray) -> None:
        """Where the servos shall go (6,), clipped to what they can do."""
        self.data.ctrl[:] = _radians(within(goal))

    def until(self, seconds: float) -> None:
        """On to that time of its own."""
        while self.data.time < seconds:
            mujoco.mj_step(self.model, self.data)

    def joints(self) -> np.ndarray:
        """(6,): where they are."""
        turned = self.data.qpos[7:13]
        return np.r_[np.degrees(turned[:5]), turned[5] / OPEN * 100]

    def top(self, task: str) -> np.ndarray:
        """(3,): the middle of the upper side of what a task is about."""
        return (
            self.data.qpos[:3] + 0.02 * UP
            if task == "touch-cube"
            else self.data.mocap_pos[0].copy()
        )

    def touched(self, task: str) -> bool:
        """Whether the fingertips are where the task wants them."""
        return bool(np.linalg.norm(self.data.site("tip").xpos - self.top(task)) < NEAR)

    def picture(self, camera: str) -> np.ndarray:
        """(h, w, 3) uint8."""
        self.renderer.update_scene(self.data, camera=camera)
        return self.renderer.render()

    def close(self) -> None:
        """Frees the renderer."""
        self.renderer.close()


class ArmEnv:
    """One task of the arm.

    Actions and state (6,): joint positions, degrees, and the gripper, 0 to 100; what the servos
    cannot do is clipped. The seed places the arm, the cube and the mark.
    """

    fps = FPS

    def __init__(self, task: str, image_size: int = IMAGE_SIZE, max_steps: int = STEPS):
        self.instruction = instruction(task)
        self.task, self.max_steps, self.world = task, max_steps, ArmPhysics(image_size, image_size)

    def reset(self, seed: int) -> Observation:
        """Starts the episode of the seed."""
        self.world.place(seed)
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        """What is seen 1/fps s later, and whether the fingertips are where they shall be."""
        self.world.command(np.asarray(action, np.float64))
        self.world.until(self.world.data.time + 1 / self.fps)
        return self._observe(), self.world.touched(self.task)

    def close(self) -> None:
        """Frees the renderer."""
        self.world.close()

    def _observe(self) -> Observation:
        pictures = {camera: self.world.picture(camera) for camera in CAMERAS}
        return Observation(pictures, self.instruction, self.world.joints().astype(np.float32))


class ArmExpert:
    """Goes above the thing, then down to it: of where it is now alone, so that a picture shows its
    reasons.
    """

    # degrees a step at most; m; of the hand, 180 is down; of the gripper
    STEP, ABOVE, PITCH, GRIP = 6.0, 0.05, 150.0, 20.0

    def __init__(self, env: ArmEnv):
        self.env = env

    def reset(self) -> None:
        """Nothing: the expert looks at the present alone."""

    def act(self, observation: Observation) -> np.ndarray:
        """(6,) float32: joint positions to go to."""
        world = self.env.world
        now, goal = world.joints(), world.top(self.env.task)
        tip = world.data.site("tip").xpos
        beside = np.linalg.norm(tip[:2] - goal[:2]) > NEAR
        joints = self.reach(goal + (self.ABOVE if beside else 0) * UP)
        return (now + np.clip(joints - now, -self.STEP, self.STEP)).astype(np.float32)

    def reach(self, place: np.ndarray) -> np.ndarray:
        """(6,): joint positions that bring the fingertips to a place (3,), the elbow up."""
        pitch = math.radians(self.PITCH)
        along = math.hypot(place[0], place[1]) - HAND * math.sin(pitch)
        up = place[2] - HAND * math.cos(pitch) - SHOULDER
        # no nearer, no further can it bend
        far = min(max(math.hypot(along, up), 0.03), UPPER + FOREARM - 1e-6)
        inner = math.acos((UPPER**2 + far**2 - FOREARM**2) / (2 * UPPER * far))
        bend = math.pi - math.acos((UPPER**2 + FOREARM**2 - far**2) / (2 * UPPER * FOREARM))
        lift = math.atan2(along, up) - inner
        elbow, wrist = bend - math.pi / 2, pitch - lift - bend - math.pi / 4
        return np.r_[
            np.degrees([-math.atan2(place[1], place[0]), lift, elbow, wrist]), 0.0, self.GRIP
        ]


def _radians(joints: np.ndarray) -> np.ndarray:
    return np.r_[np.radians(joints[:5]), joints[5] / 100 * OPEN]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What can be set in this simulator alone: nothing."""


class Arm:
    """The arm, as evaluation and collection ask for it (vla0.sim.simulator.Simulator)."""

    cameras = CAMERAS
    actions = ACTIONS
    ranges = RANGES
    switches = SWITCHES
    states = STATES
    image_size = IMAGE_SIZE
    fps = FPS
    any_fps = False
    heavy = False
    seeds = SEEDS
    evaluation_seeds = EVALUATION_SEEDS
    noise = NOISE
    example = "--task touch-cube"
    options = Options

    def ready(self) -> None:
        """Nothing more is needed."""

    def tasks(self, names: Sequence[str], suite: str | None = None) -> tuple[str, ...]:
        """The tasks as they are named; there are no suites."""
        refuse_suite("arm", suite)
        for name in names:
            check_task(name)
        return tuple(names)

    def instruction(self, task: str) -> str:
        """What the policy is told to do."""
        return instruction(task)

    def provenance(self) -> dict[str, Any]:
        """The versions that a result depends on."""
        return provenance()

    def make(
        self,
        task: str,
        *,
        image_size: int | None = None,
        max_steps: int | None = None,
        fps: float | None = None,
        options: Options | None = None,
    ) -> ArmEnv:
        """The Env of a task; of one rate, whatever `fps` says."""
        return ArmEnv(task, image_size or IMAGE_SIZE, max_steps or STEPS)

    def has_expert(self, task: str) -> bool:
        """Whether it has one: each task does."""
        check_task(task)
        return True

    def make_expert(self, env: ArmEnv) -> Any:
        """The scripted expert of its task."""
        return ArmExpert(env)


SIMULATOR = Arm()
