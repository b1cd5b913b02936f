"""A desk arm on MuJoCo as an Env, and its expert.

This is the world of `vla0 robot --robot sim`, but here it runs in simulated time. The arm has six
joints with the names, the order and the units of an SO-101 (degrees; the gripper goes from 0 to
100), position servos and two cameras. A cube and a mark are on a table. Actions are absolute joint
positions, as LeRobot's desk arms take them.
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
from vla0.sim.pictures import Pictures
from vla0.sim.simulator import refuse_suite, renderer

mujoco: Any  # pyright cannot see the names, which come from a binary

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
# The lowest and the highest position that can be commanded to each joint.
RANGES = (
    (-110.0, 110.0),
    (-100.0, 100.0),
    (-97.0, 97.0),
    (-95.0, 95.0),
    (-157.0, 157.0),
    (0.0, 100.0),
)
# Maps our camera names to keys of a dataset.
CAMERAS = {"front": "observation.images.front", "wrist": "observation.images.wrist"}
SWITCHES = ()  # the dimensions of an action of which only the sign counts
ACTIONS = STATES = tuple(f"{joint}.pos" for joint in JOINTS)
IMAGE_SIZE = 112
FPS = 10.0
STEPS = 40  # an episode that lasts longer has failed
SEEDS = range(10_000)  # seeds of demonstrations
FIRST_SEED = 10_000  # first seed of an evaluation, so that no demonstration is tested
EVALUATION_SEEDS = range(FIRST_SEED, 2**31)
NOISE = (0.3, 3.0)  # share of a demonstration's steps that are disturbed, and by how many degrees
TASKS = {"touch-cube": "touch the red cube", "touch-mark": "touch the blue mark"}
UP = np.array([0.0, 0.0, 1.0])
NEAR = 0.025  # m from the fingertips to a target that counts as touched
OPEN = math.radians(100)  # angle of the jaw when the gripper is at 100
# Height of the shoulder and lengths of the links in m. The hand ends between the fingertips.
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
    """Return the versions that a result depends on."""
    return {"mujoco": metadata.version("mujoco")}


def check_task(task: str) -> None:
    """Raise InputError for an unknown task."""
    if task not in TASKS:
        raise InputError(f"a task of {tuple(TASKS)}", f"'{task}'", nearest(task, TASKS))


def instruction(task: str) -> str:
    """Return the instruction of a task, or raise InputError for an unknown task."""
    check_task(task)
    return TASKS[task]


def within(goal: np.ndarray) -> np.ndarray:
    """Clip joint positions (6,) to what the servos can do."""
    return np.clip(goal, *np.array(RANGES).T)


class ArmPhysics:
    """The arm, the table and what lies on it, with joints in degrees and places in metres.

    Args:
        height: Height of the pictures in pixels.
        width: Width of the pictures in pixels.
    """

    def __init__(self, height: int, width: int):
        self.model = mujoco.MjModel.from_xml_string(WORLD)
        self.data = mujoco.MjData(self.model)
        self.renderer = renderer(self.model, height, width)
        mujoco.mj_forward(self.model, self.data)

    def place(self, seed: int) -> None:
        """Put the arm, the cube and the mark at rest where the seed says."""
        rng = np.random.default_rng([seed, 2])
        mujoco.mj_resetData(self.model, self.data)
        joints = np.r_[
            rng.uniform(-25, 25), rng.uniform(-15, 15, 3), rng.uniform(-5, 5), rng.uniform(10, 30)
        ]
        side = rng.choice([-1, 1])  # of the cube; the mark is on the opposite side
        for sign, position in ((side, self.data.qpos), (-side, self.data.mocap_pos[0])):
            angle, radius = math.radians(sign * rng.uniform(10, 45)), rng.uniform(0.16, 0.24)
            position[:2] = radius * math.cos(angle), radius * math.sin(angle)
        self.data.qpos[7:13] = self.data.ctrl[:] = _radians(joints)
        mujoco.mj_forward(self.model, self.data)

    def command(self, goal: np.ndarray) -> None:
        """Send the servos to joint positions (6,), clipped to what they can do."""
        self.data.ctrl[:] = _radians(within(goal))

    def until(self, seconds: float) -> None:
        """Simulate until the simulated time reaches so many seconds."""
        while self.data.time < seconds:
            mujoco.mj_step(self.model, self.data)

    def joints(self) -> np.ndarray:
        """Return the present joint positions (6,)."""
        angles = self.data.qpos[7:13]
        return np.r_[np.degrees(angles[:5]), angles[5] / OPEN * 100]

    def top(self, task: str) -> np.ndarray:
        """Return the centre (3,) of the upper side of a task's target."""
        return (
            self.data.qpos[:3] + 0.02 * UP
            if task == "touch-cube"
            else self.data.mocap_pos[0].copy()
        )

    def touched(self, task: str) -> bool:
        """Return whether the fingertips touch a task's target."""
        return bool(np.linalg.norm(self.data.site("tip").xpos - self.top(task)) < NEAR)

    def picture(self, camera: str) -> np.ndarray:
        """Draw a camera's picture (h, w, 3) uint8."""
        self.renderer.update_scene(self.data, camera=camera)
        return self.renderer.render()

    def close(self) -> None:
        """Free the renderer."""
        self.renderer.close()


class ArmEnv:
    """One task of the arm.

    Actions and states (6,) are joint positions in degrees, and the gripper's from 0 to 100. Actions
    are clipped to what the servos can do.

    Args:
        task: A key of TASKS.
        image_size: Side of the pictures in pixels.
        max_steps: Steps after which an episode has failed.
    """

    fps = FPS

    def __init__(self, task: str, image_size: int = IMAGE_SIZE, max_steps: int = STEPS):
        self.instruction = instruction(task)
        self.task, self.max_steps, self.world = task, max_steps, ArmPhysics(image_size, image_size)
        self.instant = 0  # a number of the present; see Pictures

    def reset(self, seed: int) -> Observation:
        """Start the episode of a seed, which places the arm, the cube and the mark."""
        self.instant += 1
        self.world.place(seed)
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        """Execute an action for 1/fps s.

        Returns:
            The observation after the action, and whether the fingertips touch the target.
        """
        self.instant += 1
        self.world.command(np.asarray(action, np.float64))
        self.world.until(self.world.data.time + 1 / self.fps)
        return self._observe(), self.world.touched(self.task)

    def close(self) -> None:
        """Free the renderer."""
        self.instant += 1
        self.world.close()

    def _observe(self) -> Observation:
        """Return the present observation, whose pictures are not drawn yet."""
        pictures = Pictures(CAMERAS, self.world.picture, lambda: self.instant)
        return Observation(pictures, self.instruction, self.world.joints().astype(np.float32))


class ArmExpert:
    """Goes above the target and then down to it.

    It decides by the present state alone, so that a picture shows the reasons for each action.
    """

    # Most degrees per step; m above the target; degrees of the hand, where 180 points down; gripper
    STEP, ABOVE, PITCH, GRIP = 6.0, 0.05, 150.0, 20.0

    def __init__(self, env: ArmEnv):
        self.env = env

    def reset(self) -> None:
        """Do nothing, because the expert remembers nothing."""

    def act(self, observation: Observation) -> np.ndarray:
        """Return the joint positions (6,) float32 to go to."""
        world = self.env.world
        now, goal = world.joints(), world.top(self.env.task)
        tip = world.data.site("tip").xpos
        beside = np.linalg.norm(tip[:2] - goal[:2]) > NEAR
        joints = self.reach(goal + (self.ABOVE if beside else 0) * UP)
        return (now + np.clip(joints - now, -self.STEP, self.STEP)).astype(np.float32)

    def reach(self, place: np.ndarray) -> np.ndarray:
        """Return joint positions (6,) with the fingertips at a place (3,) and the elbow up."""
        pitch = math.radians(self.PITCH)
        along = math.hypot(place[0], place[1]) - HAND * math.sin(pitch)
        up = place[2] - HAND * math.cos(pitch) - SHOULDER
        # The distance from shoulder to wrist is clipped to what the arm can reach.
        distance = min(max(math.hypot(along, up), 0.03), UPPER + FOREARM - 1e-6)
        inner = math.acos((UPPER**2 + distance**2 - FOREARM**2) / (2 * UPPER * distance))
        bend = math.pi - math.acos((UPPER**2 + FOREARM**2 - distance**2) / (2 * UPPER * FOREARM))
        lift = math.atan2(along, up) - inner
        elbow, wrist = bend - math.pi / 2, pitch - lift - bend - math.pi / 4
        return np.r_[
            np.degrees([-math.atan2(place[1], place[0]), lift, elbow, wrist]), 0.0, self.GRIP
        ]


def _radians(joints: np.ndarray) -> np.ndarray:
    """Convert joint positions (6,) to MuJoCo's angles."""
    return np.r_[np.radians(joints[:5]), joints[5] / 100 * OPEN]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options that only this simulator has: none."""


class Arm:
    """The arm as a `vla0.sim.simulator.Simulator`, which evaluation and collection use."""

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
        """Do nothing, because the arm needs no further files."""

    def tasks(self, names: Sequence[str], suite: str | None = None) -> tuple[str, ...]:
        """Return the names as they are, or raise InputError for an unknown task or a suite."""
        refuse_suite("arm", suite)
        for name in names:
            check_task(name)
        return tuple(names)

    def instruction(self, task: str) -> str:
        """Return the instruction that the policy receives for a task."""
        return instruction(task)

    def step_limit(self, task: str) -> int:
        """Return the steps after which an episode has failed, if nobody says otherwise."""
        return STEPS

    def provenance(self) -> dict[str, Any]:
        """Return the versions that a result depends on."""
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
        """Make the Env of a task. The arm has a single rate, so `fps` changes nothing."""
        return ArmEnv(task, image_size or IMAGE_SIZE, max_steps or STEPS)

    def has_expert(self, task: str) -> bool:
        """Return True, because each task has an expert, or raise InputError for an unknown task."""
        check_task(task)
        return True

    def make_expert(self, env: ArmEnv) -> Any:
        """Make the scripted expert for the task of an Env."""
        return ArmExpert(env)


SIMULATOR = Arm()
