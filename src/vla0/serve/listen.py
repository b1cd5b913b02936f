"""The address that a server listens on, and which clients it admits."""

import asyncio
import logging
import signal
import socket
import ssl
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vla0.core.spec import Spec
from vla0.errors import InputError

logger = logging.getLogger(__name__)

NEEDED = -1  # as `message_bytes`: as many bytes as the checkpoint's pictures need
LOCAL = ("127.0.0.1", "localhost", "::1")
KEYLESS = {  # protocol without a key → how to reach the server although it listens locally
    "lerobot": "leave --host out, and reach it by a tunnel: ssh -L PORT:127.0.0.1:PORT "
    "this-machine",
    "vla-eval": "leave --host out: vla-eval's containers share this machine's network",
}


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """What clients may ask for.

    Raises:
        InputError: A limit is below 1.
    """

    # by default 1920 x 1080 pixels for each camera and frame, and 1 MiB
    message_bytes: int = NEEDED
    side: int = 4096  # pixels of a picture's longer side
    clients: int = 128  # connected at once
    rate: float = 200.0  # messages of one client in any second
    bytes_s: float = 64 * 2**20  # bytes that count as a second of a client's use of the server
    batch: int = 64  # observations decoded together

    def __post_init__(self):
        sized = 1 if self.message_bytes == NEEDED else self.message_bytes
        if min(sized, self.side, self.clients, self.rate, self.bytes_s, self.batch) < 1:
            raise InputError("limits of one at least", f"{asdict(self)}", "give numbers from 1")

    def of(self, spec: Spec) -> "ServerLimits":
        """Return these limits; a `message_bytes` that is not set becomes what the Spec needs."""
        needed = 2**20 + len(spec.cameras) * spec.history * 1920 * 1080 * 3
        return replace(self, message_bytes=needed) if self.message_bytes == NEEDED else self


def shown(spec: Spec) -> str:
    """Describe in one line what is served."""
    return (
        f"{spec.chunk_size} steps of {spec.dimensions} numbers at {spec.fps:g} Hz from "
        f"{', '.join(spec.cameras)}"
    )


def refuse_open(host: str, key: str | None = None, protocol: str = "openpi") -> None:
    """Refuse an address at which strangers could move the robot.

    Args:
        host: The address to listen on.
        key: The key that clients have to send, if any.
        protocol: The server's protocol.

    Raises:
        InputError: The host is not local and there is no key, or no key in this protocol.
    """
    if host not in LOCAL and protocol in KEYLESS:
        raise InputError(
            f"{LOCAL[0]}, as {protocol}'s protocol knows no key", f"'{host}'", KEYLESS[protocol]
        )
    if host not in LOCAL and not key:
        raise InputError(
            f"--api-key-file to listen on '{host}'", "no key", f"give one, or stay on {LOCAL[0]}"
        )


def refuse_taken(host: str, port: int) -> None:
    """Raise InputError if the port is not free, before a large model is loaded."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise not_free(host, port, error) from None


def not_free(host: str, port: int, error: Exception) -> InputError:
    """Return the InputError for a port that cannot be listened on."""
    return InputError(
        f"'{host}' port {port} to listen on", str(error), "choose another --port, or end who has it"
    )


def secret_of(file: Path | None) -> str | None:
    """Read the key from a file.

    Args:
        file: The file; None gives no key.

    Returns:
        The key, without spaces and line ends around it.

    Raises:
        InputError: The file cannot be read, or its key is shorter than 16 ASCII characters.
    """
    if file is None:
        return None
    try:
        secret = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            "a file that holds the key", f"{type(error).__name__}: '{file}'", "name another"
        ) from None
    if len(secret) < 16 or not secret.isascii():
        raise InputError(
            "a key of 16 ASCII characters or more", f"{len(secret)}", "openssl rand -hex 32 > FILE"
        )
    return secret


def served(
    server: Any,
    host: str,
    port: int,
    cert: Path | None = None,
    private: Path | None = None,
    ready: Callable[[int], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM, and answer the requests that have begun by then.

    Args:
        server: The server, whose `run` is called.
        host: The address to listen on.
        port: The port to listen on.
        cert: Certificate (PEM) for TLS; None serves without TLS.
        private: Private key (PEM) of the certificate, if it is in another file.
        ready: Called with the port that was bound.

    Raises:
        InputError: The server cannot listen there, or the certificate cannot be read.
    """
    context = None
    if cert is not None:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(cert, private)
        except (OSError, ssl.SSLError) as error:
            raise InputError(
                "a certificate and its key (PEM)",
                f"{type(error).__name__}: '{cert}'",
                "name others",
            ) from None
    elif host not in LOCAL:
        logger.warning("without --tls-cert the key and the pictures cross the network in the open")

    async def serving() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        await server.run(host, port, stop, context, ready)

    try:
        asyncio.run(serving())
    except OSError as error:
        raise not_free(host, port, error) from None
