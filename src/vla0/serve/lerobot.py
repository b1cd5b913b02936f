"""A server of LeRobot's asynchronous inference (gRPC), for LeRobot's own `robot_client`.

LeRobot's server resizes pictures before the policy sees them, loads whatever model a client names,
and unpickles whatever a client sends. This server has one checkpoint, gives it pictures prepared
exactly as in training, and takes only arrays and LeRobot's own messages from a pickle. The protocol
has no key: use it on this machine, or at the end of a tunnel.
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
messages: Any = services_pb2  # generated code, whose names a type checker cannot see

MESSAGES = {
    ("lerobot.async_inference.helpers", "RemotePolicyConfig"),
    ("lerobot.async_inference.helpers", "TimedObservation"),
    ("lerobot.configs.types", "PolicyFeature"),
    ("lerobot.configs.types", "FeatureType"),
}
STREAM_S = 10.0  # seconds in which a message has to arrive
PARTS = 10_000  # parts of a message, at most
IDLE_S = 60.0  # seconds without a message after which a client may be replaced
PATIENCE_S = 2.0  # seconds that GetActions waits for an observation


@dataclass(kw_only=True)
class Client:
    """The state of one client."""

    features: Mapping[str, Any]  # of its robot, as LeRobot describes them
    renamed: Mapping[str, str]  # the robot's name → the checkpoint's name
    steps: int  # actions that it wants in a chunk
    waiting: Queue = field(default_factory=lambda: Queue(1))  # the newest observation
    answered: deque[int] = field(default_factory=lambda: deque(maxlen=1000))  # steps answered
    last: tuple[int, np.ndarray] | None = None  # step and chunk of the last answer
    changing: Any = field(default_factory=threading.Lock)  # held while `waiting` is changed
    heard_at: float = field(default_factory=time.monotonic)  # monotonic seconds, last message


class LeRobotServer:
    """The gRPC service AsyncInference of LeRobot.

    Args:
        policy: The policy of a checkpoint.
        limits: What a client may ask for.
        keys: camera → the robot's name for it.

    Raises:
        InputError: `keys` names a camera that the checkpoint does not have.
    """

    def __init__(
        self, policy: Any, limits: ServerLimits | None = None, keys: Mapping[str, str] | None = None
    ):
        self.policy = policy
        self.limits = (limits or ServerLimits()).of(policy.spec)
        self.keys = dict(keys or {})
        refuse_other_cameras(self.keys, policy.spec)
        self.clients: OrderedDict[str, Client] = OrderedDict()
        self.guests = threading.Lock()

    def Ready(self, message: Any, context: Any) -> Any:  # noqa: N802
        """Forget a client, which begins anew."""
        with self.guests:
            self.clients.pop(context.peer(), None)
        return messages.Empty()

    def SendPolicyInstructions(self, message: Any, context: Any) -> Any:  # noqa: N802
        """Take the names of the client's robot, and how many actions it wants.

        The model stays the server's own, whatever the client asks for.
        """
        with self._reported(context):
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
        """Take the newest observation, which replaces one that still waits."""
        with self._reported(context):
            observed = _unpacked(self._whole(parts, context), TimedObservation)
            client = self._client(context)
            if not observed.must_go and observed.timestep in client.answered:
                return messages.Empty()
            with client.changing:
                with contextlib.suppress(Empty):
                    client.waiting.get_nowait()
                client.waiting.put_nowait(observed)
        return messages.Empty()

    def GetActions(self, message: Any, context: Any) -> Any:  # noqa: N802
        """Answer the newest observation with a chunk, or with nothing if no observation comes."""
        with self._reported(context):
            client = self._client(context)
            try:
                observed = client.waiting.get(timeout=PATIENCE_S)
            except Empty:
                return messages.Empty()
            chunk = self._chunk(client, observed)
            period = 1 / self.policy.spec.fps
            timed = [
                TimedAction(
                    observed.timestamp + step * period,
                    observed.timestep + step,
                    torch.from_numpy(action.copy()),
                )
                for step, action in enumerate(chunk[: client.steps])
            ]
            return messages.Actions(data=pickle.dumps(timed))
        return messages.Empty()

    def _admit(self, peer: str, client: Client) -> None:
        """Add a client, in place of an idle one if there are too many.

        Raises InputError if all of them are active.
        """
        with self.guests:
            self.clients.pop(peer, None)
            idle = [
                name
                for name, guest in self.clients.items()
                if time.monotonic() - guest.heard_at > IDLE_S
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
        """Join the parts of a message.

        A stream that does not end is cancelled: it would occupy one of a few threads for ever.
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

    def _chunk(self, client: Client, observed: TimedObservation) -> np.ndarray:
        """Return the chunk (T, D) for a client's observation."""
        spec, raw = self.policy.spec, dict(observed.observation)
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
        if client.last is not None and observed.timestep > client.last[0]:
            # A draft from the last chunk makes decoding faster and does not change its result.
            expected = rest(
                client.last[1], min(observed.timestep - client.last[0], spec.chunk_size)
            )
            observation = replace(observation, draft_actions=expected)
        chunk = self.policy.predict_batch([observation])[0]
        client.answered.append(observed.timestep)
        client.last = observed.timestep, chunk
        return chunk

    def _client(self, context: Any) -> Client:
        """Return the state of the client that calls, or raise InputError for a stranger."""
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
    def _reported(self, context: Any) -> Iterator[None]:
        """Report an error to the client that caused it, as the answer to its call."""
        try:
            yield
        except Exception as error:
            if context.code() is None:  # not one of gRPC's own
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(told(error)))
            raise


def _unpacked(data: bytes, kind: type) -> Any:
    """Read one of LeRobot's messages without running anything of its pickle.

    Raises InputError for anything else.
    """
    record = load_arrays(io.BytesIO(data), "a message", MESSAGES)
    if not isinstance(record, Record) or record.name != kind.__name__:
        got = record.name if isinstance(record, Record) else type(record).__name__
        raise InputError(f"a {kind.__name__}", got, "use the robot_client of LeRobot 0.6.1")
    message = SimpleNamespace(**{name: record.get(name) for name in (f.name for f in fields(kind))})
    if kind is TimedObservation:
        message.must_go = bool(message.must_go)
        fine = (
            isinstance(message.observation, Mapping)
            and type(message.timestep) is int
            and isinstance(message.timestamp, int | float)
        )
        if not fine or not math.isfinite(message.timestamp):
            raise InputError(
                "an observation with its step and time",
                f"{type(message.observation).__name__}",
                "use LeRobot's client",
            )
    elif not (
        isinstance(message.lerobot_features, Mapping) and isinstance(message.rename_map, Mapping)
    ):
        raise InputError(
            "features and a rename_map", "none", "use the robot_client of LeRobot 0.6.1"
        )
    return message


def serve_lerobot(
    server: LeRobotServer,
    host: str,
    port: int,
    ready: Callable[[int], None],
    stop: threading.Event | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM, or until `stop` is set.

    Args:
        server: The service.
        host: The address to listen on; it must be local.
        port: The port to listen on; 0 takes a free one.
        ready: Called with the port that was bound.
        stop: The event that ends the server, instead of the signals.

    Raises:
        InputError: The host is not local, or the port is not free.
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
