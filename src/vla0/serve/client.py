"""The client of a policy server. It needs numpy, msgpack and websockets, and no torch."""

import logging
import ssl
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.frames import CloseCode
from websockets.sync.client import ClientConnection, connect
from websockets.uri import parse_uri

from vla0.core.spec import Observation, Spec
from vla0.errors import InputError
from vla0.serve.answers import actions_of, metadata_of
from vla0.serve.msgpack_numpy import pack, unpack

logger = logging.getLogger(__name__)

LARGEST = 16 * 2**20  # bytes of a server's message at most; chunks are kilobytes


class NoAnswerError(TimeoutError):
    """No answer arrived before the deadline. One that arrives later is dropped."""


class RemotePolicy:
    """A policy on another machine: it takes an Observation and returns a chunk.

    Late answers are dropped, and a lost connection is opened again. Servers of openpi work too,
    without streaming.

    Args:
        url: Address of the server, ws://host:port or wss://host:port.
        key: The key of the server, if it has one.
        timeout_s: Seconds from an observation to its chunk, at most.
        patience_s: Seconds for the first connection, at most.
        certificate: PEM file to trust, if no known authority has signed the server's certificate.
        names: {camera, or "state": its name in messages}, for a server with names of its own.

    Raises:
        InputError: An argument cannot be used, or the server refuses the client.
        NoAnswerError: No server answers within `patience_s`.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        timeout_s: float = 2.0,
        patience_s: float = 10.0,
        certificate: str | Path | None = None,
        names: Mapping[str, str] | None = None,
    ):
        self.url, self.timeout_s, self.names = url, timeout_s, dict(names or {})
        if not 0 < timeout_s < float("inf"):
            raise InputError(
                "timeout_s > 0", f"{timeout_s}", "it is how long an answer may take, seconds"
            )
        if not url.startswith(("ws://", "wss://")):
            raise InputError(
                "ws://host:port or wss://host:port",
                f"'{url}'",
                "give the address that `vla0 serve` shows",
            )
        try:
            parse_uri(url)
        except (InvalidURI, ValueError) as error:
            got = f"'{url}' ({error})"
            raise InputError("ws://host:port", got, "correct the address") from None
        if key is not None and (not key.isascii() or not key.isprintable()):
            raise InputError(
                "a key of one line of ASCII", "another", "strip what the file holds beside it"
            )
        if certificate is not None and not Path(certificate).is_file():
            raise InputError(
                "the server's certificate (PEM)", f"no file '{certificate}'", "name another"
            )
        if certificate is not None and not url.startswith("wss:"):
            raise InputError(
                "wss:// for certificate", f"'{url}'", "leave it out: it would do nothing"
            )
        self.context = (
            ssl.create_default_context(cafile=certificate) if url.startswith("wss:") else None
        )
        self.headers = {"Authorization": f"Api-Key {key}"} if key else None
        self.lock, self.held = Lock(), ExitStack()
        self.connection: ClientConnection | None = None
        self.metadata: dict[str, Any] = {}
        # number of the last observation sent; count of answers that were unasked for or too late
        self.number = self.dropped = 0
        # numbers of the observations without an answer, the oldest first
        self.owed: deque[int] = deque()
        self.reset_next = True
        self._connect(time.monotonic() + patience_s)

    @property
    def spec(self) -> Spec:
        """The Spec of the server's checkpoint.

        Raises:
            InputError: The server does not send one.
        """
        if not isinstance(text := self.metadata.get("spec"), str):
            raise InputError(
                "a server that tells its checkpoint's Spec", self.url, "serve with `vla0 serve`"
            )
        return Spec.parse(text, self.url)

    def predict(self, observation: Observation, timeout_s: float | None = None) -> np.ndarray:
        """Return the next actions.

        Args:
            observation: What the robot's cameras and sensors say.
            timeout_s: Seconds to wait for the answer; None takes the policy's `timeout_s`.

        Returns:
            The actions (T, D), float32.

        Raises:
            InputError: The server refuses the observation, or its answer could not be executed.
            NoAnswerError: The answer did not arrive in time.
        """
        *_, (_, actions) = self._ask(observation, False, timeout_s)
        return actions

    def predict_stream(
        self, observation: Observation, timeout_s: float | None = None
    ) -> Iterator[np.ndarray]:
        """Yield the actions of `predict` one by one, each as soon as it is certain.

        A server that does not stream sends all of them at once.

        Args:
            observation: What the robot's cameras and sensors say.
            timeout_s: Seconds to wait for the whole answer; None takes the policy's `timeout_s`.

        Yields:
            The next action (D,), float32.

        Raises:
            InputError: The server refuses the observation, or its answer could not be executed.
            NoAnswerError: The answer was not complete in time.
        """
        if "stream" not in self.metadata.get("extensions", ()):
            yield from self.predict(observation, timeout_s)
            return
        for is_chunk, actions in self._ask(observation, True, timeout_s):
            if not is_chunk:
                yield actions

    def reset(self) -> None:
        """Begin a new episode: the server forgets this client's chunks at the next observation."""
        self.reset_next = True

    def close(self) -> None:
        """Close the connection."""
        self.held.close()
        self.connection = None

    def _ask(
        self, observation: Observation, stream: bool, timeout_s: float | None
    ) -> Iterator[tuple[bool, np.ndarray]]:
        """Yield (False, action (D,)) for each step of a stream, then (True, actions (T, D))."""
        if not isinstance(observation, Observation):
            raise InputError(
                "an Observation (vla0.core.spec)",
                type(observation).__name__,
                "Observation(images, instruction, state)",
            )
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        started = False
        with self.lock:
            while True:
                try:
                    self._send(observation, stream, deadline)
                    for part in self._receive(deadline):
                        started = True
                        yield part
                    return
                except ConnectionClosed as lost:
                    # until the deadline the observation is fresh enough to be sent again
                    self.connection = None
                    if (
                        lost.sent is not None
                        and lost.sent.code == CloseCode.MESSAGE_TOO_BIG
                        and not lost.rcvd_then_sent
                    ):
                        got = "a larger one"
                        raise InputError(
                            f"answers of at most {LARGEST} bytes from {self.url}", got, "look at it"
                        ) from None
                    if lost.rcvd is not None and lost.rcvd.code == CloseCode.MESSAGE_TOO_BIG:
                        raise InputError(
                            f"a message that {self.url} takes",
                            "a larger one",
                            "send smaller pictures",
                        ) from None
                    if started:  # a second answer would not continue the stream
                        raise NoAnswerError(
                            f"{self.url} was lost in the middle of an answer"
                        ) from None
                    time.sleep(0.02)

    def _send(self, observation: Observation, stream: bool, deadline: float) -> None:
        """Send an observation, over a new connection if the last one was lost."""
        if self.connection is None:
            self._connect(deadline)
        assert self.connection is not None
        message: dict[str, Any] = {
            "images": dict(observation.images),
            "prompt": observation.instruction,
        }
        names = self.names or self.metadata.get("cameras")
        if isinstance(names, Mapping):
            known = {*observation.images, "state"} if self.names else observation.images
            if missing := [camera for camera in names if camera not in known]:
                got = f"{list(observation.images)}"
                raise InputError(
                    f"pictures of {list(names)}",
                    got,
                    f"give '{missing[0]}', in the checkpoint's own names",
                )
            images = message.pop("images")
            message |= {names[camera]: images[camera] for camera in names if camera in images}
            unnamed = {camera: frame for camera, frame in images.items() if camera not in names}
            if self.names and unnamed:
                message["images"] = unnamed
        if observation.state is not None:
            message[self.names.get("state", "state")] = np.asarray(observation.state, np.float64)
        self.number += 1
        if self.metadata.get("extensions"):
            message |= {
                "vla0/number": self.number,
                "vla0/reset": self.reset_next,
                "vla0/stream": stream,
            }
            if observation.action_prefix is not None:
                message["vla0/action_prefix"] = np.asarray(observation.action_prefix, np.float64)
        elif observation.action_prefix is not None:
            raise InputError(
                "a server that can begin with committed actions", self.url, "serve with vla0"
            )
        self._drop_unasked()
        self.connection.send(pack(message))
        self.reset_next = False
        self.owed.append(self.number)

    def _receive(self, deadline: float) -> Iterator[tuple[bool, np.ndarray]]:
        """Yield the parts of the answer to the last observation, and drop all other answers."""
        assert self.connection is not None
        while (left := deadline - time.monotonic()) > 0:  # also if unasked messages keep arriving
            try:
                received = self.connection.recv(timeout=left)
            except TimeoutError:
                break
            answer = None if isinstance(received, str) else unpack(received)
            if answer is not None and "vla0/step" in answer:
                number = answer.get("vla0/number")
                if type(number) is int and number == self.number:
                    yield (
                        False,
                        actions_of(answer.get("action"), self.metadata, self.url, step=True),
                    )
                continue
            if not self._is_ours(answer):
                self.dropped += 1
                logger.info(
                    "%s: an answer that was to nothing asked, or came too late, is dropped (%d)",
                    self.url,
                    self.dropped,
                )
                continue
            if answer is None:
                raise InputError(f"{self.url} refuses: {str(received)[-500:]}")
            yield True, actions_of(answer.get("actions"), self.metadata, self.url, step=False)
            return
        raise NoAnswerError(f"no answer of {self.url} in time")

    def _is_ours(self, answer: Mapping[str, Any] | None) -> bool:
        """Tell whether an answer belongs to the last observation, and forget the ones before it.

        Errors (None), which are text, and answers of servers that send no numbers are matched by
        their order, which is that of the observations.
        """
        if answer is not None and self.metadata.get("extensions"):
            number = answer.get("vla0/number")
        else:
            number = self.owed[0] if self.owed else None
        if type(number) is not int or number not in self.owed:
            return False
        while self.owed.popleft() != number:
            pass
        return number == self.number

    def _drop_unasked(self) -> None:
        """Drop messages that arrived although no answer is due.

        They would be taken for the answer to the next observation.
        """
        assert self.connection is not None
        while not self.owed and not self.metadata.get("extensions"):
            try:
                self.connection.recv(timeout=0)
            except TimeoutError:
                return
            self.dropped += 1
            logger.warning("%s answers what it was not asked: dropped (%d)", self.url, self.dropped)

    def _connect(self, deadline: float) -> None:
        """Connects, and until the deadline tries again, each time after twice the wait."""
        wait_s, reason = 0.02, "no time left"
        self.close()
        while (left := deadline - time.monotonic()) > 0:
            try:
                opened = connect(
                    self.url,
                    compression=None,
                    max_size=LARGEST,
                    additional_headers=self.headers,
                    open_timeout=left,
                    close_timeout=1,
                    ssl=self.context,
                )
                connection = self.held.enter_context(opened)
                greeting = connection.recv(
                    timeout=max(0.0, deadline - time.monotonic()), decode=False
                )
                self.metadata = metadata_of(unpack(bytes(greeting)), self.metadata, self.url)
                self.connection, self.reset_next = connection, True
                self.owed.clear()
                return
            except InvalidStatus as error:
                if error.response.status_code in (401, 403):
                    raise InputError(
                        f"a key that {self.url} knows",
                        "another or none",
                        "pass key=, or --api-key-file",
                    ) from None
                reason = str(error)
            except ssl.SSLCertVerificationError as error:
                got = error.verify_message
                raise InputError(
                    f"a certificate of {self.url} that is trusted",
                    got,
                    "pass certificate= or --tls-ca",
                ) from None
            except (OSError, InvalidHandshake, ConnectionClosed, TimeoutError) as error:
                reason = f"{type(error).__name__}: {error}"
            time.sleep(min(wait_s, max(0.0, deadline - time.monotonic())))
            wait_s = min(2 * wait_s, 1.0)
        remedy = "start one there (`vla0 serve --checkpoint DIR`), or correct the address"
        raise NoAnswerError(f"expected a server at {self.url}; got {reason}; {remedy}")
