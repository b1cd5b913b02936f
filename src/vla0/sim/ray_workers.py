"""Roll out episodes on the machines of a Ray cluster.

Each GPU holds a policy, with simulators beside it.
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
# A worker takes so many episodes per simulator at once. A world is then built once for all of them.
TURNS = 4


class RayWorker:
    """A policy and its simulators, which run as an actor of Ray's.

    Args:
        load: Loads the policies by name.
        rollout: How episodes are rolled out.
        count: Number of simulators.
    """

    def __init__(
        self, load: Callable[[], Mapping[str, Predict]], rollout: RolloutConfig, count: int
    ):
        self.policies, self.rollout, self.count = load(), rollout, count

    def run(self, jobs: list[Job], lines: Any) -> None:
        """Work through the jobs.

        Args:
            jobs: The episodes to play.
            lines: A queue of Ray's. It receives (line, {file: content}) for each episode.
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
    """Does what `WorkerPool` does, on every machine of a Ray cluster.

    The episodes that a lost machine was playing are played again elsewhere.

    Args:
        address: "local" starts Ray on this machine alone. Otherwise it is the address of a running
            cluster, as `ray.init` takes it ("auto", "host:6379", "ray://host:10001").
        load: Loads the policies by name on each machine, where the checkpoint and LIBERO's meshes
            must be found too.
        policies: The policies by name. Only the names are used.
        rollout: How episodes are rolled out.
        out: Folder for the videos and the actions of the episodes.
        count: Simulators beside each policy, limited to its share of the cores.
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
        self.address = address
        self.load = load
        self.rollout = rollout
        self.out = out
        self.count = count
        self.idle: list[Any] = []
        # {the promise of a run: (worker, jobs without a line yet)}
        self.busy: dict[Any, tuple[Any, list[Job]]] = {}
        self.attempts: dict[Job, int] = {}

    def run(self, jobs: deque[Job], record: Callable[[dict[str, Any]], None]) -> None:
        """Work through the jobs as `WorkerPool.run` does.

        Raises:
            InputError: When Ray is missing or out of reach, or no machine is left.
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
        """Raise InputError at once for an address that does not answer; Ray would take a minute."""
        host, _, port = self.address.removeprefix("ray://").rpartition(":")
        if port.isdigit():
            try:
                socket.create_connection((host, int(port)), timeout=10).close()
            except OSError as error:
                raise InputError(
                    "a Ray cluster", f"'{self.address}': {error}", "`ray start`, or --ray local"
                ) from None

    def _spawn(self) -> None:
        """Start a worker for each GPU, and one on each machine that has none."""
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
        """Give jobs to the idle workers."""
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
        """Record the lines that have arrived, and write their files."""
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
        """Take note that a run has ended, and put the jobs of a lost worker back."""
        from ray.exceptions import RayActorError, RayTaskError

        worker, unfinished = self.busy.pop(promise)
        try:
            self.ray.get(promise)
            self.idle.append(worker)
        except RayTaskError as error:  # an error of the policy or the caller, the same everywhere
            raise error.cause or error from None
        except RayActorError as error:
            if error.actor_init_failed:
                why = str(error).strip().splitlines()[-1]
                raise InputError(
                    "workers that start", why, "vla0 and the checkpoint must be on each machine"
                ) from None
            logger.warning(
                "a worker of the cluster is lost, %d episodes go to others: %s",
                len(unfinished),
                error,
            )
            for job in unfinished:
                self.attempts[job] = self.attempts.get(job, 0) + 1
            jobs.extend(job for job in unfinished if self.attempts[job] < ATTEMPTS)
            if not self.idle and not self.busy:
                raise InputError(
                    "a machine of the cluster", "none that lives", "the same command goes on later"
                ) from None
