"""Meta-World 3.0.0 on MuJoCo as an Env, its scripted experts, and an instruction for each task."""

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
from vla0.sim.simulator import refuse_suite, renderer

CAMERAS = {"front": "observation.images.front"}  # ours → key in a dataset
ACTIONS = ("dx", "dy", "dz", "gripper")
RANGES = ((-1.0, 1.0),) * 4  # of the actions; beyond them they are clipped
SWITCHES = ()  # actions of which only the sign counts
STATES = ("x", "y", "z", "gripper")
IMAGE_SIZE = 112
STEPS = 150  # after which an episode has failed
SEEDS = range(10_000)  # of demonstrations
FIRST_SEED = 10_000  # of an evaluation: what is tested was never seen
EVALUATION_SEEDS = range(FIRST_SEED, 2**31)
NOISE = (0.3, 0.3)  # share of a demonstration's steps that are disturbed, and how much
CAMERA = "front"
STARTS = {  # where the hand may start, metres from Meta-World's own place: (low, high) of x, y, z
    "stock": ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
    # From the stock place some tasks are solved by pushing one way without looking; from above they
    # are not (docs/results.md).
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
    """The versions that a result depends on."""
    return {package: metadata.version(package) for package in ("metaworld", "mujoco")}


def check_task(task: str) -> None:
    """Raises InputError for an unknown task."""
    if task not in ALL_V3_ENVIRONMENTS:
        raise InputError(
            f"a Meta-World task of {len(ALL_V3_ENVIRONMENTS)}",
            f"'{task}'",
            nearest(task, ALL_V3_ENVIRONMENTS),
        )


def instruction(task: str) -> str:
    """The instruction of a task."""
    return SENTENCES.get(task, task.removesuffix("-v3").replace("-", " "))


@dataclass(frozen=True, kw_only=True)
class Options:
    """What can be set in Meta-World alone."""

    start: str = "stock"  # where the hand starts: "stock", its one place, or "above"

    def __post_init__(self):
        if self.start not in STARTS:
            raise InputError(f"start of {tuple(STARTS)}", f"'{self.start}'", "choose one of those")


class MetaWorldEnv:
    """One Meta-World task seen from a single camera close by.

    Actions (4,): dx, dy, dz of the hand and the gripper, in [-1, 1]; outside they are clipped, as
    Meta-World does. State (4,): position of the hand (m) and opening of the gripper. The seed
    places the objects, and with start "above" the hand. fps: the rate of decisions; an action is
    repeated in between. Shadows, reflections and multisampling are off: on a CPU they are most of a
    picture's cost.
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
        # Seeded placement of the objects, new at each reset: what Meta-World's benchmark wrappers
        # do task by task.
        self.env._set_task_called, self.env._freeze_rand_vec, self.env.seeded_rand_vec = (
            True,
            False,
            True,
        )
        self.env._partially_observable = False
        self.hand = np.array(self.env.hand_init_pos, np.float64)
        self.env.model.vis.quality.offsamples = 0
        self.renderer = renderer(self.env.model, image_size, image_size)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):  # type: ignore[attr-defined]
            self.renderer.scene.flags[flag] = 0
        self.camera = mujoco.MjvCamera()  # type: ignore[attr-defined]
        self.camera.lookat[:] = (0.0, 0.7, 0.1)
        self.camera.distance, self.camera.azimuth, self.camera.elevation = 1.0, 145.0, -30.0
        self.full_state = np.zeros(39)  # what the expert sees

    def reset(self, seed: int) -> Observation:
        """Starts the episode whose objects lie, and whose hand starts, where the seed puts them."""
        self.env.hand_init_pos = self.hand + np.random.default_rng([seed, 1]).uniform(*self.start)
        self.env.seed(seed)
        self.full_state, _ = self.env.reset()
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        """What is seen 1/fps s later, and whether Meta-World has called the task solved by then."""
        success = False
        for _ in range(self.ticks):
            self.full_state, _, _, _, info = self.env.step(np.clip(action, -1, 1))
            success = success or bool(info["success"])
        return self._observe(), success

    def close(self) -> None:
        """Frees the renderer."""
        self.renderer.close()

    def _observe(self) -> Observation:
        self.renderer.update_scene(self.env.data, self.camera)
        return Observation(
            {CAMERA: self.renderer.render()},
            self.instruction,
            self.full_state[:4].astype(np.float32),
        )


class MetaWorldExpert:
    """Meta-World's scripted policy for the task: acts on the simulator's full state, not on the
    picture.
    """

    def __init__(self, env: MetaWorldEnv):
        self.env = env
        self.expert = metaworld.policies.ENV_POLICY_MAP[env.task]()

    def reset(self) -> None:
        """Nothing: the expert looks at the present alone."""

    def act(self, observation: Observation) -> np.ndarray:
        """(4,) float32 in [-1, 1]: what the expert does now."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says of its own actions that they will be clipped
            return np.clip(self.expert.get_action(self.env.full_state), -1, 1).astype(np.float32)


class MetaWorld:
    """Meta-World, as evaluation and collection ask for it (vla0.sim.simulator.Simulator)."""

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
        """Nothing more is needed."""

    def tasks(self, names: Sequence[str], suite: str | None = None) -> tuple[str, ...]:
        """The tasks as they are named; there are no suites."""
        refuse_suite("metaworld", suite)
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
    ) -> MetaWorldEnv:
        """The Env of a task."""
        own = options or Options()
        return MetaWorldEnv(
            task, image_size or IMAGE_SIZE, max_steps or STEPS, own.start, fps or FPS
        )

    def has_expert(self, task: str) -> bool:
        """Whether Meta-World has a scripted policy for the task."""
        check_task(task)
        return task in metaworld.policies.ENV_POLICY_MAP

    def make_expert(self, env: MetaWorldEnv) -> MetaWorldExpert:
        """The scripted expert of its task."""
        return MetaWorldExpert(env)


SIMULATOR = MetaWorld()
