"""LeRobot's asynchronous inference (gRPC), for its own `robot_client`: one checkpoint, the very
pixels that it was trained on.

LeRobot's server resizes pictures before the policy sees them, loads whatever model a client names,
and unpickles what anybody sends. Here the checkpoint is the server's, pictures go through the
spine, and of a pickle only arrays and LeRobot's own messages are taken. The protocol knows no key:
it is for this machine, or the end of a tunnel.
"""

import contextlib
import io
import logging
import math
import pickle
import signal
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from queue import Empty, Queue
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import torch
from lerobot.async_inference.helpers import RemotePolicyConfig, TimedAction, TimedObservation
from lerobot.transport import services_pb2, services_pb2_grpc

from vla0.checkpoint.safe_pickle import Record, load_arrays
from vla0.core.rollout import rest
from vla0.errors import InputError
from vla0.serve.batches import told
from vla0.serve.listen import ServerLimits, not_free, refuse_open
from vla0.serve.messages import refuse_other_cameras, request

logger = logging.getLogger(__name__)
messages: Any = services_pb2  # generated: its names are not in its text

MESSAGES = {
    ("lerobot.async_inference.helpers", "RemotePolicyConfig"),
    ("lerobot.async_inference.helpers", "TimedObservation"),
    ("lerobot.configs.types", "PolicyFeature"),
    ("lerobot.configs.types", "FeatureType"),
}
STREAM_S = 10.0  # that a message may take to come
PARTS = 10_000  # of a message
IDLE_S = 60.0  # without a word, after which a client may have gone
PATIENCE_S = 2.0  # that a client waits for actions before it hears that there are none


@dataclass(kw_only=True)
class Client:
    """What is remembered of one."""

    features: Mapping[str, Any]
    renamed: Mapping[str, str]
    steps: int
    waiting: Queue = field(default_factory=lambda: Queue(1))  # the newest observation
    answered: deque[int] = field(default_factory=lambda: deque(maxlen=1000))  # steps
    last: tuple[int, np.ndarray] | None = None  # step and chunk of the last answer
    changing: Any = field(default_factory=threading.Lock)
    heard_at: float = field(default_factory=time.monotonic)


class LeRobotServer:
    """The service, LeRobot's AsyncInference.

    policy: of a checkpoint; keys: camera → the robot's name of it.
    """

    def __init__(
        self, policy: Any, limits: ServerLimits | None = None, keys: Mapping[str, str] | None = None
    ):
        self.policy, self.limits, self.keys = (
            policy,
            (limits or ServerLimits()).of(policy.spec),
            dict(keys or {}),
        )
        refuse_other_cameras(self.keys, policy.spec)
        self.clients: OrderedDict[str, Client] = OrderedDict()
        self.guests = threading.Lock()

    def Ready(self, message: Any, context: Any) -> Any:  # noqa: N802
        """A client begins anew."""
        with self.guests:
            self.clients.pop(context.peer(), None)
        return messages.Empty()

    def SendPolicyInstructions(self, message: Any, context: Any) -> Any:  # noqa: N802
        """What the client's robot calls its parts, and how many actions it wants.

        The model is ours, whatever it asks for.
        """
        with self._told(context):
            wanted = _unpacked(message.data, RemotePolicyConfig)
            renamed = {
                str(old).rpartition(".")[2]: str(new).rpartition(".")[2]
                for old, new in wanted.rename_map.items()
            }
            steps = min(max(1, int(wanted.actions_per_chunk)), self.policy.spec.chunk_size)
            self._admit(
                context.peer(),
                Client(features=wanted.lerobot_features, renamed=renamed, steps=steps),
            )
        return messages.Empty()

    def SendObservations(self, parts: Iterator[Any], context: Any) -> Any:  # noqa: N802
        """Takes the newest observation; one that nobody has asked about yet makes room for it."""
        with self._told(context):
            seen, client = (
                _unpacked(self._whole(parts, context), TimedObservation),
                self._client(context),
            )
            if not seen.must_go and seen.timestep in client.answered:
                return messages.Empty()
            with client.changing:
                with contextlib.suppress(Empty):
                    client.waiting.get_nowait()
                client.waiting.put_nowait(seen)
        return messages.Empty()

    def GetActions(self, message: Any, context: Any) -> Any:  # noqa: N802
        """A chunk for the newest observation, nothing where none comes."""
        with self._told(context):
            client = self._client(context)
            try:
                seen = client.waiting.get(timeout=PATIENCE_S)
            except Empty:
                return messages.Empty()
            chunk = self._chunk(client, seen)
            period = 1 / self.policy.spec.fps
            timed = [
                TimedAction(
                    seen.timestamp + step * period,
                    seen.timestep + step,
                    torch.from_numpy(action.copy()),
                )
                for step, action in enumerate(chunk[: client.steps])
            ]
            return messages.Actions(data=pickle.dumps(timed))
        return messages.Empty()

    def _admit(self, peer: str, client: Client) -> None:
        """Raises InputError where as many are here as may be: nobody who is active makes room for a
        newcomer.
        """
        with self.guests:
            self.clients.pop(peer, None)
            idle = [
                name
                for name, own in self.clients.items()
                if time.monotonic() - own.heard_at > IDLE_S
            ]
            while len(self.clients) >= self.limits.clients and idle:
                del self.clients[idle.pop(0)]
            if len(self.clients) >= self.limits.clients:
                raise InputError(
                    f"at most {self.limits.clients} clients",
                    "another",
                    "come again when one has gone",
                )
            self.clients[peer] = client

    def _whole(self, parts: Iterator[Any], context: Any) -> bytes:
        """A message of its parts.

        A stream that does not end is ended: it would hold one of a few threads for ever.
        """
        held, clock = io.BytesIO(), threading.Timer(STREAM_S, context.cancel)
        clock.start()
        try:
            for count, part in enumerate(parts):
                held.write(part.data)
                if held.tell() > self.limits.message_bytes or count > PARTS:
                    raise InputError(
                        f"at most {self.limits.message_bytes} bytes",
                        "more",
                        "send smaller pictures",
                    )
        finally:
            clock.cancel()
        return held.getvalue()

    def _chunk(self, client: Client, seen: TimedObservation) -> np.ndarray:
        spec, raw = self.policy.spec, dict(seen.observation)
        message: dict[str, Any] = {
            client.renamed.get(str(name), str(name)): value for name, value in raw.items()
        }
        names = spec.state_names or (client.features.get("observation.state") or {}).get("names")
        if names and (spec.state or spec.relative_dims):
            if missing := [name for name in names if name not in raw]:
                raise InputError(
                    f"the state {list(names)}", f"no '{missing[0]}'", "use the robot of the dataset"
                )
            message["state"] = np.array([float(raw[name]) for name in names])
        observation = request(message, spec, self.keys, self.limits.side).observation
        if client.last is not None and seen.timestep > client.last[0]:
            # What the last chunk said of it decodes faster and changes nothing.
            expected = rest(client.last[1], min(seen.timestep - client.last[0], spec.chunk_size))
            observation = replace(observation, draft_actions=expected)
        chunk = self.policy.predict_batch([observation])[0]
        client.answered.append(seen.timestep)
        client.last = seen.timestep, chunk
        return chunk

    def _client(self, context: Any) -> Client:
        with self.guests:
            if (client := self.clients.get(context.peer())) is None:
                raise InputError(
                    "a client that has told what its robot is",
                    "a stranger",
                    "SendPolicyInstructions first",
                )
            client.heard_at = time.monotonic()
            return client

    @contextlib.contextmanager
    def _told(self, context: Any) -> Iterator[None]:
        """An error becomes the client's answer, in words, and hurts nobody else."""
        try:
            yield
        except Exception as error:
            if context.code() is None:  # not one of gRPC's own
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(told(error)))
            raise


def _unpacked(data: bytes, kind: type) -> Any:
    """A message of LeRobot's, of which nothing was run. Raises InputError for any other."""
    found = load_arrays(io.BytesIO(data), "a message", MESSAGES)
    if not isinstance(found, Record) or found.name != kind.__name__:
        got = found.name if isinstance(found, Record) else type(found).__name__
        raise InputError(f"a {kind.__name__}", got, "use the robot_client of LeRobot 0.6.1")
    own = SimpleNamespace(**{name: found.get(name) for name in (f.name for f in fields(kind))})
    if kind is TimedObservation:
        own.must_go = bool(own.must_go)
        fine = (
            isinstance(own.observation, Mapping)
            and type(own.timestep) is int
            and isinstance(own.timestamp, int | float)
        )
        if not fine or not math.isfinite(own.timestamp):
            raise InputError(
                "an observation with its step and time",
                f"{type(own.observation).__name__}",
                "use LeRobot's client",
            )
    elif not (isinstance(own.lerobot_features, Mapping) and isinstance(own.rename_map, Mapping)):
        raise InputError(
            "features and a rename_map", "none", "use the robot_client of LeRobot 0.6.1"
        )
    return own


def serve_lerobot(
    server: LeRobotServer,
    host: str,
    port: int,
    ready: Callable[[int], None],
    stop: threading.Event | None = None,
) -> None:
    """Serves until SIGINT or SIGTERM, or until `stop` is set.

    Raises InputError where it cannot, or must not, listen.
    """
    refuse_open(host, protocol="lerobot")
    workers = ThreadPoolExecutor(4 + 2 * min(server.limits.clients, 16), "lerobot")
    service = grpc.server(
        workers, options=[("grpc.max_receive_message_length", server.limits.message_bytes)]
    )
    services_pb2_grpc.add_AsyncInferenceServicer_to_server(server, service)
    try:
        bound = service.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise not_free(host, port, error) from None
    service.start()
    ended = stop or threading.Event()
    if stop is None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
    ready(bound)
    while not ended.wait(0.2):
        pass
    service.stop(PATIENCE_S).wait()
