"""The robot's loop: a steady pace, chunks that come when they come, nothing executed late."""

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
# Of a chunk of H steps whose answer takes d, asked for while another is executed, H - d are left,
# in d ticks; asked for when nothing is left, all H, in H + d. From this d / H on the robot moves
# more of the time if it waits.
SLOW = (5**0.5 - 1) / 2


@dataclass(frozen=True, kw_only=True)
class Pacer:
    """How a policy is executed.

    mode: "sync" observes, waits, executes `n_action_steps` steps of the chunk, again. "async" asks
    for the next chunk while it executes, committed to the steps that will have passed when it
    comes: the model goes on from them; what comes when the robot had to wait begins when it comes,
    and an answer that takes most of a chunk is waited for. "ensemble" asks as often as answers come
    and averages all chunks that reach an instant.
    """

    fps: float  # of the checkpoint
    chunk_size: int
    mode: str = "async"
    # steps executed of a chunk before the next is asked for; None: half of them
    n_action_steps: int | None = None
    weights: str = "v1"  # of the ensemble, by age
    periodic: tuple[tuple[int, float, float], ...] = ()  # of the checkpoint
    # age of an observation above which it is not asked about: a camera that froze
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
        """Steps of a chunk before the next is asked for."""
        return self.n_action_steps or max(1, self.chunk_size // 2)


@dataclass(kw_only=True)
class Report:
    """What happened."""

    steps: int = 0  # ticks that the loop took part in
    idle: int = 0  # of them without an action
    queries: int = 0
    failures: int = 0  # answers that became an error
    stale: int = 0  # observations too old to ask about
    latency_s: list[float] = field(default_factory=list)
    stopped: str | None = None


@dataclass(frozen=True, kw_only=True)
class Tick:
    """One step of the loop, as whoever records or shows it is told."""

    step: int
    observation: Observation
    action: np.ndarray | None  # (D,) what the policy wants; None where it says nothing of this step
    command: np.ndarray | None  # (D,) what was passed on of it, within the limits
    chunk: np.ndarray | None  # (H, D) the newest prediction
    age: int  # steps since the chunk's first


def drive(
    world: LoopWorld,
    guard: SafetyGuard,
    pace: Pacer,
    max_steps: int,
    on_step: Callable[[Tick], None] = lambda tick: None,
    finished: Callable[[], bool] = lambda: False,
) -> Report:
    """Acts for `max_steps` ticks, until `finished`, or until the guard is stopped.

    An error of the body or a KeyboardInterrupt stops the body and rises.
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
    """One run."""

    def __init__(self, world: LoopWorld, guard: SafetyGuard, pace: Pacer):
        self.world, self.guard, self.pace, self.period = world, guard, pace, 1 / pace.fps
        averaged = pace.mode == "ensemble"
        steps, weights = (1, pace.weights) if averaged else (pace.chunk_size, NONE)
        self.plan = TemporalEnsemble(pace.chunk_size, steps, weights, periodic=pace.periodic)
        self.asked: tuple[Answer, int, float] | None = None
        self.chunk: np.ndarray | None = None  # the newest
        self.latest = -pace.chunk_size  # step that its first action is of
        self.delays: deque[int] = deque(maxlen=8)  # steps that answers took
        self.delay = 1  # that the next may take
        self.report = Report()
        self.began, self.step = world.now(), 0
        self.acted = -1  # the last step with an action

    def tick(self, on_step) -> None:
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
        # A tick that has passed by now is not made up for: what was meant for it would come late.
        self.step = max(
            self.step + 1, math.ceil((self.world.now() - self.began) / self.period - 1e-6)
        )

    def _due(self) -> bool:
        if self.pace.mode == "ensemble":
            return True
        if self.pace.mode == "async" and self.delay > SLOW * self.pace.chunk_size:
            return not self.plan.reaches(self.step)
        return self.step - self.latest >= self.pace.executed or not self.plan.reaches(self.step)

    def _ask(self, observation: Observation) -> None:
        now = self.world.now()
        # One from the future tells that its camera counts in another clock: how old it is, nobody
        # knows.
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
        """What will be executed, from now until the answer is there."""
        most = min(self.delay, self.pace.chunk_size - 1)
        ahead = [self.step + i for i in range(most)]
        reached = next((i for i, step in enumerate(ahead) if not self.plan.reaches(step)), most)
        return [self.plan.action(step) for step in ahead[:reached]]

    def _wait(self) -> None:
        """Of the synchronous way: the chunk begins when it is there, not when it was asked for."""
        while self.asked is not None and self.guard.stopped is None:
            self.world.wait(self.asked[0], self.world.now() + self.period)
            self.guard.check()
            self.step = max(
                self.step, math.ceil((self.world.now() - self.began) / self.period - 1e-6)
            )
            self._take()

    def _checked(self, chunk: np.ndarray) -> np.ndarray:
        """The chunk.

        Raises InputError for one that could not be executed: it came from elsewhere.
        """
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
        """Puts an answer that has come where it belongs on the axis of time."""
        if self.asked is None or not self.asked[0].done():
            return
        answer, step, at = self.asked
        self.asked = None
        try:
            chunk = self._checked(answer.result())
        except (InputError, OSError) as error:
            # refused, or lost on the way: the next may come through
            self.report.failures += 1
            logger.warning("no chunk: %s", error)
            return
        self.report.latency_s.append(getattr(answer, "done_at", self.world.now()) - at)
        # The most of the last few, so that what is committed reaches as far as the answer will
        # need.
        self.delays.append(self.step - step)
        self.delay = max(1, *self.delays)
        if (
            self.pace.mode == "ensemble"
            and self.delay >= self.pace.chunk_size
            and self.report.idle % 20 == 1
        ):
            text = (
                "an answer takes %d steps and a chunk has %d: all of it is past when it "
                "comes; use another way"
            )
            logger.warning(text, self.delay, self.pace.chunk_size)
        # Where nothing was executed since the observation, the robot has waited: the chunk begins
        # now, and is not late.
        waited = self.pace.mode == "sync" or (self.pace.mode == "async" and self.acted < step)
        self.latest = self.step if waited else step
        self.chunk = chunk
        self.plan.add(chunk, self.latest)
