"""A websocket server in openpi's protocol: many clients share one policy."""

import asyncio
import hmac
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from http import HTTPStatus
from typing import Any

import numpy as np
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request as Handshake
from websockets.http11 import Response

import vla0
from vla0.checkpoint.io import fingerprint
from vla0.core.ensemble import NONE, TemporalEnsemble, steps_used
from vla0.errors import InputError, refuse_idle
from vla0.policy import TextPolicy
from vla0.serve.batches import Asked, Batches, told
from vla0.serve.listen import ServerLimits, refuse_open
from vla0.serve.messages import Request, names, refuse_other_cameras, request
from vla0.serve.metrics import Metrics
from vla0.serve.msgpack_numpy import pack, unpack
from vla0.serve.session import ClientSession

logger = logging.getLogger(__name__)

# After a refused message the client's next one is not read for REFUSED_S seconds, or for as many
# seconds as the message has REFUSED_BYTES_S bytes, whichever is longer.
REFUSED_S, REFUSED_BYTES_S = 0.1, 2**20
COMING_S = 0.05  # seconds between two clients that connect
PATIENCE = 10  # refused messages in a row after which a connection is closed


class Connection(ServerConnection):
    """A connection that stops reading once a message is refused for its size.

    Otherwise all of that message would be read in vain.
    """

    shut = False

    def data_received(self, data: bytes) -> None:
        """Receive bytes, as asyncio's protocols do."""
        super().data_received(data)
        if (
            not self.shut
            and (sent := self.protocol.close_sent) is not None
            and sent.code == CloseCode.MESSAGE_TOO_BIG
        ):
            self.shut = True
            self.transport.pause_reading()
            self.loop.call_later(1.0, self.transport.abort)  # the client has read why by then


class Server:
    """Answers observations with chunks, in openpi's protocol.

    Observations that arrive together are decoded together. Servers of other protocols are
    subclasses.

    Args:
        policy: The policy of a checkpoint.
        limits: What a client may ask for.
        keys: camera → its name in messages, where that is none of the usual ones.
        key: The key that a client has to send as `Authorization: Api-Key KEY`. None admits all.
        n_action_steps: Steps sent for each observation, with an ensemble.
        ensemble: "none" sends whole chunks. Otherwise `n_action_steps` averaged steps are sent for
            each observation, and each connection has an ensemble of its own.
        origins: Web pages that may connect, as "https://lab.example". Clients that are no browsers
            send no origin and may connect.

    Raises:
        InputError: `keys` names a camera that the checkpoint does not have, or `n_action_steps` is
            given without an ensemble.
    """

    protocol = "openpi"
    ping_s: float | None = 20.0  # seconds between two checks whether a client is still there

    def __init__(
        self,
        policy: TextPolicy,
        limits: ServerLimits | None = None,
        keys: Mapping[str, str] | None = None,
        key: str | None = None,
        n_action_steps: int = 1,
        ensemble: str = NONE,
        origins: Sequence[str] = (),
    ):
        self.policy = policy
        self.limits = (limits or ServerLimits()).of(policy.spec)
        self.keys = keys or {}
        self.key = key
        self.origins: list[Any] = [None, *origins]  # None: a client that is no browser
        self.n_action_steps, self.weights = n_action_steps, ensemble
        spec = policy.spec
        refuse_other_cameras(self.keys, spec)
        if ensemble == NONE:
            refuse_idle(
                {"n_action_steps": n_action_steps if n_action_steps != 1 else None}, "an ensemble"
            )
        self._session()  # raises for a wrong ensemble before any client connects
        steps = None if ensemble == NONE else steps_used(spec.chunk_size, n_action_steps, ensemble)
        # a user's own policy need not have `see`
        self.see = getattr(policy, "see", lambda observation: observation)
        model = getattr(policy, "model", None)
        self.mark = None if model is None else fingerprint(model, spec)
        self.metrics = Metrics()
        self.batches = Batches(policy, steps, self.limits.batch, self.metrics)
        self.clients, self.stopping, self.next_at = 0, False, 0.0

    def metadata(self) -> dict[str, Any]:
        """Return what a client is sent as it connects: cameras, sizes, rate, limits and Spec."""
        spec = self.policy.spec
        return {
            "server": f"vla0 {vla0.__version__}",
            "checkpoint": self.mark,
            "cameras": {c: self.keys.get(c) or next(names(c)) for c in spec.cameras},
            "state": None if spec.state is None else len(spec.state[0]),
            "chunk_size": spec.chunk_size,
            "dimensions": spec.dimensions,
            "fps": spec.fps,
            "low": list(spec.low),
            "high": list(spec.high),
            "history": spec.history,
            "ensemble": self.weights,
            "n_action_steps": self.n_action_steps,
            "extensions": ["stream", "reset", "number", "action_prefix"],
            "spec": spec.text(),
        }

    async def run(
        self, host: str, port: int, stop: asyncio.Event, context: Any = None, ready: Any = None
    ) -> None:
        """Serve until `stop` is set, then answer the requests that it has begun, and end.

        Args:
            host: Address to listen on.
            port: Port to listen on; 0 takes a free one.
            stop: The event that ends the server.
            context: The ssl.SSLContext for TLS, if any.
            ready: Called with the port that was bound.

        Raises:
            InputError: The host is not local and there is no key, or no key in this protocol.
        """
        refuse_open(host, self.key, self.protocol)
        batches = asyncio.create_task(self.batches.run())
        async with serve(
            self._talk,
            host,
            port,
            ssl=context,
            compression=None,
            max_size=self.limits.message_bytes,
            origins=self.origins,
            process_request=self._handshake,
            create_connection=Connection,
            max_queue=1,
            ping_interval=self.ping_s,
            ping_timeout=20,
        ) as server:
            if ready is not None:
                ready(server.sockets[0].getsockname()[1])
            await stop.wait()
            self.stopping = True
            server.close(close_connections=False)
            while self.metrics.busy:
                await asyncio.sleep(0.01)
            await asyncio.gather(
                *(
                    connection.close(CloseCode.GOING_AWAY, "the server ends")
                    for connection in server.connections
                )
            )
        batches.cancel()
        self.batches.thread.shutdown()

    def _session(self) -> ClientSession:
        """Return the state of a new client."""
        spec = self.policy.spec
        acting = (
            spec.chunk_size,
            self.n_action_steps,
            self.weights,
            spec.ensemble_k,
            spec.periodic,
        )
        return ClientSession(
            ensemble=None if self.weights == NONE else TemporalEnsemble(*acting),
            n_action_steps=self.n_action_steps,
            fps=spec.fps,
        )

    async def _handshake(
        self, connection: ServerConnection, handshake: Handshake
    ) -> Response | None:
        """Answer requests for health and metrics, and refuse clients without the key."""
        if handshake.path in ("/healthz", "/health"):
            return connection.respond(HTTPStatus.OK, "OK\n")
        authorization = handshake.headers.get("Authorization", "").encode("utf-8", "replace")
        if self.key is not None and not hmac.compare_digest(
            authorization, f"Api-Key {self.key}".encode()
        ):
            return connection.respond(
                HTTPStatus.UNAUTHORIZED, "an Authorization: Api-Key header is needed\n"
            )
        if handshake.path == "/metrics":
            text, kind = self.metrics.page()
            return Response(
                200, "OK", Headers({"Content-Type": kind, "Content-Length": str(len(text))}), text
            )
        if self.clients >= self.limits.clients:
            return connection.respond(
                HTTPStatus.SERVICE_UNAVAILABLE, f"{self.limits.clients} clients are here already\n"
            )
        # As many clients as the limit allows may connect at once; beyond that they are delayed.
        self.next_at = (
            max(self.next_at, time.monotonic() - self.limits.clients * COMING_S) + COMING_S
        )
        await asyncio.sleep(self.next_at - time.monotonic())
        return None

    async def _talk(self, connection: ServerConnection) -> None:
        """Answer one client until it disconnects or the server ends."""
        self.clients += 1
        self.metrics.clients.set(self.clients)
        session, wrong = self._session(), 0
        self.batches.sessions.append(session)
        try:
            await self._greet(connection)
            async for message in connection:
                if self.stopping:
                    break
                # what receiving took of the event loop, which is not measured
                self.batches.charge(session, len(message) / self.limits.bytes_s)
                try:
                    self._not_too_fast(session)
                    await self._answer(connection, session, message)
                    wrong = 0
                except ConnectionClosed:
                    raise
                except Exception as error:  # an error concerns only its own client
                    self.metrics.errors.inc()
                    wrong += 1
                    session.charge(max(REFUSED_S, len(message) / REFUSED_BYTES_S))
                    await connection.send(self._refusal(session, told(error)))
                    if wrong >= PATIENCE:
                        await connection.close(
                            CloseCode.POLICY_VIOLATION, "too many messages that cannot be read"
                        )
                # the next message is not read before `free_at`
                if (left := session.free_at - time.monotonic()) > 0:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(connection.wait_closed(), left)
        except ConnectionClosed:
            logger.debug("a client has gone")
        finally:
            self.batches.sessions.remove(session)
            self.clients -= 1
            self.metrics.clients.set(self.clients)

    def _not_too_fast(self, session: ClientSession) -> None:
        """Raise InputError if a client sends more messages a second than the limit."""
        now = session.heard_at = time.monotonic()
        session.arrivals = [at for at in session.arrivals if now - at < 1.0] + [now]
        if len(session.arrivals) > self.limits.rate:
            raise InputError(
                f"at most {self.limits.rate:g} messages a second",
                f"{len(session.arrivals)}",
                "ask less often",
            )

    async def _greet(self, connection: ServerConnection) -> None:
        """Send a client the metadata as it connects."""
        await connection.send(pack(self.metadata()))

    def _refusal(self, session: ClientSession, error: InputError) -> str | bytes:
        """Return the message that tells a client of an error."""
        return str(error)

    async def _answer(
        self, connection: ServerConnection, session: ClientSession, message: Any
    ) -> None:
        """Answer one message, or raise InputError if it cannot be answered."""
        if not isinstance(message, bytes):
            raise InputError("binary messages", "text", "send what openpi-client packs")
        arrived = time.monotonic()
        asked = await self.batches.aside(session, self._read, message)
        session.begin(asked.reset, arrived)
        number = {} if asked.number is None else {"vla0/number": asked.number}

        async def step(ahead: int, action: np.ndarray) -> None:
            await connection.send(pack({"vla0/step": ahead, "action": action, **number}))

        actions = session.answer(await self._decoded(session, asked, arrived, step), arrived)
        spent = (time.monotonic() - arrived) * 1e3
        await connection.send(
            pack({"actions": actions, "server_timing": {"infer_ms": spent}, **number})
        )

    async def _decoded(
        self, session: ClientSession, asked: Request, arrived: float, step: Any = None
    ) -> np.ndarray:
        """Return the chunk (T, D) for a request, decoded together with others.

        Args:
            session: The client's state.
            asked: The request.
            arrived: Monotonic seconds at which its message arrived.
            step: Called with the index and the action (D,) of each step of a stream.
        """
        return await self.batches.ask(
            Asked(session, asked, session.expecting(asked.observation, arrived)), step
        )

    def _read(self, message: bytes) -> Request:
        """Return the request that a packed message holds."""
        return self._request(unpack(message, self.limits.message_bytes))

    def _request(self, content: Mapping[str, Any]) -> Request:
        """Return the request of a message, with its pictures already resized for the model."""
        asked = request(content, self.policy.spec, self.keys, self.limits.side)
        return replace(asked, observation=self.see(asked.observation))
