"""A simulated arm in real time, as a LeRobot Robot: `vla0 robot --robot sim`, where no real one is at hand.

Six joints with the names, the order and the units of an SO-101 (degrees; the gripper 0 to 100), position servos, two
cameras, a cube on a table. Physics and cameras run in a thread of their own, whatever the program does.
"""

import math
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from lerobot.robots import Robot, RobotConfig

from vla0.errors import InputError

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
RANGES = ((-110.0, 110.0), (-100.0, 100.0), (-97.0, 97.0), (-95.0, 95.0), (-157.0, 157.0), (0.0, 100.0))  # as commanded
OPEN = math.radians(100)  # of the jaw at 100
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
    <body name="cube" pos="0.24 0.06 0.016">
      <freejoint/><geom type="box" size="0.015 0.015 0.015" mass="0.03" rgba="0.85 0.15 0.15 1"/>
    </body>
    <geom name="mark" type="cylinder" pos="0.2 -0.12 0.001" size="0.04 0.001" rgba="0.1 0.4 0.8 1" contype="0" conaffinity="0"/>
    <camera name="front" pos="0.75 0 0.5" xyaxes="0 1 0 -0.55 0 0.83" fovy="50"/>
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
"""


@RobotConfig.register_subclass("sim")
@dataclass(kw_only=True)
class SimulatedArmConfig(RobotConfig):
    """`--robot.width`, `--robot.height`: of the pictures. `--robot.camera_fps`: how often there are new ones."""

    width: int = 160
    height: int = 120
    camera_fps: float = 20.0


class SimulatedArm(Robot):
    """The arm. For tests: `frozen` keeps the cameras at their last picture, `silent` makes them say nothing."""

    config_class = SimulatedArmConfig
    name = "sim"

    def __init__(self, config: SimulatedArmConfig):
        super().__init__(config)
        if not (28 <= config.width <= 1280 and 28 <= config.height <= 960 and 0 < config.camera_fps <= 60):
            raise InputError("pictures of 28 to 1280 by 28 to 960 pixels, at most 60 a second", f"{config}", "change those")
        self.config, self.cameras = config, {"front": Eye(), "wrist": Eye()}
        self.lock, self.goal, self.joints = threading.Lock(), np.zeros(6), np.zeros(6)
        self.thread: threading.Thread | None = None
        self.ended, self.ready, self.error = threading.Event(), threading.Event(), None
        self.diary: list[tuple[float, np.ndarray]] = []  # (monotonic seconds, command), of the last connection
        self.cube = np.zeros(3)

    @property
    def observation_features(self) -> dict[str, Any]:
        """Joints, then cameras."""
        return {**self.action_features, **dict.fromkeys(self.cameras, (self.config.height, self.config.width, 3))}

    @property
    def action_features(self) -> dict[str, Any]:
        """Goal positions."""
        return {f"{joint}.pos": float for joint in JOINTS}

    @property
    def is_connected(self) -> bool:
        """Whether its world runs."""
        return self.thread is not None and self.thread.is_alive()

    @property
    def is_calibrated(self) -> bool:
        """Always."""
        return True

    def calibrate(self) -> None:
        """Nothing to do."""

    def configure(self) -> None:
        """Nothing to do."""

    def connect(self, calibrate: bool = True) -> None:
        """Starts the world. Raises InputError where MuJoCo is missing or cannot draw."""
        self.ended.clear()
        self.ready.clear()
        self.diary.clear()
        self.thread = threading.Thread(target=self._live, daemon=True, name="simulated arm")
        self.thread.start()
        self.ready.wait(60)
        if self.error is not None:
            raise InputError("a world that runs", repr(self.error), "see `vla0 doctor`") from self.error

    def disconnect(self) -> None:
        """Ends the world."""
        self.ended.set()
        if self.thread is not None:
            self.thread.join(5)
            self.thread = None

    def get_observation(self) -> dict[str, Any]:
        """Joints and the newest pictures. Raises TimeoutError as LeRobot's cameras do: nothing for half a second."""
        self._awake()
        with self.lock:
            seen: dict[str, Any] = {f"{joint}.pos": float(v) for joint, v in zip(JOINTS, self.joints, strict=True)}
            return seen | {name: eye.read_latest() for name, eye in self.cameras.items()}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        """Goal positions, clipped to what the servos can do."""
        self._awake()
        wanted = np.array([float(action[f"{joint}.pos"]) for joint in JOINTS])
        goal = np.clip(wanted, *np.array(RANGES).T)
        with self.lock:
            self.goal = goal
            self.diary.append((time.monotonic(), wanted))
        return {f"{joint}.pos": float(v) for joint, v in zip(JOINTS, goal, strict=True)}

    def _awake(self) -> None:
        if not self.is_connected:
            raise ConnectionError("the simulated arm is not connected")

    def _live(self) -> None:
        """The thread: physics that follows the clock, and pictures at the cameras' rate."""
        try:
            import vla0.envs  # noqa: F401, I001  says how MuJoCo draws, before it is imported
            import mujoco

            mujoco: Any  # its names come from a binary

            model = mujoco.MjModel.from_xml_string(WORLD)
            data = mujoco.MjData(model)
            renderer = mujoco.Renderer(model, self.config.height, self.config.width)
            mujoco.mj_forward(model, data)
            began, drawn = time.monotonic(), -math.inf
            while not self.ended.is_set():
                with self.lock:
                    data.ctrl[:] = np.r_[np.radians(self.goal[:5]), self.goal[5] / 100 * OPEN]
                while data.time < time.monotonic() - began:
                    mujoco.mj_step(model, data)
                if time.monotonic() - drawn >= 1 / self.config.camera_fps:
                    drawn = time.monotonic()
                    self._draw(data, renderer)
                with self.lock:
                    turned = data.qpos[7:13]
                    self.joints = np.r_[np.degrees(turned[:5]), turned[5] / OPEN * 100]
                    self.cube = data.qpos[:3].copy()
                self.ready.set()
                time.sleep(0.002)
            renderer.close()
        except Exception as error:
            self.error = error
            self.ready.set()

    def _draw(self, data: Any, renderer: Any) -> None:
        for name, eye in self.cameras.items():
            renderer.update_scene(data, camera=name)
            eye.see(renderer.render())


class Eye:
    """A camera's newest picture."""

    def __init__(self):
        self.frame, self.latest_timestamp, self.frozen, self.silent = None, None, False, False

    def see(self, frame: np.ndarray) -> None:
        """A new picture, but where it is frozen or silent."""
        if not (self.frozen or self.silent):
            self.frame, self.latest_timestamp = frame, time.perf_counter()

    def read_latest(self, max_age_ms: float = 500) -> np.ndarray:
        """The newest; TimeoutError where it is older, as with LeRobot's cameras."""
        if self.frame is None or (self.silent and (time.perf_counter() - (self.latest_timestamp or 0)) * 1e3 > max_age_ms):
            raise TimeoutError("the camera is silent")
        return self.frame
