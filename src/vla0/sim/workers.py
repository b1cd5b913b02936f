"""Roll out episodes in many processes that share one batched policy.

Each process holds simulators and asks the parent process for chunks. This file imports no torch, so
that the processes do not need it.
"""

import logging
import math
import multiprocessing
import pickle
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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

# Turns B observations into chunks (B, H, D). An exception in the place of a chunk (H, D) is an
# error of that episode alone, which is tried again.
Predict = Callable[[Sequence[Observation]], np.ndarray | Sequence[np.ndarray | Exception]]
Job = tuple[str, str, int]  # policy, task, seed
ATTEMPTS = 3  # how often an episode is tried whose simulator crashes
IDLE_S = 0.05  # a batch is decoded when all processes ask, or when none asked for so long
SILENT_S = 300.0  # a process that sends nothing for so long is taken for dead


class NoChunkError(Exception):
    """Given in place of a chunk that a policy elsewhere did not send.

    Its episode has an error line that begins with this name, and is tried again, also after the
    run: it says nothing of the simulator.
    """


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How episodes are rolled out in a process."""

    make_env: Callable[
        [str], Env
    ]  # makes the Env of a task; picklable, as it runs in the processes
    # The arguments of ChunkPolicy: chunk_size, n_action_steps, ensemble, its k, periodic dimensions
    acting: tuple[Any, ...]
    keep: int  # how many worlds a process keeps
    render: bool = False  # film every step, not only those that the policy looks at


class WorkerPool:
    """The processes, and the loop that gives them jobs and chunks.

    Args:
        policies: The policies by name.
        rollout: How the processes roll out episodes.
        out: Folder for the videos and the actions of the episodes. None keeps none.
        count: Number of processes.
    """

    def __init__(
        self, policies: Mapping[str, Predict], rollout: RolloutConfig, out: Path | None, count: int
    ):
        self.policies, self.rollout, self.out, self.count = policies, rollout, out, count
        # All of these have the pipe to a process as the key.
        self.processes: dict[Connection, Any] = {}
        self.busy: dict[Connection, tuple] = {}  # the job, and the time of the last message
        self.asking: dict[Connection, Observation] = {}
        self.attempts: dict[tuple, int] = {}

    def run(self, jobs: deque[Job], record: Callable[[dict[str, Any]], None]) -> None:
        """Work through the jobs.

        Whatever the policy raises ends the run.

        Args:
            jobs: The episodes to play. They are taken out of the deque.
            record: Receives a line for each episode that ends and for each attempt that crashed.

        Raises:
            InputError: When a world cannot be made.
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
            self.close()

    def close(self) -> None:
        """End the processes."""
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.join()
        self.processes = {}

    def _spawn(self) -> None:
        """Start a process."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, self.rollout, self.out), daemon=True)
        with _script_left_out(self.rollout):
            process.start()
        theirs.close()
        self.processes[ours] = process

    def _assign(self, pipe, job, jobs, record) -> None:
        """Give a process a job."""
        self.busy[pipe] = (job, time.monotonic())
        try:
            pipe.send(job)
        except OSError:
            self._replace_lost(pipe, "the process was gone", jobs, record)

    def _receive(self, pipe: Connection, jobs: deque, record: Callable[[dict], None]) -> None:
        """Take a process's message: a question, the end of an episode, or a refusal."""
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
        # The caller made a mistake, such as an unknown task or a missing package. It would be the
        # same at every attempt.
        if kind == "refused":
            raise content
        record(content)
        if content["error"] is not None:
            self._retry(job, jobs)

    def _answer(self) -> None:
        """Decode one batch for each policy that is asked, and send the chunks."""
        asking, self.asking = self.asking, {}
        for name, predict in self.policies.items():
            pipes = [pipe for pipe in asking if self.busy[pipe][0][0] == name]
            if pipes:
                for pipe, chunk in zip(
                    pipes, predict([asking[pipe] for pipe in pipes]), strict=True
                ):
                    try:
                        pipe.send(chunk)
                    except OSError:
                        logger.debug(
                            "a process died while its chunk was decoded; `wait` reports it"
                        )
        self._all_heard()

    def _all_heard(self) -> None:
        """Count nobody as silent: a decode may take long, and others spoke meanwhile."""
        now = time.monotonic()
        self.busy = {pipe: (job, now) for pipe, (job, _) in self.busy.items()}

    def _drop_silent(self, jobs, record) -> None:
        """Replace the processes that have sent nothing for too long."""
        now = time.monotonic()
        for pipe, (_, last_message_at) in list(self.busy.items()):
            if pipe not in self.asking and now - last_message_at > SILENT_S:
                self.processes[pipe].kill()
                self._replace_lost(
                    pipe, f"the simulator said nothing for {SILENT_S:.0f} s", jobs, record
                )

    def _replace_lost(
        self, pipe: Connection, error: str, jobs: deque, record: Callable[[dict], None]
    ) -> None:
        """Record the error of a lost process, start another one, and try its job again."""
        job, _ = self.busy.pop(pipe)
        self.asking.pop(pipe, None)
        self.processes.pop(pipe).join(timeout=5)
        pipe.close()
        record(_line(job, error=error))
        self._retry(job, jobs)
        self._spawn()

    def _retry(self, job: tuple, jobs: deque) -> None:
        """Put a job back until it has had all its attempts."""
        self.attempts[job] = self.attempts.get(job, 0) + 1
        if self.attempts[job] < ATTEMPTS:
            jobs.append(job)
        else:
            logger.error("%s: given up after %d attempts; see the error lines", job, ATTEMPTS)


@contextmanager
def _script_left_out(needed: Any) -> Iterator[None]:
    """Let a process that starts not run the user's script, as "spawn" does, unless it needs it.

    Of a script that imports torch, each of sixteen processes would take a gigabyte and seconds, and
    one that does not ask for its name would begin anew in each.

    Args:
        needed: What the process is given.
    """
    script = vars(sys.modules["__main__"])
    hidden = {name: script[name] for name in ("__spec__", "__file__") if name in script}
    if b"__main__" in pickle.dumps(needed):  # something in it is defined in the script
        hidden = {}
    script |= dict.fromkeys(hidden)
    try:
        yield
    finally:
        script |= hidden


class _ParentGoneError(BaseException):  # not an Exception, which would count as the simulator's
    """Raised when the parent has ended or was killed, so that nobody waits for an episode."""


def work(pipe: Connection, rollout: RolloutConfig, out: Path | None) -> None:
    """Play episodes in a process, with chunks from the parent, until the parent ends.

    Args:
        pipe: Leads to the parent.
        rollout: How episodes are rolled out.
        out: Folder for the videos and the actions of the episodes. None keeps none.
    """
    with suppress(_ParentGoneError, KeyboardInterrupt):
        _work(pipe, rollout, out)


def _work(pipe: Connection, rollout: RolloutConfig, out: Path | None) -> None:
    """Do what `work` says, and raise _ParentGoneError when the parent ends."""
    envs: dict[str, Env] = {}

    def send(kind: str, content: Any) -> None:
        try:
            pipe.send((kind, content))
        except OSError:
            raise _ParentGoneError from None

    def receive() -> Any:
        try:
            return pipe.recv()
        # OSError: the connection is reset where the parent was killed before it read a message.
        except (EOFError, OSError):
            raise _ParentGoneError from None

    def ask(observation: Observation) -> np.ndarray:
        send("asks", observation)
        if isinstance(chunk := receive(), Exception):
            raise chunk
        return chunk

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
        except NoChunkError as error:  # the world is as good as before
            send("ends", _line(job, error=f"{NoChunkError.__name__}: {error}"))
        except Exception as error:
            # Whatever a simulator raises becomes an error line, never a failure of the policy.
            envs.pop(task, None)
            logger.debug("%s", traceback.format_exc())
            send("ends", _line(job, error=f"{type(error).__name__}: {error}"))


def episode(
    job: Job, env: Env, policy: ChunkPolicy, out: Path | None, render: bool
) -> dict[str, Any]:
    """Play an episode, and save its video and its actions in `out`/videos, unless that is None.

    Args:
        job: The names of the policy and of the task, and the seed.
        env: The Env of the task.
        policy: Acts in it.
        out: Folder of the results.
        render: Film every step. Otherwise the video holds what the policy looked at.

    Returns:
        The line for episodes.jsonl.
    """
    name, task, seed = job
    started, frames = time.monotonic(), []

    def film(observation: Observation, _: np.ndarray) -> None:
        if render or policy.looked:
            frames.append({c: f if f.ndim == 3 else f[-1] for c, f in observation.images.items()})

    video = None
    if out is None:
        finished = rollout(env, policy, seed)
    else:
        finished = rollout(env, policy, seed, film)
        video = f"videos/{name}_{task.replace('/', '-')}_{seed}.mp4"
        write_video(out / video, frames, env.fps if render else env.fps / policy.n_action_steps)
        _write_actions((out / video).with_suffix(".npz"), finished)
    seconds = round(time.monotonic() - started, 2)
    return _line(job, success=finished.success, steps=finished.steps, seconds=seconds, video=video)


def _line(
    job: tuple, success=None, steps=None, seconds=None, video=None, error=None
) -> dict[str, Any]:
    """Return a line for episodes.jsonl."""
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
    """Write an mp4 (H.264) that plays in real time, with the cameras side by side.

    Args:
        file: The file to write.
        frames: The pictures {camera: (h, w, 3) uint8} of each instant.
        fps: Instants per second. Above 40, frames are left out.
    """
    import av

    stride = max(1, math.ceil(fps / 40))
    rate = Fraction(fps / stride).limit_denominator(100)
    # The file is written under another name first: a process whose parent was killed may still film
    # while a process of the next evaluation films the same episode.
    with set_aside(file) as partial, av.open(str(partial), "w") as container:
        stream: Any = None
        for images in frames[::stride]:
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
    """Write the actions and the chunks of an episode."""
    queries = np.array([step for step, _ in episode.chunks], np.int64)
    chunks = np.stack([chunk for _, chunk in episode.chunks])
    with set_aside(file) as partial:
        np.savez_compressed(partial, actions=episode.actions, queries=queries, chunks=chunks)
