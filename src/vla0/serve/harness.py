"""The policy for vla-eval (AllenAI's harness over LIBERO, SimplerEnv, RoboTwin and more), as one of its model servers.

A harness asks for one action at a time. With an ensemble each is averaged here, as in vla0's own evaluation; vla-eval's own
ensembling never comes into play where it asks again only once a chunk has been executed.
"""

import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import anyio
from vla_eval.model_servers.predict import PredictModelServer
from vla_eval.model_servers.serve import serve_async
from vla_eval.specs import IMAGE_RGB, LANGUAGE, RAW, DimSpec

from vla0.ensemble import NONE, TemporalEnsemble, steps_used
from vla0.errors import InputError
from vla0.serve.door import refuse_open, refuse_taken
from vla0.serve.request import refuse_other_cameras, request
from vla0.serve.server import together
from vla0.serve.session import Session
from vla0.spec import Observation

REFUSED = "vla0/refused"  # in place of actions, to whom they are refused
SIDE = 4096  # pixels of a picture


class HarnessServer(PredictModelServer):
    """policy: of a checkpoint. keys: camera → the benchmark's name of it. replan, ensemble: as for vla0.ensemble."""

    def __init__(self, policy: Any, keys: Mapping[str, str] | None = None, replan: int = 1, ensemble: str = NONE):
        super().__init__(chunk_size=replan, max_batch_size=64)
        self.policy, self.keys, self.replan, self.weights = policy, dict(keys or {}), replan, ensemble
        self.sessions: dict[str, Session] = {}
        self._session()  # refuses what it must before anybody comes
        refuse_other_cameras(self.keys, policy.spec)
        self.steps = steps_used(policy.spec.horizon, replan, ensemble)

    def _session(self) -> Session:
        spec = self.policy.spec
        ensemble = TemporalEnsemble(spec.horizon, self.replan, self.weights, spec.ensemble_k, spec.periodic)
        return Session(ensemble, self.replan, spec.fps)

    def get_action_spec(self) -> dict[str, DimSpec]:
        """The dataset's own dimensions and units: what they mean, the benchmark knows."""
        return {"actions": DimSpec("actions", self.policy.spec.dimensions, "raw")}

    def get_observation_spec(self) -> dict[str, DimSpec]:
        """Cameras by the benchmark's names, and the sentence."""
        found: dict[str, DimSpec] = {"language": LANGUAGE}
        for camera in self.policy.spec.cameras:
            found[self.keys.get(camera) or camera] = IMAGE_RGB
        return found | ({"state": RAW} if self.policy.spec.state else {})

    def get_observation_params(self) -> dict[str, Any]:
        """What a benchmark shall send; those that do not know a name pass over it."""
        spec = self.policy.spec
        # LIBERO's rotation of the hand as the datasets and vla0 have it: without this its sign differs at times.
        return {"send_wrist_image": len(spec.cameras) > 1, "send_state": spec.state is not None, "quat_no_antipodal": True}

    async def on_episode_start(self, config: dict[str, Any], ctx: Any) -> None:
        """A new episode: its session forgets all chunks."""
        self.sessions[ctx.session_id] = self._session()
        await super().on_episode_start(config, ctx)

    async def on_episode_end(self, result: dict[str, Any], ctx: Any) -> None:
        """Its chunks are forgotten."""
        self.sessions.pop(ctx.session_id, None)
        await super().on_episode_end(result, ctx)

    def predict_batch(self, obs_batch: list[Any], ctx_batch: list[Any]) -> list[Any]:
        """The next `replan` actions for each, decoded together."""
        now = time.monotonic()
        sessions = [self.sessions.setdefault(ctx.session_id, self._session()) for ctx in ctx_batch]
        asked = [self._asked(session, obs, now) for session, obs in zip(sessions, obs_batch, strict=True)]
        fine = [own for own in asked if isinstance(own, Observation)]
        chunks = iter(together(self.policy, fine, self.steps) if fine else ())
        found = [next(chunks) if isinstance(own, Observation) else own for own in asked]
        if len(found) == 1 and isinstance(found[0], InputError):
            raise found[0]
        return [
            {REFUSED: own} if isinstance(own, InputError) else {"actions": session.answer(own, now)}
            for session, own in zip(sessions, found, strict=True)
        ]

    async def _dispatch_batched(self, obs: Any, ctx: Any) -> Any:
        """vla-eval fails a whole batch where one fails: here one's fault stays one's own."""
        found = await super()._dispatch_batched(obs, ctx)
        if REFUSED in found:
            raise found[REFUSED]
        return found

    def _asked(self, session: Session, obs: Mapping[str, Any], now: float) -> Observation | InputError:
        try:
            return session.expecting(self._seen(obs), now)
        except InputError as error:
            return error

    def _seen(self, obs: Mapping[str, Any]) -> Any:
        message: dict[str, Any] = {**obs.get("images", {}), "prompt": obs.get("task_description")}
        state = next((obs[name] for name in ("states", "state") if obs.get(name) is not None), None)
        if state is not None:
            message["state"] = state
        return request(message, self.policy.spec, self.keys, SIDE).observation


def serve_harness(server: HarnessServer, host: str, port: int, ready: Callable[[int], None] = lambda port: None) -> None:
    """Serves until it is interrupted. Raises InputError where it cannot, or must not, listen."""
    refuse_open(host, protocol="vla-eval")

    async def serving() -> None:
        # Received here, else a SIGINT does nothing where a shell has started it in the background, which ignores them.
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with anyio.create_task_group() as group:
                ready(await group.start(serve_async, server, host, port))
                async for _ in signals:
                    group.cancel_scope.cancel()

    refuse_taken(host, port)
    anyio.run(serving)
