"""vla-eval's protocol (AllenAI's harness over LIBERO, SimplerEnv, RoboTwin and more): the policy as
one of its model servers.

A harness asks for one action at a time. With an ensemble each is averaged here, as in vla0's own
evaluation. Of vla-eval the messages are used, its server is not: that takes messages of any size
from any web page, and lets it change settings.
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
    """What one client's connection remembers, and the actions that it has not asked for yet."""

    actions: deque[np.ndarray] = field(default_factory=deque)
    seq: int = 0  # of its last message
    begun: bool = False  # an episode

    def reset(self) -> None:
        """A new episode: forgets all chunks."""
        super().reset()
        self.actions.clear()


class VlaEvalServer(Server):
    """policy: of a checkpoint. keys: camera → the benchmark's name of it.

    n_action_steps, ensemble: as for vla0.core.ensemble.
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
        # actions that are there cost nothing
        super().__init__(policy, replace(limits or ServerLimits(), rate=math.inf), keys)
        self.n_action_steps, self.weights = n_action_steps, ensemble
        self._session()  # refuses what it must before anybody comes
        self.batches.steps = steps_used(policy.spec.chunk_size, n_action_steps, ensemble)

    def _session(self) -> Episodes:
        spec = self.policy.spec
        ensemble = TemporalEnsemble(
            spec.chunk_size, self.n_action_steps, self.weights, spec.ensemble_k, spec.periodic
        )
        return Episodes(ensemble=ensemble, n_action_steps=self.n_action_steps, fps=spec.fps)

    def hello(self) -> dict[str, Any]:
        """What a benchmark is told: cameras by its own names, the instruction, and the dataset's
        own dimensions and units.
        """
        spec = self.policy.spec
        seen: dict[str, DimSpec] = {"language": LANGUAGE} | ({"state": RAW} if spec.state else {})
        seen |= {self.keys.get(camera) or camera: IMAGE_RGB for camera in spec.cameras}
        # LIBERO's rotation of the hand as the datasets and vla0 have it: without quat_no_antipodal
        # its sign differs at times.
        asked = {
            "send_wrist_image": len(spec.cameras) > 1,
            "send_state": spec.state is not None,
            "quat_no_antipodal": True,
        }
        return make_hello_payload(
            model_server=type(self).__name__,
            capabilities={},
            observation_params=asked,
            action_spec={"actions": DimSpec("actions", spec.dimensions, "raw").to_dict()},
            observation_spec={name: own.to_dict() for name, own in seen.items()},
        )

    async def _greet(self, connection: ServerConnection) -> None:
        """Here the client says the first word."""

    def _refusal(self, session: Any, error: InputError) -> bytes:
        return pack_message(Message(MessageType.ERROR, {"error": str(error)}, session.seq))

    async def _answer(self, connection: ServerConnection, session: Any, message: Any) -> None:
        if not isinstance(message, bytes):
            raise InputError("binary messages", "text", REMEDY)
        arrived = time.monotonic()
        kind, payload, session.seq = await self.batches.aside(session, self._told, message)
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
                asked = await self.batches.aside(session, self._seen, payload)
                session.actions.extend(
                    session.answer(await self._decoded(session, asked, arrived), arrived)[
                        : self.n_action_steps
                    ]
                )
            action = {"actions": np.asarray(session.actions.popleft(), np.float32)}
            await connection.send(pack_message(Message(MessageType.ACTION, action, session.seq)))

    def _told(self, message: bytes) -> tuple[MessageType, dict[str, Any], int]:
        left = self.limits.message_bytes  # that pictures may become, all together

        def read(found: dict[Any, Any]) -> Any:
            nonlocal left
            if "__image__" not in found:
                return (
                    array_of(found.get("dtype"), found.get("shape"), found.get("data"))
                    if "__ndarray__" in found
                    else found
                )
            if found.get("format") == "raw":
                return array_of(found.get("dtype"), found.get("shape"), found.get("data"))
            picture = picture_of(found.get("data"), left)
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

    def _seen(self, payload: Mapping[str, Any]) -> Request:
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


def picture_of(data: Any, most: int) -> np.ndarray:
    """A PNG's or JPEG's pixels.

    Raises InputError before it makes more than `most` bytes of them.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as picture:
            needed = picture.width * picture.height * len(picture.getbands())
            if needed > most:
                raise InputError(
                    f"pictures of at most {most} bytes", f"{needed}", "make them smaller first"
                )
            return np.array(picture)
    except InputError:
        raise
    except Exception as error:  # what is damaged fails in many ways
        raise InputError(
            "a PNG or JPEG", f"{type(error).__name__}: {str(error)[:100]}", REMEDY
        ) from None
