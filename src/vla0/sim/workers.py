"""Many environments in processes of their own share one batched policy.

This file imports no torch: its processes hold a simulator each and ask the parent for chunks.
"""

import logging
import math
import multiprocessing
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from vla0.core.rollout import ChunkPolicy, Env, rollout
from vla0.core.spec import Episode, Observation
from vla0.errors import InputError
from vla0.files import set_aside

logger = logging.getLogger(__name__)

Predict = Callable[[Sequence[Observation]], np.ndarray]  # observations → chunks (B, H, D)
Job = tuple[str, str, int]  # policy, task, seed
ATTEMPTS = 3  # of an episode whose simulator crashes
IDLE_S = 0.05  # a batch goes when all ask, or when nothing came for so long
SILENT_S = 300.0  # a process that says nothing for so long is taken for dead


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How episodes are rolled out, in whichever process."""

    make_env: Callable[[str], Env]  # picklable: it runs in the processes
    # chunk_size, n_action_steps, ensemble, its k and what wraps, as ChunkPolicy takes them
    acting: tuple[Any, ...]
    keep: int  # worlds that a process holds
    render: bool = False  # film every step, not only those that the policy looks at


class WorkerPool:
    """The processes, and the loop that feeds them.

    policies: by name. out: folder for the episodes' videos and actions. count: processes.
    """

    def __init__(
        self, policies: Mapping[str, Predict], rollout: RolloutConfig, out: Path, count: int
    ):
        self.policies, self.rollout, self.out, self.count = policies, rollout, out, count
        self.processes: dict[Connection, Any] = {}  # pipe → process
        self.busy: dict[Connection, tuple] = {}  # pipe → (job, time of its last word)
        self.asking: dict[Connection, Observation] = {}
        self.attempts: dict[tuple, int] = {}

    def run(self, jobs: deque[Job], record: Callable[[dict[str, Any]], None]) -> None:
        """Works through the jobs.

        record gets a line for each episode that ends and for each attempt that crashed.

        Raises what the policy raises, and the InputError of a world that cannot be made.
        """
        try:
            for _ in range(self.count):
                self._spawn()
            while jobs or self.busy:
                for pipe in [pipe for pipe in self.processes if pipe not in self.busy]:
                    if jobs:
                        self._assign(pipe, jobs.popleft(), jobs, record)
                heard = wait(list(self.busy), timeout=IDLE_S)
                for pipe in heard:
                    self._receive(pipe, jobs, record)  # type: ignore[arg-type]
                if self.asking and (not heard or len(self.asking) == len(self.busy)):
                    self._answer()
                self._drop_silent(jobs, record)
        finally:
            for process in self.processes.values():
                process.kill()
            for process in self.processes.values():
                process.join()

    def _spawn(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, self.rollout, self.out), daemon=True)
        process.start()
        theirs.close()
        self.processes[ours] = process

    def _assign(self, pipe, job, jobs, record) -> None:
        self.busy[pipe] = (job, time.monotonic())
        try:
            pipe.send(job)
        except OSError:
            self._replace_lost(pipe, "the process was gone", jobs, record)

    def _receive(self, pipe: Connection, jobs: deque, record: Callable[[dict], None]) -> None:
        job, _ = self.busy[pipe]
        try:
            kind, content = pipe.recv()
        except (EOFError, OSError):
            self._replace_lost(
                pipe,
                f"the simulator's process died (exit code {self.processes[pipe].exitcode})",
                jobs,
                record,
            )
            return
        self.busy[pipe] = (job, time.monotonic())
        if kind == "asks":
            self.asking[pipe] = content
            return
        del self.busy[pipe]
        # our caller's mistake (an unknown task, a missing package), the same at every attempt
        if kind == "refused":
            raise content
        record(content)
        if content["error"] is not None:
            self._retry(job, jobs)

    def _answer(self) -> None:
        """One batch for each policy that is asked."""
        asking, self.asking = self.asking, {}
        for name, predict in self.policies.items():
            pipes = [pipe for pipe in asking if self.busy[pipe][0][0] == name]
            if pipes:
                for pipe, chunk in zip(
                    pipes, predict([asking[pipe] for pipe in pipes]), strict=True
                ):
                    try:
                        pipe.send(chunk)
                        # decoding may have taken its time
                        self.busy[pipe] = (self.busy[pipe][0], time.monotonic())
                    except OSError:
                        logger.debug(
                            "a process died while its chunk was decoded; `wait` reports it"
                        )

    def _drop_silent(self, jobs, record) -> None:
        now = time.monotonic()
        for pipe, (_, heard) in list(self.busy.items()):
            if pipe not in self.asking and now - heard > SILENT_S:
                self.processes[pipe].kill()
                self._replace_lost(
                    pipe, f"the simulator said nothing for {SILENT_S:.0f} s", jobs, record
                )

    def _replace_lost(
        self, pipe: Connection, error: str, jobs: deque, record: Callable[[dict], None]
    ) -> None:
        job, _ = self.busy.pop(pipe)
        self.asking.pop(pipe, None)
        self.processes.pop(pipe).join(timeout=5)
        pipe.close()
        record(_line(job, error=error))
        self._retry(job, jobs)
        self._spawn()

    def _retry(self, job: tuple, jobs: deque) -> None:
        self.attempts[job] = self.attempts.get(job, 0) + 1
        if self.attempts[job] < ATTEMPTS:
            jobs.append(job)
        else:
            logger.error("%s: given up after %d attempts; see the error lines", job, ATTEMPTS)


class _ParentGoneError(BaseException):  # no Exception: it is not the simulator's
    """The parent has ended or was killed: nobody waits for an episode."""


def work(pipe: Connection, rollout: RolloutConfig, out: Path) -> None:
    """A process's life: episodes in environments of its own, chunks from the parent; it ends when
    the parent does.
    """
    with suppress(_ParentGoneError, KeyboardInterrupt):
        _work(pipe, rollout, out)


def _work(pipe: Connection, rollout: RolloutConfig, out: Path) -> None:
    envs: dict[str, Env] = {}

    def send(kind: str, content: Any) -> None:
        try:
            pipe.send((kind, content))
        except OSError:
            raise _ParentGoneError from None

    def receive() -> Any:
        try:
            return pipe.recv()
        except (EOFError, OSError):  # a reset, where the parent was killed with a word unread
            raise _ParentGoneError from None

    def ask(observation: Observation) -> np.ndarray:
        send("asks", observation)
        return receive()

    policy = ChunkPolicy(ask, *rollout.acting)
    while True:
        job = receive()
        task = job[1]
        try:
            if task not in envs:
                if len(envs) >= rollout.keep:
                    envs.pop(next(iter(envs))).close()
                envs[task] = rollout.make_env(task)
            send("ends", episode(job, envs[task], policy, out, rollout.render))
        except InputError as error:
            send("refused", error)
        except Exception as error:
            # whatever a simulator raises is a line of its own, never a failure of the policy
            envs.pop(task, None)
            logger.debug("%s", traceback.format_exc())
            send("ends", _line(job, error=f"{type(error).__name__}: {error}"))


def episode(job: Job, env: Env, policy: ChunkPolicy, out: Path, render: bool) -> dict[str, Any]:
    """The line of one episode, whose video and actions are then in `out`/videos.

    The video holds what the policy looked at, or every step where `render` is set.
    """
    name, task, seed = job
    started, frames = time.monotonic(), []

    def film(observation: Observation, _: np.ndarray) -> None:
        if render or policy.looked:
            frames.append(dict(observation.images))

    played = rollout(env, policy, seed, film)
    video = f"videos/{name}_{task.replace('/', '-')}_{seed}.mp4"
    write_video(out / video, frames, env.fps if render else env.fps / policy.n_action_steps)
    _write_actions((out / video).with_suffix(".npz"), played)
    seconds = round(time.monotonic() - started, 2)
    return _line(job, success=played.success, steps=played.steps, seconds=seconds, video=video)


def _line(
    job: tuple, success=None, steps=None, seconds=None, video=None, error=None
) -> dict[str, Any]:
    name, task, seed = job
    return dict(
        policy=name,
        task=task,
        seed=seed,
        success=success,
        steps=steps,
        seconds=seconds,
        video=video,
        error=error,
    )


def write_video(file: Path, frames: Sequence[Mapping[str, np.ndarray]], fps: float) -> None:
    """An mp4 (H.264) in real time at no more than 40 frames a second, cameras side by side."""
    import av

    every = max(1, math.ceil(fps / 40))
    rate = Fraction(fps / every).limit_denominator(100)
    # A process whose parent was killed may film on, while one of the next evaluation films the same
    # episode.
    with set_aside(file) as partial, av.open(str(partial), "w") as container:
        stream: Any = None
        for images in frames[::every]:
            picture = np.concatenate(list(images.values()), axis=1)
            picture = picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2]
            if stream is None:
                stream = container.add_stream("libx264", rate=rate, options={"crf": "20"})
                stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
                stream.codec_context.thread_count = 1
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                )
            )
        container.mux(stream.encode())


def _write_actions(file: Path, episode: Episode) -> None:
    queries = np.array([step for step, _ in episode.chunks], np.int64)
    chunks = np.stack([chunk for _, chunk in episode.chunks])
    with set_aside(file) as partial:
        np.savez_compressed(partial, actions=episode.actions, queries=queries, chunks=chunks)
