"""Runs episodes on a LeRobot Robot: limited, watched, stoppable and recorded."""

import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla0.errors import InputError
from vla0.robot.clock import RealWorld
from vla0.robot.keys import STOP_KEYS, VERDICTS, Flag, listening
from vla0.robot.lerobot_robot import LeRobotBody
from vla0.robot.loop import Pacer, Report, Tick, drive
from vla0.robot.motor_limits import limits_of, refuse_unlimited, start_of
from vla0.robot.record import Recorder
from vla0.robot.resample import Resampled
from vla0.robot.safety import SafetyGuard
from vla0.robot.view import View
from vla0.serve.client import RemotePolicy

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SessionConfig:
    """How episodes are run.

    Raises:
        InputError: There is no instruction, or a number is out of its range.
    """

    instruction: str  # what the robot shall do
    live: bool = False  # whether to move the robot; False is a dry run
    mode: str = "async"  # sync, async or ensemble, as for Pacer
    n_action_steps: int | None = None  # steps of a chunk that are executed; None: half of them
    weights: str = "v1"  # of the ensemble, by age
    fps: float | None = None  # control rate of the loop, Hz; None: that of the checkpoint
    resample: bool = False  # whether to interpolate chunks if `fps` is not the checkpoint's
    episodes: int = 1
    seconds: float = 30.0  # of an episode, at most
    reset_s: float = 10.0  # seconds between two episodes
    hold_s: float = 0.2  # seconds without a command after which the robot holds
    stop_s: float = 2.0  # seconds without a command after which it is stopped
    out: Path | None = None  # folder for the recording; None records nothing
    view: str | None = None  # where to show the episodes, as for View; None shows nothing

    def __post_init__(self):
        if not self.instruction.strip():
            raise InputError(
                "an instruction that says what the robot shall do", "none", "give --instruction"
            )
        for name, minimum in {"episodes": 1, "seconds": 0.1, "reset_s": 0, "fps": 0.1}.items():
            value = getattr(self, name)
            if value is not None and not minimum <= value < math.inf:
                raise InputError(f"{name} of {minimum:g} or more", f"{value:g}", "correct it")


class RobotSession:
    """One robot and one policy; `run` runs the episodes.

    Args:
        config: How episodes are run.
        robot: The LeRobot Robot, not connected yet.
        policy: The policy, at a server that sends whole chunks.
        cameras: camera of the checkpoint → the robot's name for it, where they differ.
        limits: low, high, step or velocity, as for `limits_of`.
        told: Called with lines for the operator.

    Raises:
        InputError: Robot, policy and config do not fit together.
    """

    def __init__(
        self,
        config: SessionConfig,
        robot: Any,
        policy: RemotePolicy,
        cameras: Mapping[str, str] | None = None,
        limits: Mapping[str, Any] | None = None,
        told: Callable[[str], None] = logger.info,
    ):
        spec = policy.spec
        if (averaged := policy.metadata.get("ensemble", "none")) != "none":
            got = f"ensembled steps ({averaged})"
            raise InputError(
                "a server of whole chunks",
                got,
                "serve without --ensemble; `vla0 robot --mode ensemble` averages",
            )
        self.config, self.robot, self.policy, self.told = config, robot, policy, told
        self.body = LeRobotBody(robot, spec, config.instruction, cameras)
        self.limits = limits_of(spec, self.body, limits)
        if config.live and self.body.absolute:
            refuse_unlimited(self.limits, self.body.actions)
        self.fps = spec.fps if config.fps is None else config.fps
        predict: Callable[..., np.ndarray] = policy.predict
        chunk_size = spec.chunk_size
        if self.fps != spec.fps:
            if not config.resample:
                got = f"a loop of {self.fps:g}"
                raise InputError(
                    f"{spec.fps:g} steps a second, as the checkpoint",
                    got,
                    "leave --fps out, or give --resample",
                )
            if not self.body.absolute:
                raise InputError(
                    "actions that are positions, to resample",
                    f"{self.body.actions}",
                    "leave --fps out",
                )
            predict = Resampled(policy.predict, spec.fps, self.fps, spec.chunk_size, spec.periodic)
            chunk_size = predict.chunk_size
        for name, camera in (getattr(robot, "cameras", None) or {}).items():
            rate = getattr(camera, "fps", None)
            if rate and rate < self.fps:
                logger.warning(
                    "camera '%s' gives %g pictures a second, the loop looks %g times",
                    name,
                    rate,
                    self.fps,
                )
        self.pace = Pacer(
            fps=self.fps,
            chunk_size=chunk_size,
            mode=config.mode,
            n_action_steps=config.n_action_steps,
            weights=config.weights,
            periodic=spec.periodic,
        )
        self.world = RealWorld(predict)
        self.chunk_size = chunk_size
        self.guard: SafetyGuard | None = None
        self.why: str | None = None  # the reason of the first stop, which may come between episodes
        self.saving = False
        self.ends, self.forgets = Flag(), Flag()
        self.acting = False  # whether an episode is running
        self.verdict: bool | None = None  # whether the last episode succeeded, if somebody said so
        self.reports: list[Report] = []

    def key(self, name: str) -> None:
        """Handle a key: it stops the robot, or ends the episode, with a verdict or forgotten."""
        if name in STOP_KEYS:
            self.stop(f"key '{name}'")
        elif name in ("left", "right", "enter"):
            if name == "left":
                self.forgets.set()
            self.ends.set()
        elif name in VERDICTS:
            if self.acting:
                self.verdict = VERDICTS[name]
                self.ends.set()
            else:
                self.told(f"'{name}' ends an episode with a verdict, and none is running")

    def stop(self, reason: str) -> None:
        """Stop the robot and end the session, at once.

        Args:
            reason: Why, for the log and the report.
        """
        self.why = self.why or reason
        if self.guard is not None:
            self.guard.stop(reason)
        self.ends.set()

    def run(self) -> list[Report]:
        """Connect the robot, run the episodes, and disconnect it.

        Returns:
            A report for each episode. If a stop ended the session, the last one has the reason.

        Raises:
            InputError: The robot does not connect or fails, or a camera sends no picture.
        """
        config = self.config
        began = time.monotonic()
        with contextlib.ExitStack() as stack:
            recorder = view = None
            if config.view is not None:
                view = View(config.view, self.body, self.fps)
                # entered first, so that a slow viewer does not delay the robot's release
                stack.callback(view.close)
            stack.enter_context(self._connected())
            if config.out is not None and config.live:
                recorder = Recorder(config.out, self.body, self.fps, self.chunk_size)
                stack.callback(recorder.close)
            stack.enter_context(listening(self))
            for episode in range(config.episodes):
                if episode and not self._between(episode):
                    break
                offset, commands = time.monotonic() - began, []

                def on_step(tick: Tick, offset: float = offset, commands: list = commands) -> None:
                    if not config.live and tick.action is not None and tick.command is not None:
                        commands.append((tick.action, tick.command))
                    if recorder is not None:
                        recorder.tick(tick)
                    if view is not None:
                        view.tick(tick, offset)

                try:
                    self.reports.append(self._episode(on_step))
                finally:
                    self._keep(recorder)
                    self._summarise(commands)
                if self.reports[-1].stopped is not None:
                    break
        return self.reports

    def _episode(self, on_step: Callable[[Tick], None]) -> Report:
        """Run one episode."""
        config, spec = self.config, self.body.spec
        self.ends.clear()
        self.forgets.clear()
        self.verdict, self.acting = None, True
        self.policy.reset()
        self.body.frames = {
            camera: frames.__class__(maxlen=spec.history)
            for camera, frames in self.body.frames.items()
        }
        self._first_observation()
        start = start_of(self.body, self.limits, self.told)
        guard = SafetyGuard(
            self.body, self.limits, 1 / self.fps, start, config.live, config.hold_s, config.stop_s
        )
        self.guard = guard
        # checked after `self.guard` is set: an earlier stop found no guard
        if self.why is not None:
            guard.stop(self.why)
        watchdog = guard.watch()
        try:
            report = drive(
                self.world,
                guard,
                self.pace,
                round(config.seconds * self.fps),
                on_step,
                self.ends.is_set,
            )
            if guard.sent == 0 and report.stopped is None and not self.ends.is_set():
                report.stopped = "no command ever came"
                logger.warning(
                    "no command ever came of %d queries, %d of them refused or lost",
                    report.queries,
                    report.failures,
                )
            return report
        except InputError:
            raise
        except Exception as error:  # a bus, a camera, a full disk; the robot is stopped by now
            text = f"{type(error).__name__}: {str(error).strip()[:300]}"
            raise InputError(
                "a robot, cameras and a disk that go on", text, "see to it; the robot was stopped"
            ) from error
        finally:
            self.acting = False
            watchdog.set()
            self.told(
                f"{guard.sent} commands{'' if config.live else ' (dry run: none was sent)'}, "
                f"{guard.clipped} clipped, "
                f"{guard.late} late, {guard.holds} holds"
            )

    def _summarise(self, commands: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Tell the operator what a dry run would have sent."""
        if commands:
            wanted, sent = (np.array(each) for each in zip(*commands, strict=True))
            clipped = (np.abs(wanted - sent) > 1e-9).sum(axis=0)
            for d, name in enumerate(self.body.actions):
                low, high = sent[:, d].min(), sent[:, d].max()
                self.told(
                    f"  {name} would have gone {low:.4g}..{high:.4g}, {clipped[d]} of "
                    f"{len(sent)} clipped"
                )

    def _first_observation(self, patience_s: float = 5.0) -> None:
        """Observe the robot once, and wait for cameras that have just been switched on."""
        until = time.monotonic() + patience_s
        while True:
            with contextlib.suppress(TimeoutError):
                self.body.observe()
                return
            if time.monotonic() > until:
                names = list(self.body.cameras.values())
                raise InputError(
                    f"pictures of {names}", f"none in {patience_s:g} s", "look after the cameras"
                )
            time.sleep(0.05)

    def _keep(self, recorder: Recorder | None) -> None:
        """Save or discard the recording of an episode."""
        if recorder is None:
            return
        self.saving = True
        try:
            if self.forgets.is_set():
                recorder.discard()
                self.told("forgotten")
            elif frames := recorder.save(self.verdict):
                said = ""
                if self.verdict is not None:
                    said = ", which succeeded" if self.verdict else ", which failed"
                self.told(
                    f"recorded {frames} frames as episode {recorder.episodes - 1} of "
                    f"{self.config.out}{said}"
                )
        except Exception as error:
            # the robot must be released even if the recording fails
            self.told(f"the episode could not be recorded: {type(error).__name__}: {error}")
        self.saving = False

    def _between(self, episode: int) -> bool:
        """Wait while the operator puts things back; tell whether to go on."""
        self.ends.clear()
        self.told(
            f"episode {episode + 1} of {self.config.episodes} begins in {self.config.reset_s:g} "
            f"s, or at the right arrow"
        )
        self.ends.wait(self.config.reset_s)
        return self.why is None

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        """Connect the robot, and release it at the end."""
        try:
            self.robot.connect()
        except (ConnectionError, ImportError, TimeoutError, OSError) as error:
            text = str(error).strip().replace("\n", " ")
            raise InputError(
                "a robot that answers",
                f"{type(error).__name__}: {text}",
                "check port, power, cameras",
            ) from None
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        """Release the robot, after the operator has confirmed that somebody supports it."""
        with contextlib.suppress(KeyboardInterrupt, EOFError, OSError):
            if self.config.live and sys.stdin is not None and sys.stdin.isatty():
                input(
                    "the robot keeps its place under power: support it, then press Enter to "
                    "disconnect it "
                )
        self.body.release()
