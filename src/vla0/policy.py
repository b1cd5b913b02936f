"""VLA0: an image and an instruction in, a chunk of actions out."""

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from vla0.checkpoint import io as model
from vla0.checkpoint.location import locate
from vla0.core import ensemble
from vla0.core.codec import ActionCodec, written
from vla0.core.prompt import Prompt
from vla0.core.relative import from_written, to_written
from vla0.core.rollout import ChunkPolicy
from vla0.core.spec import MAIN, Observation, Spec, embodiments
from vla0.decode import decoder
from vla0.decode.approximate import approximate
from vla0.decode.draft import filled
from vla0.errors import InputError

logger = logging.getLogger(__name__)


class TextPolicy:
    """A model that writes actions, wherever it runs.

    `predict` is pure, also from several threads; `act` remembers its chunks until `reset`.
    """

    def __init__(
        self,
        spec: Spec,
        prompt: Any,
        decoder: Any,
        n_action_steps: int = 1,
        weights: str | Sequence[float] | None = None,
    ):
        """prompt: observations → what the decoder takes. weights: of the ensemble; None: "v1" where
        chunks overlap.
        """
        self.spec, self.codec = spec, ActionCodec(spec)
        self.prompt, self.decoder = prompt, decoder
        self.warned = False  # that a state is given in vain
        # a decode's keys and values lie in one place; held for a pass at least
        self.alone = threading.RLock()
        reaching = min(-(-spec.chunk_size // n_action_steps), spec.ensemble_k or spec.chunk_size)
        self.acting(n_action_steps, weights or ("v1" if reaching > 1 else ensemble.NONE))

    def predict(
        self,
        image: np.ndarray | Mapping[str, np.ndarray],
        instruction: str,
        state: np.ndarray | None = None,
        num_steps: int | None = None,
    ) -> np.ndarray:
        """(H, D) float32: the next actions in the dataset's units; the first `num_steps` of them
        where given.

        image: (h, w, 3) uint8 RGB where the checkpoint has one camera, else {camera: image}. A
        state is for checkpoints that were trained with one; of another the log says that it changes
        nothing.
        """
        if (
            state is not None
            and not (self.spec.state or self.spec.relative_dims)
            and not self.warned
        ):
            logger.warning("state= changes nothing: this checkpoint was trained without one")
            self.warned = True
        if not isinstance(image, Mapping):
            if len(self.spec.cameras) > 1:
                raise InputError(
                    f"images of cameras {list(self.spec.cameras)}",
                    "one image",
                    "pass image={camera: array}",
                )
            image = dict.fromkeys(self.spec.cameras, np.asarray(image))
        return self.predict_batch([Observation(image, instruction, state)], num_steps)[0]

    def predict_batch(
        self, observations: Sequence[Observation], num_steps: int | None = None
    ) -> np.ndarray:
        """(B, H, D) float32: a chunk for each observation, decoded together; its first `num_steps`
        steps where given.
        """
        if not observations:
            raise InputError("one observation at least", "none", "pass a list of them")
        self._check(num_steps)
        with self.alone:
            levels = self.decoder.decode(*self._asked(observations, num_steps))
        return np.stack([self._actions(*pair) for pair in zip(levels, observations, strict=True)])

    def see(self, observation: Observation) -> Observation:
        """The observation, with whatever of it can be prepared beforehand, by threads with time."""
        return observation

    def predict_stream(
        self, observation: Observation, num_steps: int | None = None
    ) -> Iterator[np.ndarray]:
        """The actions (D,) of `predict`, one after another, each as soon as it is certain."""
        self._check(num_steps)
        given = 0
        with self.alone:
            parts = self.decoder.stream(*self._asked([observation], num_steps))
        while True:
            with self.alone:
                (levels,) = next(parts, (None,))
            if levels is None:
                return
            yield from self._actions(levels[given:], observation)
            given = len(levels)

    def ensemble_actions(
        self,
        chunks: Sequence[np.ndarray],
        k: int | None = None,
        weights: str | Sequence[float] = "v1",
    ) -> np.ndarray:
        """(D,): the action of now, from chunks queried at successive steps, newest last; k: default
        the Spec's.
        """
        return ensemble.ensemble_actions(
            chunks, k or self.spec.ensemble_k, weights, self.spec.periodic
        )

    def acting(self, n_action_steps: int = 1, weights: str | Sequence[float] = "v1") -> Self:
        """Itself, set to execute `n_action_steps` steps per query and to ensemble by `weights`
        (vla0.core.ensemble).
        """
        steps = ensemble.steps_used(self.spec.chunk_size, n_action_steps, weights)
        predict = lambda observation: self.predict_batch([observation], steps)[0]  # noqa: E731
        self._acting = ChunkPolicy(
            predict,
            self.spec.chunk_size,
            n_action_steps,
            weights,
            self.spec.ensemble_k,
            self.spec.periodic,
        )
        self.settings = n_action_steps, weights
        return self

    def act(self, observation: Observation) -> np.ndarray:
        """(D,): the action for this instant, ensembled over what was predicted since `reset`."""
        return self._acting.act(observation)

    def reset(self) -> None:
        """Forgets the episode."""
        self._acting.reset()

    @property
    def chunks(self) -> list[tuple[int, np.ndarray]]:
        """(step, chunk (H, D)) of each query since `reset`."""
        return self._acting.chunks

    def _check(self, num_steps: int | None) -> None:
        if num_steps is not None and not 1 <= num_steps <= self.spec.chunk_size:
            raise InputError(
                f"num_steps in 1..{self.spec.chunk_size} (the chunk's size)",
                f"{num_steps}",
                "ask for less, or train with a larger action.chunk_size",
            )

    def _asked(self, observations: Sequence[Observation], num_steps: int | None) -> tuple[Any, ...]:
        """What a decoder takes."""
        guesses = [self._guess(observation) for observation in observations]
        if all(observation.action_prefix is None for observation in observations):
            return self.prompt.observe(observations), num_steps, guesses
        prefixes = [
            self._begun(observation, num_steps or self.spec.chunk_size)
            for observation in observations
        ]
        texts = [written(levels) for levels in prefixes]
        return self.prompt.observe(observations, prefixes=texts), num_steps, guesses, prefixes

    def _begun(self, observation: Observation, steps: int) -> np.ndarray:
        """(n, D) levels that the observation's chunk begins with."""
        dimensions = self.spec.dimensions
        if observation.action_prefix is None:
            return np.zeros((0, dimensions), np.int64)
        action_prefix = np.asarray(observation.action_prefix, np.float64)
        if (
            action_prefix.ndim != 2
            or action_prefix.shape[1] != dimensions
            or len(action_prefix) >= steps
        ):
            expected = f"action_prefix: fewer than {steps} actions of {dimensions}"
            raise InputError(
                expected, f"shape {action_prefix.shape}", "commit to fewer steps than a chunk has"
            )
        return self.codec.encode(to_written(action_prefix, observation, self.spec))

    def _actions(self, levels: np.ndarray, observation: Observation) -> np.ndarray:
        """(n, D) float32 of levels (n, D)."""
        return from_written(self.codec.decode(levels), observation, self.spec).astype(np.float32)

    def _guess(self, observation: Observation) -> np.ndarray | None:
        """(H, D) levels near which the observation says that its chunk lies."""
        if observation.draft_actions is None:
            return None
        expected = np.asarray(observation.draft_actions, np.float64)
        most, dimensions = self.spec.chunk_size, self.spec.dimensions
        if expected.ndim != 2 or expected.shape[1] != dimensions or not 1 <= len(expected) <= most:
            raise InputError(
                f"expected: 1 to {most} actions of {dimensions}",
                f"shape {expected.shape}",
                "give the rest of the last chunk",
            )
        levels = self.codec.encode(to_written(expected, observation, self.spec))
        return filled(levels, most)


class VLA0(TextPolicy):
    """A VLM that writes actions, and its weights."""

    def __init__(
        self,
        vlm: Any,
        processor: Any,
        spec: Spec,
        n_action_steps: int = 1,
        weights: str | Sequence[float] | None = None,
        mode: str | None = None,
    ):
        """vlm, processor: of transformers.

        mode: of vla0.decode.approximate; None decodes exactly.
        """
        prompt, self.mode = Prompt(spec, processor), mode
        if mode is None:
            self.model: Any = vlm.eval()
            decoding: Any = decoder(self.model, prompt)
        else:
            self.model, decoding = approximate(vlm.eval(), prompt, mode)
        self.processor = processor
        self.specs = {MAIN: spec}  # that `save_pretrained` writes
        super().__init__(spec, prompt, decoding, n_action_steps, weights)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        embodiment: str = MAIN,
    ) -> Self:
        """The policy of a checkpoint folder or Hub id.

        Raises InputError where it is not one, or not whole.

        embodiment: of a checkpoint trained on a mixture, the name of the dataset whose robot is to
        act; default the first.
        """
        folder = locate(path)
        spec = Spec.load(folder, embodiment)
        policy = cls(*model.load(folder, device, dtype), spec)
        policy.specs = {name: Spec.load(folder, name) for name in embodiments(folder)}
        return policy

    @staticmethod
    def remote(base_url: str, spec: Spec | str | Path, **server: Any) -> "RemoteVLA0":
        """The policy of a checkpoint that another engine serves over OpenAI's chat API: vLLM,
        SGLang, llama.cpp.

        spec: the checkpoint's, its folder or Hub id. server: model, key, engine, timeout_s, extra
        of vla0.decode.remote. Raises InputError where the server does not answer; TimeoutError or
        ConnectionError when it stops to.
        """
        own = spec if isinstance(spec, Spec) else Spec.load(locate(spec, weights=False))
        return RemoteVLA0(base_url, own, **server)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes a folder that `from_pretrained` and transformers read."""
        if self.mode is not None:
            got, remedy = f"one made {self.mode}", "save the one that it was made from"
            raise InputError("the exact policy, to save", got, remedy)
        model.save(path, self.model, self.processor, self.specs)

    def eval(self) -> Self:
        """Itself, the model in evaluation mode (it is so from the start)."""
        self.model.eval()
        return self

    def see(self, observation: Observation) -> Observation:
        """The observation with its pictures cropped and resized, so that `predict_batch` need not:
        for threads with time.
        """
        return replace(observation, seen=self.prompt.see(observation))

    def approximate(self, mode: str) -> "VLA0":
        """Another policy of the same weights that decodes faster and may write other numbers: see
        vla0.decode.approximate.
        """
        other = VLA0(self.model, self.processor, self.spec, *self.settings, mode=mode)
        other.alone = self.alone  # they share what is not copied of the model
        return other


class RemoteVLA0(TextPolicy):
    """A policy whose model another engine runs: see `VLA0.remote`."""

    def __init__(self, base_url: str, spec: Spec, **server: Any):
        from vla0.decode.remote import ChatPrompt, Remote

        super().__init__(spec, ChatPrompt(spec), Remote(base_url, spec, **server))

    def save_pretrained(self, path: str | Path) -> None:
        """Raises InputError: the weights are elsewhere."""
        got, remedy = "a policy of another's server", "copy the checkpoint that it serves"
        raise InputError("weights, to save", got, remedy)

    def approximate(self, mode: str) -> VLA0:
        """Raises InputError: the weights are elsewhere."""
        got, remedy = "a policy of another's server", "let that server be approximate"
        raise InputError("weights here", got, remedy)
