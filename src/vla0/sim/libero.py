"""LIBERO and LIBERO-PRO by the official protocol (robosuite 1.4, MuJoCo 3.3.2)."""

import contextlib
import io
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np

from vla0.core.spec import Observation
from vla0.errors import InputError
from vla0.sim.libero_files import (
    check_installed,
    environment,
    has_expert,
    initial_states,
    instruction,
    provenance,
    step_limit,
    task_file,
    task_named,
    tasks,
)
from vla0.sim.pictures import Pictures

# Maps our camera names to the keys of the public datasets, and then to robosuite's names.
CAMERAS = {"agentview": "observation.images.image", "wrist": "observation.images.image2"}
RAW = {"agentview": "agentview_image", "wrist": "robot0_eye_in_hand_image"}
ACTIONS = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
RANGES = ((-1.0, 1.0),) * 7  # bounds of the actions; LIBERO clips what lies outside
SWITCHES = (6,)  # the dimensions of an action of which only the sign counts
STATES = ("x", "y", "z", "axis_angle1", "axis_angle2", "axis_angle3", "gripper1", "gripper2")
FPS = 20.0
IMAGE_SIZE = 256
EVALUATION_SEEDS = range(50)  # the benchmark's initial states
SEEDS = range(50, 10_000)  # seeds of demonstrations, which place the objects at random
NOISE = (0.2, 0.2)  # share of a demonstration's steps that are disturbed, and how much
# Seeds the world before its first reset. It places the objects that no initial state names.
SEED = 7
# This action is executed ten times after a reset, while the objects fall into place.
SETTLE = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options that only LIBERO has."""

    quick: bool = False  # draw without shadows, reflections and multisampling: faster on a CPU

    def __post_init__(self):
        if not isinstance(self.quick, bool):
            raise InputError("quick: true or false", f"{self.quick!r}", "give one of those")


class LiberoEnv:
    """One LIBERO task.

    An action (7,) changes the position and the rotation of the hand, where 1 is about 5 cm, and
    moves the gripper: it closes (1) for values above 0 and opens (-1) otherwise. This class decides
    that, after any ensembling. A state (8,) is the position in m, the axis-angle, and the positions
    of the two fingers in m.

    An episode does not depend on those before it. Pictures are drawn when they are looked at.

    Args:
        task: Name of the task, as `vla0.sim.libero_files.task_named` takes it.
        image_size: Side of the pictures in pixels.
        max_steps: Steps after which an episode has failed. None takes the suite's cap.
        quick: Draw without shadows, reflections and multisampling. This is faster on a CPU and
            gives other pictures.
    """

    fps = FPS

    def __init__(
        self,
        task: str,
        image_size: int = IMAGE_SIZE,
        max_steps: int | None = None,
        quick: bool = False,
    ):
        self.task = task_named(task)
        self.max_steps = max_steps or step_limit(self.task)
        self.instruction = instruction(self.task)
        self.states = initial_states(self.task)
        self.quick, self.image_size = quick, image_size
        with contextlib.redirect_stdout(io.StringIO()):  # robosuite and LIBERO print messages
            env_class = environment()
            np.random.seed(SEED)
            self.env = env_class(
                bddl_file_name=str(task_file(self.task)),
                camera_heights=image_size,
                camera_widths=image_size,
                camera_names=["agentview", "robot0_eye_in_hand"],
            )
            self.world = self.env.env
            # The benchmark seeds again here and resets, which builds the same world a second time.
            # By then LIBERO has each sampler of an open door twice, and draws other places.
            if self.world.object_property_initializers:
                self.env.seed(SEED)
                self.env.reset()
            else:
                self.env.sim.forward()
        import mujoco

        # From here on a reset is soft: it restores this world instead of building another one,
        # which takes seconds.
        self.world.hard_reset = False
        model = self.env.sim.model
        self.fixed = model.body_pos.copy(), model.body_quat.copy()
        # The saved state includes what the solver remembers. Without that, a few pixels would
        # differ from the official ones.
        self.state_parts = int(mujoco.mjtState.mjSTATE_INTEGRATION)  # type: ignore[attr-defined]
        self.start = np.empty(mujoco.mj_stateSize(model._model, self.state_parts))  # type: ignore[attr-defined]
        mujoco.mj_getState(model._model, self.env.sim.data._data, self.start, self.state_parts)  # type: ignore[attr-defined]
        self._draw_late()
        if quick:
            self._draw_quickly()

    def reset(self, seed: int) -> Observation:
        """Start the episode of a seed, and let the objects settle for ten steps.

        Args:
            seed: 0..49 starts from that initial state of the benchmark. From 50 on, the seed places
                the objects at random.
        """
        import mujoco

        model = self.env.sim.model
        official = seed < len(self.states)
        model.body_pos[:], model.body_quat[:] = self.fixed if official else self._unplaced
        self.world.timestep, self.world.done = 0, False
        self.instant += 1
        gripper = self.world.robots[0].gripper
        # The gripper closes by degrees, and a soft reset does not restore its degree.
        gripper.current_action = np.zeros_like(gripper.current_action)
        self.world.deterministic_reset = official
        with contextlib.redirect_stdout(io.StringIO()):
            np.random.seed(SEED if official else seed)
            self.env.reset()
        if official:
            mujoco.mj_setState(model._model, self.env.sim.data._data, self.start, self.state_parts)  # type: ignore[attr-defined]
            self.env.set_init_state(self.states[seed])
        for _ in range(10):
            self.raw, *_ = self.env.step(SETTLE)
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        """Execute an action for 50 ms.

        Args:
            action: (7,), see the class.

        Returns:
            The observation after the action, and whether the task is done.

        Raises:
            InputError: When the action has another shape.
        """
        action = np.asarray(action, np.float64).copy()
        if action.shape != (len(ACTIONS),):
            raise InputError(
                f"an action of {len(ACTIONS)} numbers",
                f"shape {action.shape}",
                "use a LIBERO checkpoint",
            )
        action[-1] = 1.0 if action[-1] > 0 else -1.0
        self.instant += 1
        self.raw, _, done, _ = self.env.step(action)
        return self._observe(), bool(done)

    def close(self) -> None:
        """Free the simulator."""
        self.instant += 1
        self._draw_here()  # robosuite frees what belongs to the current OpenGL context
        self.env.close()

    def _observe(self) -> Observation:
        """Return the present observation, whose pictures are not drawn yet."""
        state = np.concatenate(
            [
                self.raw["robot0_eef_pos"],
                _axis_angle(self.raw["robot0_eef_quat"]),
                self.raw["robot0_gripper_qpos"],
            ]
        )
        pictures = Pictures(RAW, self._draw, lambda: self.instant)
        return Observation(pictures, self.instruction, state.astype(np.float32))

    @cached_property
    def _unplaced(self) -> tuple[np.ndarray, np.ndarray]:
        """The bodies' positions and rotations before LIBERO places the furniture.

        LIBERO places the objects on the furniture relative to these.
        """
        import mujoco

        fresh = mujoco.MjModel.from_xml_string(self.world.model.get_xml())  # type: ignore[attr-defined]
        return fresh.body_pos.copy(), fresh.body_quat.copy()

    def _draw(self, camera: str) -> np.ndarray:
        """Draw a camera's picture of the scene that was saved last."""
        self._draw_here()
        size = self.image_size
        picture = self.env.sim.render(
            width=size, height=size, camera_name=RAW[camera].removesuffix("_image")
        )
        # OpenGL's first row is the lowest, and the benchmark's cameras are mounted upside down.
        return np.ascontiguousarray(picture[::-1, ::-1])

    def _draw_late(self) -> None:
        """Let robosuite save the scene where it would draw it, at the first of a step's 25 ticks.

        `_draw` draws the saved scene later.
        """
        from robosuite.utils.observables import sensor

        sim, self.instant = self.env.sim, 0
        shown = sim._render_context_offscreen.data = SimpleNamespace(_data=None)

        @sensor(modality="image")
        def remember(_: Any) -> np.ndarray:
            shown._data = copy(sim.data._data)
            return np.zeros(1)

        first_camera, *other_cameras = RAW.values()
        self.world._observables[first_camera].set_sensor(remember)
        for camera in other_cameras:  # one saved scene serves all cameras
            self.world._observables[camera].set_enabled(False)

    def _draw_here(self) -> None:
        """Make this world's OpenGL context the current one.

        Each world in a process has a context, and robosuite draws in the one that was made last.
        """
        self.env.sim._render_context_offscreen.gl_ctx.make_current()

    def _draw_quickly(self) -> None:
        """Turn shadows, reflections and multisampling off."""
        import mujoco

        context = self.env.sim._render_context_offscreen
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):  # type: ignore[attr-defined]
            context.scn.flags[flag] = 0
        context.model.vis.quality.offsamples = 0
        context.gl_ctx.make_current()
        context.con.free()
        context._set_mujoco_context_and_buffers()


def _axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Convert a quaternion (x, y, z, w) to a (3,) axis-angle as in the public datasets.

    Angles go up to a full turn there, whereas scipy's rotation vectors never exceed half a turn.
    """
    sine = np.linalg.norm(quaternion[:3])
    return (
        np.zeros(3) if sine < 1e-8 else quaternion[:3] / sine * 2 * np.arctan2(sine, quaternion[3])
    )


class Libero:
    """LIBERO as a `vla0.sim.simulator.Simulator`, which evaluation and collection use."""

    cameras = CAMERAS
    actions = ACTIONS
    ranges = RANGES
    switches = SWITCHES
    states = STATES
    image_size = IMAGE_SIZE
    fps = FPS
    any_fps = False
    heavy = True  # a world takes a gigabyte of memory, and building it takes seconds
    seeds = SEEDS
    evaluation_seeds = EVALUATION_SEEDS
    noise = NOISE
    example = "--suite object"
    options = Options

    def ready(self) -> None:
        """Raise InputError when LIBERO or one of its files is missing."""
        check_installed()

    def tasks(self, names: Sequence[str], suite: str | None = None) -> tuple[str, ...]:
        """Return the full names "suite/name" of tasks, and of all tasks of a suite.

        Args:
            names: "suite/name" or "suite/number", each.
            suite: Name of a suite, or None.

        Raises:
            InputError: When a task or the suite does not exist.
        """
        named_tasks = [task_named(name) for name in names]
        return (*named_tasks, *(tasks(suite) if suite else ()))

    def instruction(self, task: str) -> str:
        """Return the instruction that the policy receives for a task."""
        return instruction(task)

    def step_limit(self, task: str) -> int:
        """Return the steps of the task's suite after which an episode has failed."""
        return step_limit(task)

    def provenance(self) -> dict[str, Any]:
        """Return the versions on which a result depends."""
        return provenance()

    def make(
        self,
        task: str,
        *,
        image_size: int | None = None,
        max_steps: int | None = None,
        fps: float | None = None,
        options: Options | None = None,
    ) -> LiberoEnv:
        """Make the Env of a task. LIBERO has a single rate, so `fps` changes nothing."""
        options = options or Options()
        return LiberoEnv(task, image_size or IMAGE_SIZE, max_steps, options.quick)

    def has_expert(self, task: str) -> bool:
        """Return whether the scripted expert can solve a task."""
        return has_expert(task)

    def make_expert(self, env: LiberoEnv) -> Any:
        """Make the scripted expert for the task of an Env."""
        from vla0.sim.libero_expert import LiberoExpert

        return LiberoExpert(env)


SIMULATOR = Libero()
