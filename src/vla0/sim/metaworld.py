"""Meta-World 3.0.0 on MuJoCo as an Env, with its scripted experts and an instruction per task."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

import metaworld.policies
import mujoco
import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS

from vla0.core.spec import Observation
from vla0.errors import InputError, nearest
from vla0.sim.pictures import Pictures
from vla0.sim.simulator import refuse_suite, renderer

CAMERAS = {"front": "observation.images.front"}  # maps our camera names to keys of a dataset
ACTIONS = ("dx", "dy", "dz", "gripper")
RANGES = ((-1.0, 1.0),) * 4  # bounds of the actions; values outside are clipped
SWITCHES = ()  # the dimensions of an action of which only the sign counts
STATES = ("x", "y", "z", "gripper")
IMAGE_SIZE = 112
STEPS = 150  # an episode that lasts longer has failed
SEEDS = range(10_000)  # seeds of demonstrations
FIRST_SEED = 10_000  # first seed of an evaluation, so that no demonstration is tested
EVALUATION_SEEDS = range(FIRST_SEED, 2**31)
NOISE = (0.3, 0.3)  # share of a demonstration's steps that are disturbed, and how much
CAMERA = "front"
# Where the hand may start: (low, high) of x, y, z in m, measured from Meta-World's own place.
STARTS = {
    "stock": ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
    # From the stock place, a policy can solve some tasks by pushing in a fixed direction without
    # looking. From above it cannot (docs/results.md).
    "above": ((-0.02, -0.02, 0.18), (0.02, 0.02, 0.22)),
}
FPS = 80  # Meta-World's own control rate: 0.0025 s x 5 substeps a tick
SENTENCES = {
    "button-press-topdown-v3": "press the button from the top",
    "button-press-v3": "press the button on the wall",
    "coffee-button-v3": "push the button of the coffee machine",
    "door-close-v3": "close the door",
    "drawer-close-v3": "push the drawer closed",
    "drawer-open-v3": "pull the drawer open",
    "faucet-close-v3": "turn the faucet to the right",
    "faucet-open-v3": "turn the faucet to the left",
    "handle-press-v3": "press the handle down",
    "plate-slide-v3": "slide the plate into the goal",
    "reach-v3": "reach the goal",
    "window-close-v3": "push the window closed",
    "window-open-v3": "push the window open",
}


@cache
def provenance() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {package: metadata.version(package) for package in ("metaworld", "mujoco")}


def check_task(task: str) -> None:
    """Raise InputError for an unknown task."""
    if task not in ALL_V3_ENVIRONMENTS:
        raise InputError(
            f"a Meta-World task of {len(ALL_V3_ENVIRONMENTS)}",
            f"'{task}'",
            nearest(task, ALL_V3_ENVIRONMENTS),
        )


def instruction(task: str) -> str:
    """Return the instruction of a task."""
    return SENTENCES.get(task, task.removesuffix("-v3").replace("-", " "))


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options that only Meta-World has."""

    start: str = "stock"  # where the hand starts: "stock", which is a fixed place, or "above"

    def __post_init__(self):
        if self.start not in STARTS:
            raise InputError(f"start of {tuple(STARTS)}", f"'{self.start}'", "choose one of those")


class MetaWorldEnv:
    """One Meta-World task seen from a single camera close by.

    An action (4,) is dx, dy, dz of the hand and the gripper, in [-1, 1]. Values outside are
    clipped, as Meta-World does. A state (4,) is the position of the hand in m and the opening of
    the gripper. Pictures are drawn when they are looked at. They have no shadows, reflections and
    multisampling, which on a CPU would be most of their cost.

    Args:
        task: A name of Meta-World's, such as "drawer-close-v3".
        image_size: Side of the pictures in pixels.
        max_steps: Steps after which an episode has failed.
        start: Where the hand starts, a key of STARTS.
        fps: Decisions per second. In between, the action is repeated.

    Raises:
        InputError: When the task or the start is unknown, or fps is not a whole part of 80.
    """

    def __init__(
        self,
        task: str,
        image_size: int = IMAGE_SIZE,
        max_steps: int = STEPS,
        start: str = "stock",
        fps: float = FPS,
    ):
        check_task(task)
        Options(start=start)
        if not 0 < fps <= FPS or FPS % fps:
            raise InputError(
                f"fps, a whole part of {FPS}", f"{fps}", "80, 40, 20, 16 and 10 are some"
            )
        self.task, self.max_steps, self.start = task, max_steps, STARTS[start]
        self.fps, self.ticks = float(fps), round(FPS / fps)
        self.instruction = instruction(task)
        self.env = ALL_V3_ENVIRONMENTS[task]()
        # The objects are placed anew by the seed at each reset. Meta-World's benchmark wrappers do
        # that task by task.
        self.env._set_task_called = True
        self.env._freeze_rand_vec = False
        self.env.seeded_rand_vec = True
        self.env._partially_observable = False
        self.hand = np.array(self.env.hand_init_pos, np.float64)
        self.env.model.vis.quality.offsamples = 0
        self.renderer = renderer(self.env.model, image_size, image_size)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):  # type: ignore[attr-defined]
            self.renderer.scene.flags[flag] = 0
        self.camera = mujoco.MjvCamera()  # type: ignore[attr-defined]
        self.camera.lookat[:] = (0.0, 0.7, 0.1)
        self.camera.distance, self.camera.azimuth, self.camera.elevation = 1.0, 145.0, -30.0
        self.full_state = np.zeros(39)  # what the expert acts on
        self.instant = 0  # a number of the present; see Pictures

    def reset(self, seed: int) -> Observation:
        """Start the episode of a seed, which places the objects and, with "above", the hand."""
        self.env.hand_init_pos = self.hand + np.random.default_rng([seed, 1]).uniform(*self.start)
        self.env.seed(seed)
        self.instant += 1
        self.full_state, _ = self.env.reset()
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        """Execute an action for 1/fps s.

        Returns:
            The observation after the action, and whether Meta-World called the task solved.
        """
        success = False
        self.instant += 1
        for _ in range(self.ticks):
            self.full_state, _, _, _, info = self.env.step(np.clip(action, -1, 1))
            success = success or bool(info["success"])
        return self._observe(), success

    def close(self) -> None:
        """Free the renderer."""
        self.instant += 1
        self.renderer.close()

    def _observe(self) -> Observation:
        """Return the present observation, whose picture is not drawn yet."""
        return Observation(
            Pictures((CAMERA,), self._draw, lambda: self.instant),
            self.instruction,
            self.full_state[:4].astype(np.float32),
        )

    def _draw(self, _: str) -> np.ndarray:
        """Draw the present picture of the only camera."""
        self.renderer.update_scene(self.env.data, self.camera)
        return self.renderer.render()


class MetaWorldExpert:
    """Meta-World's scripted policy for the task of an Env.

    It acts on the simulator's full state and looks at no picture.
    """

    def __init__(self, env: MetaWorldEnv):
        self.env = env
        self.expert = metaworld.policies.ENV_POLICY_MAP[env.task]()

    def reset(self) -> None:
        """Do nothing, because the expert remembers nothing."""

    def act(self, observation: Observation) -> np.ndarray:
        """Return the expert's next action: (4,) float32 in [-1, 1]."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the expert warns that its actions will be clipped
            return np.clip(self.expert.get_action(self.env.full_state), -1, 1).astype(np.float32)


class MetaWorld:
    """Meta-World as a `vla0.sim.simulator.Simulator`, which evaluation and collection use."""

    cameras = CAMERAS
    actions = ACTIONS
    ranges = RANGES
    switches = SWITCHES
    states = STATES
    image_size = IMAGE_SIZE
    fps = float(FPS)
    any_fps = True
    heavy = False
    seeds = SEEDS
    evaluation_seeds = EVALUATION_SEEDS
    noise = NOISE
    example = "--task drawer-close-v3"
    options = Options

    def ready(self) -> None:
        """Do nothing, because Meta-World needs no further files."""

    def tasks(self, names: Sequence[str], suite: str | None = None) -> tuple[str, ...]:
        """Return the names as they are, or raise InputError for an unknown task or a suite."""
        refuse_suite("metaworld", suite)
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
    ) -> MetaWorldEnv:
        """Make the Env of a task."""
        options = options or Options()
        return MetaWorldEnv(
            task, image_size or IMAGE_SIZE, max_steps or STEPS, options.start, fps or FPS
        )

    def has_expert(self, task: str) -> bool:
        """Return whether Meta-World has a scripted policy for a task."""
        check_task(task)
        return task in metaworld.policies.ENV_POLICY_MAP

    def make_expert(self, env: MetaWorldEnv) -> MetaWorldExpert:
        """Make the scripted expert for the task of an Env."""
        return MetaWorldExpert(env)


SIMULATOR = MetaWorld()
