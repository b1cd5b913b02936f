"""The control loop: it keeps a steady pace, takes chunks as they arrive, executes nothing late."""

import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from vla0.core.ensemble import NONE, TemporalEnsemble
from vla0.core.spec import Observation
from vla0.errors import InputError
from vla0.robot.clock import Answer, LoopWorld
from vla0.robot.safety import SafetyGuard

logger = logging.getLogger(__name__)

MODES = ("sync", "async", "ensemble")
# A chunk has H steps and an answer takes d ticks. Asked for while another chunk is executed, it
# leaves H - d steps for each d ticks; asked for when no step is left, all H for each H + d ticks.
# From this d / H on, the robot moves for more of the time if it waits.
SLOW = (5**0.5 - 1) / 2


@dataclass(frozen=True, kw_only=True)
class Pacer:
    """How the loop executes a policy's chunks.

    The modes are:

    - "sync" observes, waits for the chunk, executes `n_action_steps` steps of it, and repeats.
    - "async" asks for the next chunk while it executes one. It sends the steps that will be
      executed until the answer arrives (the action prefix), and the model continues from them. A
      chunk for which the robot had to wait begins when it arrives. If an answer takes most of a
      chunk, the robot waits for it.
    - "ensemble" asks as often as answers arrive, and averages all chunks that reach an instant.

    Raises:
        InputError: The mode is unknown, or a number is out of its range.
    """

    fps: float  # control rate of the checkpoint, Hz
    chunk_size: int  # steps of a chunk
    mode: str = "async"  # sync, async or ensemble
    # steps of a chunk that are executed before the next is asked for; None: half of them
    n_action_steps: int | None = None
    weights: str = "v1"  # of the ensemble, by age
    # dimensions that wrap: (dimension, low, high) of the checkpoint
    periodic: tuple[tuple[int, float, float], ...] = ()
    # seconds; an older observation, of a camera that froze, is not sent to the policy
    oldest_s: float = 0.5

    def __post_init__(self):
        if self.mode not in MODES:
            raise InputError(f"a mode of {MODES}", f"'{self.mode}'", "choose one of those")
        if not (
            math.isfinite(self.fps) and self.fps > 0 and self.chunk_size >= 1 and self.oldest_s > 0
        ):
            raise InputError(
                "fps, chunk_size and oldest_s above 0", f"{self}", "take those of the checkpoint"
            )
        if self.n_action_steps is not None and not 1 <= self.n_action_steps <= self.chunk_size:
            raise InputError(
                f"n_action_steps in 1..{self.chunk_size}",
                f"{self.n_action_steps}",
                "a chunk holds no more steps",
            )

    @property
    def executed(self) -> int:
        """Steps of a chunk that are executed before the next is asked for."""
        return self.n_action_steps or max(1, self.chunk_size // 2)


@dataclass(kw_only=True)
class Report:
    """What happened in one run of the loop."""

    steps: int = 0  # ticks that the loop executed
    idle: int = 0  # ticks of these without an action
    queries: int = 0  # observations sent to the policy
    failures: int = 0  # queries whose answer was an error
    stale: int = 0  # observations that were too old to be sent
    latency_s: list[float] = field(default_factory=list)  # seconds from each query to its chunk
    stopped: str | None = None  # the reason, if the guard was stopped


@dataclass(frozen=True, kw_only=True)
class Tick:
    """One step of the loop, for whatever records or shows it."""

    step: int  # ticks since the run began
    observation: Observation
    action: np.ndarray | None  # (D,) what the policy wants; None if no chunk reaches this step
    command: np.ndarray | None  # (D,) what the guard passed on, within the limits
    chunk: np.ndarray | None  # (H, D) the newest prediction
    age: int  # steps since the first of that chunk


def drive(
    world: LoopWorld,
    guard: SafetyGuard,
    pace: Pacer,
    max_steps: int,
    on_step: Callable[[Tick], None] = lambda tick: None,
    finished: Callable[[], bool] = lambda: False,
) -> Report:
    """Act for `max_steps` ticks, until `finished` is true, or until the guard is stopped.

    An error of the robot or a KeyboardInterrupt stops the robot and is raised again.

    Args:
        world: The clock, and the policy that answers observations.
        guard: The guard of the robot.
        pace: How chunks are executed.
        max_steps: Ticks of 1 / `pace.fps` seconds.
        on_step: Called after each tick.
        finished: Called before each tick; the run ends once it returns True.

    Returns:
        The counts and latencies of the run, and the reason if the guard was stopped.
    """
    loop = _Loop(world, guard, pace)
    try:
        while loop.step < max_steps and guard.stopped is None and not finished():
            loop.tick(on_step)
    except BaseException as error:
        guard.stop(f"{type(error).__name__}: {error}")
        raise
    loop.report.stopped = guard.stopped
    if guard.stopped is not None and loop.asked is not None:
        logger.warning(
            "the policy was asked %.1f s ago and has not answered", world.now() - loop.asked[2]
        )
    return loop.report


class _Loop:
    """The state of one run."""

    def __init__(self, world: LoopWorld, guard: SafetyGuard, pace: Pacer):
        self.world, self.guard, self.pace, self.period = world, guard, pace, 1 / pace.fps
        averaged = pace.mode == "ensemble"
        steps, weights = (1, pace.weights) if averaged else (pace.chunk_size, NONE)
        self.plan = TemporalEnsemble(pace.chunk_size, steps, weights, periodic=pace.periodic)
        # the query that is under way: its answer, step, and time in seconds
        self.asked: tuple[Answer, int, float] | None = None
        self.chunk: np.ndarray | None = None  # the newest
        self.latest = -pace.chunk_size  # the step of its first action
        self.delays: deque[int] = deque(maxlen=8)  # steps that the last answers took
        self.delay = 1  # steps that the next answer may take
        self.report = Report()
        self.began, self.step = world.now(), 0
        self.acted = -1  # the last step with an action

    def tick(self, on_step) -> None:
        """Observes, asks if a query is due, sends an action if there is one, and reports."""
        self.world.sleep_until(self.began + self.step * self.period)
        self._take()
        observation = self.guard.observe()
        if self.asked is None and self._due():
            self._ask(observation)
            if self.pace.mode == "sync":
                self._wait()
        action = command = None
        if self.plan.reaches(self.step):
            action = self.plan.action(self.step)
            command = self.guard.send(action, self.began + (self.step + 1) * self.period)
            self.acted = self.step
        else:
            self.report.idle += 1
        self.guard.check()
        on_step(
            Tick(
                step=self.step,
                observation=observation,
                action=action,
                command=command,
                chunk=self.chunk,
                age=self.step - self.latest,
            )
        )
        self.report.steps += 1
        # A tick that has passed by now is skipped: its command would come late.
        self.step = max(
            self.step + 1, math.ceil((self.world.now() - self.began) / self.period - 1e-6)
        )

    def _due(self) -> bool:
        """Tell whether the next chunk should be asked for at this step."""
        if self.pace.mode == "ensemble":
            return True
        if self.pace.mode == "async" and self.delay > SLOW * self.pace.chunk_size:
            return not self.plan.reaches(self.step)
        return self.step - self.latest >= self.pace.executed or not self.plan.reaches(self.step)

    def _ask(self, observation: Observation) -> None:
        """Send an observation to the policy, unless it is too old."""
        now = self.world.now()
        # A time in the future means that the camera uses another clock, so the age is unknown.
        if (
            observation.captured_at is not None
            and not -self.period <= now - observation.captured_at <= self.pace.oldest_s
        ):
            self.report.stale += 1
            return
        if self.pace.mode == "async" and (action_prefix := self._action_prefix()):
            observation = replace(observation, action_prefix=np.stack(action_prefix))
        self.asked = (self.world.ask(observation), self.step, now)
        self.report.queries += 1

    def _action_prefix(self) -> list[np.ndarray]:
        """Return the actions that will be executed from now until the answer arrives."""
        steps = min(self.delay, self.pace.chunk_size - 1)
        ahead = [self.step + i for i in range(steps)]
        reached = next((i for i, step in enumerate(ahead) if not self.plan.reaches(step)), steps)
        return [self.plan.action(step) for step in ahead[:reached]]

    def _wait(self) -> None:
        """Wait for the chunk, in mode "sync"; it begins when it arrives, not when it was asked."""
        while self.asked is not None and self.guard.stopped is None:
            self.world.wait(self.asked[0], self.world.now() + self.period)
            self.guard.check()
            self.step = max(
                self.step, math.ceil((self.world.now() - self.began) / self.period - 1e-6)
            )
            self._take()

    def _checked(self, chunk: np.ndarray) -> np.ndarray:
        """Return the chunk, or raise InputError for one that could not be executed."""
        chunk, dimensions = np.asarray(chunk), len(self.guard.limits.low)
        shape = chunk.shape
        if (
            chunk.ndim != 2
            or not 1 <= shape[0] <= self.pace.chunk_size
            or shape[1] != dimensions
            or not np.isfinite(chunk).all()
        ):
            expected = (
                f"a chunk of 1 to {self.pace.chunk_size} actions of {dimensions} finite numbers"
            )
            raise InputError(
                expected, f"shape {shape}", "look at the policy: nothing of it is executed"
            )
        return chunk

    def _take(self) -> None:
        """Take an answer that has arrived, and place its chunk at the steps that it is for."""
        if self.asked is None or not self.asked[0].done():
            return
        answer, step, at = self.asked
        self.asked = None
        try:
            chunk = self._checked(answer.result())
        except (InputError, OSError) as error:
            # refused, or lost on the network: the next query may succeed
            self.report.failures += 1
            logger.warning("no chunk: %s", error)
            return
        self.report.latency_s.append(getattr(answer, "done_at", self.world.now()) - at)
        # The maximum of the last few, so that the action prefix lasts until the next answer.
        self.delays.append(self.step - step)
        self.delay = max(1, *self.delays)
        if (
            self.pace.mode == "ensemble"
            and self.delay >= self.pace.chunk_size
            and self.report.idle % 20 == 1
        ):
            text = (
                "an answer takes %d steps and a chunk has %d: all of it is past when it "
                "comes; use another mode"
            )
            logger.warning(text, self.delay, self.pace.chunk_size)
        # If nothing was executed since the observation, the robot has waited: the chunk begins now
        # and is not late.
        waited = self.pace.mode == "sync" or (self.pace.mode == "async" and self.acted < step)
        self.latest = self.step if waited else step
        self.chunk = chunk
        self.plan.add(chunk, self.latest)
