"""The same episodes on the machines of a Ray cluster: on each GPU a policy of its own, with
simulators beside it.
"""

import logging
import os
import socket
import tempfile
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vla0.errors import InputError
from vla0.sim.workers import ATTEMPTS, Job, Predict, RolloutConfig, WorkerPool

logger = logging.getLogger(__name__)

POLL_S = 0.2
TURNS = 4  # episodes for each simulator that a worker takes at once: a world is built once for them


class RayWorker:
    """A policy and its simulators: one of Ray's actors."""

    def __init__(
        self, load: Callable[[], Mapping[str, Predict]], rollout: RolloutConfig, count: int
    ):
        self.policies, self.rollout, self.count = load(), rollout, count

    def run(self, jobs: list[Job], lines: Any) -> None:
        """Works through the jobs; each line goes into the queue `lines` with the files that belong
        to it.
        """
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            (out / "videos").mkdir()

            def send(line: dict[str, Any]) -> None:
                files = {}
                if line["video"] is not None:
                    video = out / line["video"]
                    for file in (video, video.with_suffix(".npz")):
                        files[str(file.relative_to(out))] = file.read_bytes()
                        file.unlink()
                lines.put((line, files))

            WorkerPool(self.policies, self.rollout, out, min(self.count, len(jobs))).run(
                deque(jobs), send
            )


class RayWorkerPool:
    """As `WorkerPool`, on every machine that a Ray cluster has.

    address: "local" starts a Ray on this machine alone; else a running one's, as `ray.init` takes
    it ("auto", "host:6379", "ray://host:10001"). load: gives the policies by name, on each machine:
    the checkpoint must be found there too, as must LIBERO's meshes. count: simulators beside each
    policy, no more than its share of cores. What a lost machine was doing is done again elsewhere.
    """

    def __init__(
        self,
        address: str,
        load: Callable,
        policies: Mapping[str, Any],
        rollout: RolloutConfig,
        out: Path,
        count: int,
    ):
        self.address, self.load, self.rollout, self.out, self.count = (
            address,
            load,
            rollout,
            out,
            count,
        )
        self.idle: list[Any] = []
        # the promise of a run → (worker, jobs without a line yet)
        self.busy: dict[Any, tuple[Any, list[Job]]] = {}
        self.attempts: dict[Job, int] = {}

    def run(self, jobs: deque[Job], record: Callable[[dict[str, Any]], None]) -> None:
        """Works through the jobs, as `WorkerPool.run`.

        Raises InputError where Ray is missing, out of reach, or nobody is left.
        """
        try:
            import ray
            from ray.util.queue import Queue
        except ImportError:
            raise InputError("Ray", "no package ray", "pip install 'vla0[cluster]'") from None
        self.ray = ray
        self._reach()
        carried = {
            key: value
            for key, value in os.environ.items()
            if key.startswith(("VLA0_", "MUJOCO_", "LP_NUM"))
        }
        try:
            ray.init(
                self.address,
                include_dashboard=False if self.address == "local" else None,
                runtime_env={"env_vars": carried},
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(
                "a Ray cluster", f"'{self.address}': {error}", "--ray local, or `ray start`"
            ) from None
        try:
            self.lines = Queue(actor_options={"num_cpus": 0})
            self._spawn()
            while jobs or self.busy:
                self._assign(jobs)
                done, _ = ray.wait(list(self.busy), timeout=POLL_S)
                self._record(record)
                for promise in done:
                    self._ended(promise, jobs)
        finally:
            ray.shutdown()

    def _reach(self) -> None:
        """Says at once what Ray says after a minute."""
        host, _, port = self.address.removeprefix("ray://").rpartition(":")
        if port.isdigit():
            try:
                socket.create_connection((host, int(port)), timeout=10).close()
            except OSError as error:
                raise InputError(
                    "a Ray cluster", f"'{self.address}': {error}", "`ray start`, or --ray local"
                ) from None

    def _spawn(self) -> None:
        """A worker for each GPU, or for each machine where there is none."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        for node in self.ray.nodes():
            if not node["Alive"]:
                continue
            gpus, cores = (int(node["Resources"].get(kind, 0)) for kind in ("GPU", "CPU"))
            for _ in range(gpus or min(cores, 1)):
                share = max(1, cores // max(gpus, 1))
                make = self.ray.remote(RayWorker).options(
                    num_gpus=min(gpus, 1),
                    num_cpus=share,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
                )
                self.idle.append(make.remote(self.load, self.rollout, min(self.count, share)))

        if not self.idle:
            raise InputError(
                "a machine with cores", "none in the cluster", "add one: `ray start --address ...`"
            )

    def _assign(self, jobs: deque[Job]) -> None:
        while jobs and self.idle:
            taken = [jobs.popleft()]
            while (
                jobs
                and len(taken) < TURNS * self.count
                and (self.rollout.keep > 1 or jobs[0][1] == taken[0][1])
            ):
                taken.append(jobs.popleft())
            worker = self.idle.pop()
            self.busy[worker.run.remote(taken, self.lines)] = (worker, taken)

    def _record(self, record: Callable[[dict[str, Any]], None]) -> None:
        while not self.lines.empty():
            line, files = self.lines.get()
            for name, content in files.items():
                (self.out / name).write_bytes(content)
            record(line)
            job = (line["policy"], line["task"], line["seed"])
            for _, waiting in self.busy.values():
                if job in waiting and line["error"] is None:
                    waiting.remove(job)

    def _ended(self, promise: Any, jobs: deque[Job]) -> None:
        from ray.exceptions import RayActorError, RayTaskError

        worker, left = self.busy.pop(promise)
        try:
            self.ray.get(promise)
            self.idle.append(worker)
        except RayTaskError as error:  # the policy's or the caller's: the same everywhere
            raise error.cause or error from None
        except RayActorError as error:
            if error.actor_init_failed:
                why = str(error).strip().splitlines()[-1]
                raise InputError(
                    "workers that start", why, "vla0 and the checkpoint must be on each machine"
                ) from None
            logger.warning(
                "a worker of the cluster is lost, %d episodes go to others: %s", len(left), error
            )
            for job in left:
                self.attempts[job] = self.attempts.get(job, 0) + 1
            jobs.extend(job for job in left if self.attempts[job] < ATTEMPTS)
            if not self.idle and not self.busy:
                raise InputError(
                    "a machine of the cluster", "none that lives", "the same command goes on later"
                ) from None
