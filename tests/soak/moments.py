"""One run in a forked process: it kills itself at a line, a file or an instant of a kind of moment
that was chosen.

Nothing here is known to the product: functions are wrapped in the process of the run alone.
"""

import functools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import vla0
from vla0.quiet import hush

hush()  # before what is imported next, also in the process that all runs are forked from

TOOL = sys.monitoring.PROFILER_ID
# files whose lines count, beside our own
TOUCHING = ("/shutil.py", "/pathlib.py", "/safetensors/", "/transformers/trainer")
# events of files
FILES = {
    "open",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
}
# a run is killed before a line, before it touches a file, or at an instant
HOW = ("lines", "events", "seconds")
# What a run imports on its way, for the process that all runs are forked from. None of it computes
# or starts a thread.
NEEDED = [
    "soak.moments",
    "vla0.train.run",
    "vla0.policy",
    "vla0.serve.server",
    "vla0.sim.evaluate",
    "vla0.sim.workers",
    "pytest",
    "peft",
    "av",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "lerobot.datasets.lerobot_dataset",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
]


class Moments:
    """Which kind of moment a run is in.

    It counts lines, events of files and seconds of each kind, or kills where a plan says.

    note: a file that says where the run is, and stays when it is killed. plan: {"kind": ..., and of
    HOW one: how much of it the run may pass in moments of that kind}. counts: which of HOW is
    counted; lines take time, so seconds are counted apart.
    """

    def __init__(self, note: Path, plan: dict[str, Any] | None = None, counts: str | None = None):
        self.note, self.plan, self.counts = (
            os.open(note, os.O_RDWR | os.O_CREAT | os.O_TRUNC),
            plan or {},
            counts,
        )
        self.now, self.ticking = "", False
        self.found: dict[str, dict[str, float]] = {how: {} for how in HOW}
        self.since, self.left = (
            time.monotonic(),
            {how: self.plan[how] for how in HOW if how in self.plan},
        )
        self.own, self.known = str(Path(vla0.__file__).parent), {}
        sys.monitoring.use_tool_id(TOOL, "soak")
        sys.monitoring.register_callback(TOOL, sys.monitoring.events.LINE, self._line)
        sys.addaudithook(self._event)

    @contextmanager
    def during(self, kind: str):
        """Marks what happens meanwhile as of that kind."""
        before = self.now
        self._to(kind)
        try:
            yield
        finally:
            self._to(before)

    def wrap(self, owner: Any, name: str, kind: str | Callable[..., str | None]) -> None:
        """Marks calls of a function; kind: its name, or what the arguments say (None: as around
        it).
        """
        function = getattr(owner, name)

        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            with self.during((kind if isinstance(kind, str) else kind(*args)) or self.now):
                return function(*args, **kwargs)

        setattr(owner, name, wrapped)

    def _to(self, kind: str) -> None:
        if self.ticking:
            self.left["seconds"], self.ticking = signal.setitimer(signal.ITIMER_REAL, 0)[0], False
        sys.monitoring.set_events(TOOL, 0)
        now = time.monotonic()
        self._count("seconds", now - self.since)
        self.since, self.now = now, kind
        self._write(kind)
        chosen = kind == self.plan.get("kind")
        if self.counts == "lines" or (chosen and "lines" in self.left):
            sys.monitoring.set_events(TOOL, sys.monitoring.events.LINE)
        # SIGALRM ends a process as SIGKILL does, also within a C function
        if chosen and "seconds" in self.left:
            self.ticking = True
            signal.setitimer(signal.ITIMER_REAL, max(self.left["seconds"], 1e-6))

    def _line(self, code, line):
        if code not in self.known:
            file = code.co_filename
            self.known[code] = file.startswith(self.own) or any(part in file for part in TOUCHING)
        if not self.known[code]:
            return sys.monitoring.DISABLE
        self._passes("lines", lambda: f"line {line} of {Path(code.co_filename).name}")

    def _event(self, event: str, args: tuple) -> None:
        if event in FILES:
            self._passes("events", lambda: f"{event} {args[0]}")

    def _passes(self, how: str, place: Callable[[], str]) -> None:
        self._count(how, 1)
        if how in self.left and self.now == self.plan["kind"]:
            self.left[how] -= 1
            if self.left[how] <= 0:
                self._write(f"{self.now}, before {place()}")
                os.kill(os.getpid(), signal.SIGKILL)

    def _count(self, how: str, more: float) -> None:
        self.found[how][self.now] = self.found[how].get(self.now, 0) + more

    def _write(self, text: str) -> None:
        os.pwrite(self.note, text.ljust(200)[:200].encode(), 0)


def begins(log: Path) -> None:
    """Makes a forked process like one that was started by hand, in a session of its own; what it
    says goes to a file.
    """
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # not that of the process it was forked from
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)


def trains(
    dataset: Path,
    output: Path,
    changes: dict,
    note: Path,
    plan: dict | None,
    counts: Path | None,
    log: Path,
) -> None:
    """Trains as `vla0 train` would, after a look whether `last` loads.

    counts: a file for what was counted, by the name of what is: one of HOW.
    """
    begins(log)
    import torch
    from conftest import make_recipe

    from vla0.train import checkpoints as keep
    from vla0.train import run as train
    from vla0.train.config import TrainConfig, build
    from vla0.train.trainer import VLA0Trainer

    torch.set_num_threads(1)
    look(output)
    moments = Moments(note, plan, counts and counts.name)
    moments.wrap(train, "main", "step")
    moments.wrap(VLA0Trainer, "_save_checkpoint", "save")
    for name in ("publish", "save"):
        moments.wrap(keep.models, name, "publish")
    moments.wrap(keep, "point", lambda link, name: "publish" if link.name == "last" else "best")
    moments.wrap(keep.CheckpointCallback, "_rank", "best")
    moments.wrap(keep.CheckpointCallback, "_prune", "prune")
    moments.wrap(sys.modules["transformers.trainer"], "rotate_checkpoints", lambda **_: "prune")
    moments.wrap(
        keep, "write_whole", lambda file, content: "card" if file.name == "README.md" else None
    )
    moments.wrap(keep, "chart", "card")
    recipe = make_recipe(dataset, output, **changes)
    recipe["data"] |= {"held_out": 1, "num_workers": recipe.pop("workers", 0)}
    train.main(build(TrainConfig, recipe, "soak"))
    if counts is not None:
        counts.write_text(json.dumps(moments.found))


def loads(output: Path, log: Path) -> None:
    """Fails where `last` or `best` of a training names what is no whole checkpoint."""
    begins(log)
    look(output)


def look(output: Path) -> None:
    """The same, within a process that goes on."""
    from vla0.policy import VLA0

    for name in ("last", "best"):
        if (output / name).is_symlink():
            VLA0.from_pretrained(output / name)


def makes_data(folder: Path, log: Path) -> None:
    """The dataset of all trainings."""
    begins(log)
    from conftest import make_dataset

    shutil.rmtree(folder, ignore_errors=True)
    make_dataset(folder)


class Walk:
    """Done when the place, which the actions move, passes what task and seed say: some never are.

    Slow enough to be killed.
    """

    fps, max_steps = 20.0, 12

    def __init__(self, task: str):
        self.task = task

    def reset(self, seed):
        self.place, self.goal = (
            0.0,
            1 + 8 * np.random.default_rng([seed, *self.task.encode()]).random(),
        )
        return self._observe()

    def step(self, action):
        time.sleep(0.01)
        self.place += float(action[0])
        return self._observe(), self.place > self.goal

    def close(self):
        pass

    def _observe(self):
        frame = np.full((32, 32, 3), int(self.place * 20), np.uint8)
        return vla0.Observation({"front": frame}, self.task, np.array([self.place]))


def make_walk(config, task):
    """A world of an evaluation."""
    return Walk(task)


def walk(observations, pace=0.5):
    """Chunks of a policy that walks."""
    return np.full((len(observations), 4, 1), pace, np.float32)


def evaluates(
    output: Path,
    tasks: tuple[str, ...],
    episodes: int,
    note: Path,
    plan: dict | None,
    counts: Path | None,
    log: Path,
):
    """Evaluates two policies in `tasks` x `episodes` of that world."""
    begins(log)
    from vla0.sim import evaluate
    from vla0.sim.workers import WorkerPool

    moments = Moments(note, plan, counts and counts.name)
    moments.wrap(evaluate, "_run", "play")
    for name in ("_same_settings", "mend", "read_episodes"):
        moments.wrap(evaluate, name, "begin")
    moments.wrap(WorkerPool, "_receive", "hear")
    moments.wrap(WorkerPool, "_replace_lost", "lost")
    config = evaluate.EvalConfig(
        tasks=tasks, env="walk", episodes=episodes, first_seed=0, ensemble="mean"
    )
    policies = {"policy": walk, "slow": functools.partial(walk, pace=0.3)}
    evaluate.evaluate(policies, 4, config, output, workers=4, make_env=make_walk)
    if counts is not None:
        counts.write_text(json.dumps(moments.found))
