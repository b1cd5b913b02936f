"""A model server for vla-eval, AllenAI's harness over LIBERO, SimplerEnv, RoboTwin and more.

The harness asks for one action at a time. With an ensemble the server averages each action, as
vla0's own evaluation does. It uses the messages of vla-eval but not its server, which takes
messages of any size from any web page and lets that page change settings.
"""

import io
import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image
from vla_eval.protocol.messages import Message, MessageType, make_hello_payload, pack_message
from vla_eval.specs import IMAGE_RGB, LANGUAGE, RAW, DimSpec
from websockets.asyncio.server import ServerConnection

from vla0.core.ensemble import NONE, TemporalEnsemble, steps_used
from vla0.errors import InputError
from vla0.policy import TextPolicy
from vla0.serve.listen import ServerLimits
from vla0.serve.messages import Request
from vla0.serve.msgpack_numpy import array_of, unpack
from vla0.serve.server import Server
from vla0.serve.session import ClientSession

REMEDY = "use vla-eval's client"


@dataclass(eq=False)
class Episodes(ClientSession):
    """The state of one client's connection, with the actions that it has not asked for yet."""

    actions: deque[np.ndarray] = field(default_factory=deque)  # (D,) each
    seq: int = 0  # number of its last message
    begun: bool = False  # whether an episode has begun

    def reset(self) -> None:
        """Begin a new episode: forget all chunks and the actions that are left."""
        super().reset()
        self.actions.clear()


class VlaEvalServer(Server):
    """Answers vla-eval's observations with one action each.

    Args:
        policy: The policy of a checkpoint.
        keys: camera → the benchmark's name for it.
        n_action_steps: Steps of a chunk that are executed before the next is decoded.
        ensemble: How chunks are averaged, as in `vla0.core.ensemble`.
        limits: What a client may ask for; its `rate` is not used.

    Raises:
        InputError: `keys` names a camera that the checkpoint does not have, or the ensemble would
            do nothing with these `n_action_steps`.
    """

    protocol = "vla-eval"
    ping_s = None  # a client whose simulator is busy does not answer

    def __init__(
        self,
        policy: TextPolicy,
        keys: Mapping[str, str] | None = None,
        n_action_steps: int = 1,
        ensemble: str = NONE,
        limits: ServerLimits | None = None,
    ):
        # no rate: an action that is already decoded costs nothing
        super().__init__(policy, replace(limits or ServerLimits(), rate=math.inf), keys)
        self.n_action_steps, self.weights = n_action_steps, ensemble
        self._session()  # raises for a wrong ensemble before any client connects
        self.batches.steps = steps_used(policy.spec.chunk_size, n_action_steps, ensemble)

    def _session(self) -> Episodes:
        spec = self.policy.spec
        ensemble = TemporalEnsemble(
            spec.chunk_size, self.n_action_steps, self.weights, spec.ensemble_k, spec.periodic
        )
        return Episodes(ensemble=ensemble, n_action_steps=self.n_action_steps, fps=spec.fps)

    def hello(self) -> dict[str, Any]:
        """Return what a benchmark is sent at first: which observations and actions are used.

        Cameras have the benchmark's names; dimensions and units are those of the dataset.
        """
        spec = self.policy.spec
        observation_spec: dict[str, DimSpec] = {"language": LANGUAGE} | (
            {"state": RAW} if spec.state else {}
        )
        observation_spec |= {self.keys.get(camera) or camera: IMAGE_RGB for camera in spec.cameras}
        # With quat_no_antipodal, LIBERO's rotation of the hand is the one of the datasets and of
        # vla0; without it the sign differs at times.
        observation_params = {
            "send_wrist_image": len(spec.cameras) > 1,
            "send_state": spec.state is not None,
            "quat_no_antipodal": True,
        }
        return make_hello_payload(
            model_server=type(self).__name__,
            capabilities={},
            observation_params=observation_params,
            action_spec={"actions": DimSpec("actions", spec.dimensions, "raw").to_dict()},
            observation_spec={name: dims.to_dict() for name, dims in observation_spec.items()},
        )

    async def _greet(self, connection: ServerConnection) -> None:
        """Send nothing: in this protocol the client sends the first message."""

    def _refusal(self, session: Any, error: InputError) -> bytes:
        return pack_message(Message(MessageType.ERROR, {"error": str(error)}, session.seq))

    async def _answer(self, connection: ServerConnection, session: Any, message: Any) -> None:
        if not isinstance(message, bytes):
            raise InputError("binary messages", "text", REMEDY)
        arrived = time.monotonic()
        kind, payload, session.seq = await self.batches.aside(session, self._parsed, message)
        if kind is MessageType.HELLO:
            await connection.send(pack_message(Message(kind, self.hello(), session.seq)))
        elif kind in (MessageType.EPISODE_START, MessageType.EPISODE_END):
            session.reset()
            session.begun = kind is MessageType.EPISODE_START
        elif kind is MessageType.OBSERVATION:
            if not session.begun:
                raise InputError(
                    "an episode that has begun",
                    "an observation",
                    f"send episode_start first, or {REMEDY}",
                )
            if not session.actions:
                asked = await self.batches.aside(session, self._observed, payload)
                session.actions.extend(
                    session.answer(await self._decoded(session, asked, arrived), arrived)[
                        : self.n_action_steps
                    ]
                )
            action = {"actions": np.asarray(session.actions.popleft(), np.float32)}
            await connection.send(pack_message(Message(MessageType.ACTION, action, session.seq)))

    def _parsed(self, message: bytes) -> tuple[MessageType, dict[str, Any], int]:
        """Return the type, the payload and the number of a message."""
        left = self.limits.message_bytes  # bytes that all its pictures may still take

        def read(mapping: dict[Any, Any]) -> Any:
            nonlocal left
            if "__image__" not in mapping:
                return (
                    array_of(mapping.get("dtype"), mapping.get("shape"), mapping.get("data"))
                    if "__ndarray__" in mapping
                    else mapping
                )
            if mapping.get("format") == "raw":
                return array_of(mapping.get("dtype"), mapping.get("shape"), mapping.get("data"))
            picture = picture_of(mapping.get("data"), left)
            left -= picture.nbytes
            return picture

        content = unpack(message, self.limits.message_bytes, read)
        kind, payload, seq = content.get("type"), content.get("payload"), content.get("seq")
        if (
            kind not in [known.value for known in MessageType]
            or not isinstance(payload, dict)
            or type(seq) is not int
        ):
            raise InputError(
                "a message of vla-eval: type, payload and seq", f"type {str(kind)[:40]!r}", REMEDY
            )
        return MessageType(kind), payload, seq

    def _observed(self, payload: Mapping[str, Any]) -> Request:
        """Return the request that an observation's payload holds."""
        images = payload.get("images")
        if not isinstance(images, Mapping):
            raise InputError("images, a mapping", type(images).__name__, REMEDY)
        message: dict[str, Any] = {**images, "prompt": payload.get("task_description")}
        state = next(
            (payload[name] for name in ("states", "state") if payload.get(name) is not None), None
        )
        if state is not None:
            message["state"] = state
        return self._request(message)


def picture_of(data: Any, most_bytes: int) -> np.ndarray:
    """Decode a PNG or JPEG.

    Args:
        data: The file's bytes.
        most_bytes: Bytes of the decoded picture, at most.

    Returns:
        The pixels (h, w) or (h, w, channels).

    Raises:
        InputError: The picture is damaged, or too large; a large one is not decoded.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as picture:
            needed = picture.width * picture.height * len(picture.getbands())
            if needed > most_bytes:
                raise InputError(
                    f"pictures of at most {most_bytes} bytes",
                    f"{needed}",
                    "make them smaller first",
                )
            return np.array(picture)
    except InputError:
        raise
    except Exception as error:  # what is damaged fails in many ways
        raise InputError(
            "a PNG or JPEG", f"{type(error).__name__}: {str(error)[:100]}", REMEDY
        ) from None
