"""LIBERO (hf-libero, robosuite 1.4, MuJoCo 3.3.2) as an Env, by the official protocol."""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from vla0.core.spec import Observation
from vla0.errors import InputError
from vla0.sim.libero_files import (
    STEPS,
    assets,
    environment,
    has_expert,
    initial_states,
    instruction,
    package,
    provenance,
    task_named,
    tasks,
)

# ours → the public datasets' keys
CAMERAS = {"agentview": "observation.images.image", "wrist": "observation.images.image2"}
RAW = {"agentview": "agentview_image", "wrist": "robot0_eye_in_hand_image"}  # ours → robosuite's
ACTIONS = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
RANGES = ((-1.0, 1.0),) * 7  # of the actions; beyond them they are clipped
SWITCHES = (6,)  # actions of which only the sign counts
STATES = ("x", "y", "z", "axis_angle1", "axis_angle2", "axis_angle3", "gripper1", "gripper2")
FPS = 20.0
IMAGE_SIZE = 256
EVALUATION_SEEDS = range(50)  # the benchmark's initial states
SEEDS = range(50, 10_000)  # of demonstrations: they place the objects at random
NOISE = (0.2, 0.2)  # share of a demonstration's steps that are disturbed, and how much
SEED = 7  # of the world before its first reset: it places what no initial state names
SETTLE = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)  # ten times after a reset: objects fall into place


@dataclass(frozen=True, kw_only=True)
class Options:
    """What can be set in LIBERO alone."""

    quick: bool = False  # no shadows, reflections and multisampling: faster on a CPU

    def __post_init__(self):
        if not isinstance(self.quick, bool):
            raise InputError("quick: true or false", f"{self.quick!r}", "give one of those")


class Pictures(Mapping[str, np.ndarray]):
    """{camera: (h, w, 3) uint8} of one instant, each drawn when it is first looked at, before the
    next step.
    """

    def __init__(self, draw: Callable[[str], np.ndarray]):
        self.draw, self.drawn = draw, {}

    def __getitem__(self, camera: str) -> np.ndarray:
        if camera not in self.drawn:
            self.drawn[camera] = self.draw(camera)
        return self.drawn[camera]

    def __iter__(self) -> Iterator[str]:
        return iter(RAW)

    def __len__(self) -> int:
        return len(RAW)

    def __reduce__(self):
        return dict, (dict(self),)  # another process cannot draw


class LiberoEnv:
    """One LIBERO task.

    Actions (7,): change of the hand's position and rotation, +-1 about 5 cm, and the gripper; above
    0 it closes (1), else it opens (-1), decided here, after any ensembling. State (8,): position
    (m), axis-angle, and the two fingers (m). reset(seed): seeds 0..49 are the benchmark's initial
    states; from 50 on the objects lie at random places. An episode does not depend on those before
    it. Pictures are drawn when they are looked at: on a CPU they are most of a step's time, and a
    policy that executes several steps a query looks at few. `quick` draws without shadows,
    reflections and multisampling: faster on a CPU, with other pictures.
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
        suite, name = self.task.split("/")
        self.max_steps = max_steps or STEPS[suite]
        self.instruction = instruction(self.task)
        self.states = initial_states(package() / "init_files" / suite / f"{name}.pruned_init")
        self.quick, self.image_size = quick, image_size
        with contextlib.redirect_stdout(io.StringIO()):  # robosuite and LIBERO talk
            kind = environment()
            np.random.seed(SEED)
            self.env = kind(
                bddl_file_name=str(package() / "bddl_files" / suite / f"{name}.bddl"),
                camera_heights=image_size,
                camera_widths=image_size,
                camera_names=["agentview", "robot0_eye_in_hand"],
            )
            self.env.seed(SEED)
            self.env.reset()
        import mujoco

        self.world = self.env.env
        # From here on a reset is soft: it puts back the one world instead of building another,
        # which takes seconds.
        self.world.hard_reset = False
        model = self.env.sim.model
        self.fixed = model.body_pos.copy(), model.body_quat.copy()
        # With what the solver remembers: without it a few pixels differ from the official ones.
        self.whole = int(mujoco.mjtState.mjSTATE_INTEGRATION)  # type: ignore[attr-defined]
        self.start = np.empty(mujoco.mj_stateSize(model._model, self.whole))  # type: ignore[attr-defined]
        mujoco.mj_getState(model._model, self.env.sim.data._data, self.start, self.whole)  # type: ignore[attr-defined]
        self._draw_late()
        if quick:
            self._draw_quickly()

    def reset(self, seed: int) -> Observation:
        """Starts the episode of the seed: initial state or random placement, then ten steps to
        settle.
        """
        import mujoco

        model = self.env.sim.model
        official = seed < len(self.states)
        model.body_pos[:], model.body_quat[:] = self.fixed if official else self._unplaced
        self.world.timestep, self.world.done = 0, False
        self.instant += 1
        gripper = self.world.robots[0].gripper
        # it closes by degrees, and a soft reset leaves it
        gripper.current_action = np.zeros_like(gripper.current_action)
        self.world.deterministic_reset = official
        with contextlib.redirect_stdout(io.StringIO()):
            np.random.seed(SEED if official else seed)
            self.env.reset()
        if official:
            mujoco.mj_setState(model._model, self.env.sim.data._data, self.start, self.whole)  # type: ignore[attr-defined]
            self.env.set_init_state(self.states[seed])
        for _ in range(10):
            self.raw, *_ = self.env.step(SETTLE)
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        """Executes an action for 50 ms: what is seen then, and whether the task is done."""
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
        """Frees the simulator."""
        self._draw_here()  # what robosuite frees, it frees in the context that is current
        self.env.close()

    def _observe(self) -> Observation:
        state = np.concatenate(
            [
                self.raw["robot0_eef_pos"],
                _axis_angle(self.raw["robot0_eef_quat"]),
                self.raw["robot0_gripper_qpos"],
            ]
        )
        return Observation(
            Pictures(partial(self._draw, self.instant)), self.instruction, state.astype(np.float32)
        )

    @cached_property
    def _unplaced(self) -> tuple[np.ndarray, np.ndarray]:
        """Where bodies are before furniture is placed: LIBERO places what stands on it relative to
        that.
        """
        import mujoco

        fresh = mujoco.MjModel.from_xml_string(self.world.model.get_xml())  # type: ignore[attr-defined]
        return fresh.body_pos.copy(), fresh.body_quat.copy()

    def _draw(self, instant: int, camera: str) -> np.ndarray:
        if instant != self.instant:
            raise InputError(
                "pictures of the present",
                f"{camera} of a step that has passed",
                "look before you act",
            )
        self._draw_here()
        size = self.image_size
        picture = self.env.sim.render(
            width=size, height=size, camera_name=RAW[camera].removesuffix("_image")
        )
        # OpenGL's first row is the lowest, and the benchmark's cameras are mounted the other way
        # round.
        return np.ascontiguousarray(picture[::-1, ::-1])

    def _draw_late(self) -> None:
        """Where robosuite draws, at the first of a step's 25 ticks, it now only remembers what
        there was to be seen.
        """
        from robosuite.utils.observables import sensor

        sim, self.instant = self.env.sim, 0
        shown = sim._render_context_offscreen.data = SimpleNamespace(_data=None)

        @sensor(modality="image")
        def remember(_: Any) -> np.ndarray:
            shown._data = copy(sim.data._data)
            return np.zeros(1)

        first, *others = RAW.values()
        self.world._observables[first].set_sensor(remember)
        for camera in others:  # both see the same instant
            self.world._observables[camera].set_enabled(False)

    def _draw_here(self) -> None:
        """Of several worlds in a process each has its own OpenGL context; robosuite draws in
        whichever came last.
        """
        self.env.sim._render_context_offscreen.gl_ctx.make_current()

    def _draw_quickly(self) -> None:
        import mujoco

        context = self.env.sim._render_context_offscreen
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):  # type: ignore[attr-defined]
            context.scn.flags[flag] = 0
        context.model.vis.quality.offsamples = 0
        context.gl_ctx.make_current()
        context.con.free()
        context._set_mujoco_context_and_buffers()


def _axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """(3,) of a quaternion x, y, z, w, as the public datasets have it: angles up to a whole turn,
    where scipy's rotation vectors go by the shorter way.
    """
    sine = np.linalg.norm(quaternion[:3])
    return (
        np.zeros(3) if sine < 1e-8 else quaternion[:3] / sine * 2 * np.arctan2(sine, quaternion[3])
    )


class Libero:
    """LIBERO, as evaluation and collection ask for it (vla0.sim.simulator.Simulator)."""

    cameras = CAMERAS
    actions = ACTIONS
    ranges = RANGES
    switches = SWITCHES
    states = STATES
    image_size = IMAGE_SIZE
    fps = FPS
    any_fps = False
    heavy = True  # a world takes a gigabyte and seconds to build
    seeds = SEEDS
    evaluation_seeds = EVALUATION_SEEDS
    noise = NOISE
    example = "--suite object"
    options = Options

    def ready(self) -> None:
        """Raises InputError where LIBERO's meshes are not there."""
        assets()

    def tasks(self, names: Sequence[str], suite: str | None = None) -> tuple[str, ...]:
        """Tasks "suite/name" of names or numbers in a suite, and all of a suite's."""
        found = [task_named(name) for name in names]
        return (*found, *(tasks(suite) if suite else ()))

    def instruction(self, task: str) -> str:
        """What the policy is told to do."""
        return instruction(task)

    def provenance(self) -> dict[str, Any]:
        """Versions, and whether the meshes are the real ones."""
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
        """The Env of a task; of one rate, whatever `fps` says."""
        own = options or Options()
        return LiberoEnv(task, image_size or IMAGE_SIZE, max_steps, own.quick)

    def has_expert(self, task: str) -> bool:
        """Whether the scripted expert knows what to do."""
        return has_expert(task)

    def make_expert(self, env: LiberoEnv) -> Any:
        """The scripted expert of its task."""
        from vla0.sim.libero_expert import LiberoExpert

        return LiberoExpert(env)


SIMULATOR = Libero()
