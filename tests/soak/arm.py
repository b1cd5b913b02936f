"""Robot episodes in simulated time: whatever the server, the bus, the cameras, the clock and the
operator do.
"""

import logging
import signal
import sys
import traceback
import warnings
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np

from soak import Bar, Until
from soak.sham import Server
from soak.world import GRAIN_S, BusError, RobotInterface, Untimed, World, instructed
from vla0.core.relative import shortest
from vla0.robot.limits import NEVER, ActionLimits
from vla0.robot.loop import MODES, Pacer, drive
from vla0.robot.resample import Resampled
from vla0.robot.safety import SafetyGuard
from vla0.serve import client
from vla0.serve.client import RemotePolicy

TURN = ((2, -180.0, 180.0),)
LIMITS = ActionLimits(
    low=(-1e8, -1.0, -180.0, -1e8),
    high=(1e8, 1.0, 180.0, 1e8),
    step=(NEVER, 0.05, 6.0, NEVER),
    periodic=TURN,
)
SLOW_S = 0.6  # of the SafetyGuard: a command that takes longer is not waited for
NAMES = (
    "late",
    "out of bounds",
    "after the stop",
    "not finite",
    "not held or stopped in time",
    "an error of ours",
)


def episode(seed: int) -> tuple[dict[str, str], dict[str, int]]:
    """({law: how it was broken}, {what happened: how often}) of one episode."""
    rng = np.random.default_rng(seed)
    ill, fps, chunk_size = (
        rng.choice([0.0, 0.05, 0.2, 0.5]),
        float(rng.choice([10, 20, 30, 50])),
        int(rng.integers(2, 17)),
    )
    world = World(rng, rng.choice([0.0, 0.0, 0.001]))
    server = Server(world.clock, rng, chunk_size, fps, rng.choice([0.0, 0.02, 0.1, 0.4]), ill)
    server.numbered, world.server = rng.random() < 0.8, server
    start = np.array([0.0, rng.uniform(-1.9, 1.9), rng.uniform(-180, 180), 0.0])
    body = RobotInterface(world, rng, start, ill)
    loop_fps = fps if rng.random() < 0.7 else float(rng.choice([10, 25, 60]))
    hold_s, stop_s = (0.2, 2.0) if rng.random() < 0.8 else (0.05, 0.4)
    with (
        mock.patch.object(client, "time", world.clock),
        mock.patch.object(client, "connect", server.connect),
    ):
        policy = RemotePolicy("ws://sham", timeout_s=float(rng.choice([0.2, 2.0])), patience_s=1e6)
        world.predict = policy.predict
        if loop_fps != fps:
            world.predict = Resampled(policy.predict, fps, loop_fps, chunk_size, TURN)
            chunk_size = world.predict.chunk_size
        way = str(rng.choice(MODES if chunk_size > 1 else MODES[:2]))
        pace = Pacer(
            fps=loop_fps,
            chunk_size=chunk_size,
            mode=way,
            n_action_steps=None if way == "ensemble" else int(rng.integers(1, chunk_size + 1)),
            periodic=TURN,
        )
        guard = SafetyGuard(body, LIMITS, 1 / loop_fps, start, True, hold_s, stop_s, now=world.now)
        world.guard, guard.touching, guard.apart = guard, Untimed(), Untimed()
        world.clock.ahead = 0.0
        begins = {"signal": 0}

        def interrupt() -> None:
            begins["signal"] += 1
            guard.stop(signal.Signals.SIGTERM.name)

        for moment in sorted(rng.uniform(0, 6.0, rng.choice([0, 0, 0, 1, 3]))):
            world.due.append((moment, lambda: instructed(int(rng.integers(1, 4000)), interrupt)))
        failure = None
        try:
            drive(world, guard, pace, round(6 * loop_fps))
        except BusError:
            pass
        except Exception:
            failure = traceback.format_exc()
        finally:
            if sys.monitoring.get_tool(sys.monitoring.DEBUGGER_ID):
                sys.monitoring.set_events(sys.monitoring.DEBUGGER_ID, 0)
        policy.close()
    counts = {
        "commands": guard.sent,
        "questions": server.asked,
        "dropped": policy.dropped,
        "holds": guard.holds,
        "signals": begins["signal"],
        "stops": guard.stopped is not None,
        "late, not sent": guard.late,
    }
    wrong = judged(body, start, guard, world, pace)
    if failure is not None:
        wrong["an error of ours"] = failure
    if stale := [
        (at, seen) for at, seen in world.asked if not -1e-6 <= at - seen <= pace.oldest_s + 1e-6
    ]:
        wrong["an error of ours"] = f"asked about a picture of {stale[0][1]} at {stale[0][0]}"
    return wrong, counts


def judged(
    body: "RobotInterface", start: np.ndarray, guard: SafetyGuard, world: World, pace: Pacer
) -> dict[str, str]:
    """{law: how it was broken} of what reached the body."""
    wrong: dict[str, str] = {}
    period, low, high, step = (
        1 / pace.fps,
        *(np.array(own) for own in (LIMITS.low, LIMITS.high, LIMITS.step)),
    )
    sends = [(begun, ended, action) for kind, begun, ended, action in body.diary if kind == "send"]
    stops = [begun for kind, begun, _, _ in body.diary if kind == "stop"]
    holds = [begun for kind, begun, _, _ in body.diary if kind == "hold"]
    last = start
    for begun, ended, action in sends:
        if not np.isfinite(action).all():
            wrong["not finite"] = f"{action} at {begun}"
        beyond, before = (
            np.maximum(0, np.maximum(low - own, own - high)) for own in (action, last)
        )
        change = np.abs(shortest(action - last, TURN))
        if (beyond > np.maximum(0, before - step) + 1e-9).any() or (change > step + 1e-9).any():
            wrong["out of bounds"] = f"{action} after {last} at {begun}"
        last = action
        if begun > world.latest(action, pace, sends) + period + 1e-4:
            wrong["late"] = f"{action} at {begun}, meant for {world.latest(action, pace, sends)}"
        for stop in stops:
            hung = begun < stop and ended - begun > SLOW_S and stops[-1] >= ended
            if ended > stop and not hung:
                wrong["after the stop"] = f"a command from {begun} to {ended}, stops at {stops}"
    if stops and any(hold > stops[0] for hold in holds):
        wrong["after the stop"] = f"holds at {holds}, stops at {stops}"
    if guard.stopped is not None and not stops:
        wrong["after the stop"] = "stopped, and the body was never told"
    if not world.jumps:
        slack = 4 * GRAIN_S + guard.grace_s
        end = guard.stopped_at if guard.stopped is not None else world.time
        for (_, fresh, _), (following, *_) in pairwise([*sends, (end, end, None)]):
            busy = sum(
                min(ended, following) - max(begun, fresh)
                for kind, begun, ended, _ in body.diary
                if kind == "hold" and ended > fresh and begun < following
            )
            silent = min(following, end) - fresh
            if silent > guard.hold_s + slack and not any(
                fresh <= hold <= following for hold in holds
            ):
                wrong["not held or stopped in time"] = (
                    f"silent for {silent} from {fresh}, holds at {holds}"
                )
            if silent - busy > guard.stop_s + slack:
                wrong["not held or stopped in time"] = (
                    f"silent for {silent} from {fresh}, not stopped"
                )
        if stops and guard.stopped is not None:
            waited = sum(
                ended - max(begun, guard.stopped_at)
                for kind, begun, ended, _ in body.diary
                if kind == "hold" and ended > guard.stopped_at
            )
            if stops[0] - guard.stopped_at > SLOW_S + waited + slack:
                wrong["not held or stopped in time"] = (
                    f"asked to stop at {guard.stopped_at}, told at {stops[0]}"
                )
    return wrong


def episodes(until: Until, seed: int, folder: Path) -> list[Bar]:
    """Bars of episodes: what reached the body late, out of bounds or after the stop."""
    bars = {name: Bar(f"robot: {name}", 1000) for name in NAMES}
    counts: dict[str, int] = {}
    done = 0
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        disabled, logging.root.manager.disable = logging.root.manager.disable, logging.CRITICAL
        try:
            while until.goes_on(done):
                wrong, happened = episode(seed + done)
                for name, text in wrong.items():
                    bars[name].wrong.append(f"episode {seed + done}: {text}")
                counts = {
                    name: counts.get(name, 0) + int(count) for name, count in happened.items()
                }
                done += 1
        finally:
            logging.disable(disabled)
    for bar in bars.values():
        bar.done = done
    bars["late"].remark = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    return list(bars.values())
