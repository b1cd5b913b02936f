"""VLA0: an image and a sentence in, a chunk of actions out."""

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
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
from vla0.decode.approximate import inexact
from vla0.decode.draft import filled
from vla0.errors import InputError

logger = logging.getLogger(__name__)


class VLA0:
    """A VLM that writes actions. `predict` is pure, also from several threads; `act` remembers its chunks until `reset`."""

    told = False  # that a state is given in vain

    def __init__(self, vlm: Any, processor: Any, spec: Spec, replan: int = 1, weights: str | Sequence[float] | None = None):
        self.model: Any = vlm.eval()
        self.processor, self.spec = processor, spec
        self.specs = {MAIN: spec}  # that `save_pretrained` writes
        self.prompt, self.codec = Prompt(spec, processor), ActionCodec(spec)
        self.decoder, self.mode = decoder(self.model, self.prompt), None
        self._ready(replan, weights)

    def _ready(self, replan: int, weights: str | Sequence[float] | None) -> Self:
        self.alone = threading.RLock()  # a decode's keys and values lie in one place; held for a pass at least
        averaged = min(-(-self.spec.horizon // replan), self.spec.ensemble_k or self.spec.horizon) > 1
        return self.acting(replan, weights or ("v1" if averaged else ensemble.NONE))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        embodiment: str = MAIN,
    ) -> Self:
        """The policy of a checkpoint folder or Hub id. Raises InputError where it is not one, or not whole.

        embodiment: of a checkpoint trained on a mixture, the name of the dataset whose robot is to act; default the first.
        """
        folder = locate(path)
        spec = Spec.load(folder, embodiment)
        policy = cls(*model.load(folder, device, dtype), spec)
        policy.specs = {name: Spec.load(folder, name) for name in embodiments(folder)}
        return policy

    @classmethod
    def remote(cls, base_url: str, spec: Spec | str | Path, **server: Any) -> Self:
        """The policy of a checkpoint that another engine serves over OpenAI's chat API: vLLM, SGLang, llama.cpp.

        spec: the checkpoint's, its folder or Hub id. server: model, key, engine, timeout_s, extra of vla0.decode.remote.
        Raises InputError where the server does not answer; TimeoutError or ConnectionError when it stops to.
        """
        from vla0.decode.remote import ChatPrompt, Remote

        policy = cls.__new__(cls)
        policy.spec = spec if isinstance(spec, Spec) else Spec.load(locate(spec, weights=False))
        policy.model = policy.processor = policy.mode = None
        policy.specs, policy.codec = {MAIN: policy.spec}, ActionCodec(policy.spec)
        policy.prompt, policy.decoder = ChatPrompt(policy.spec), Remote(base_url, policy.spec, **server)
        return policy._ready(1, None)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes a folder that `from_pretrained` and transformers read."""
        if self.model is None:
            raise InputError("weights, to save", "a policy of another's server", "copy the checkpoint that it serves")
        if self.mode is not None:
            raise InputError("the exact policy, to save", f"one made {self.mode}", "save the one that it was made from")
        model.save(path, self.model, self.processor, self.specs)

    def eval(self) -> Self:
        """Itself, the model in evaluation mode (it is so from the start)."""
        if self.model is not None:
            self.model.eval()
        return self

    def inexact(self, mode: str) -> "VLA0":
        """Another policy of the same weights that decodes faster and may write other numbers: see vla0.decode.approximate."""
        if self.model is None:
            raise InputError("weights here", "a policy of another's server", "let that server be inexact")
        other = copy(self)
        other.model, other.decoder = inexact(self.model, self.prompt, mode)
        other.mode = mode
        return other.acting(*self.settings)

    def predict(
        self,
        image: np.ndarray | Mapping[str, np.ndarray],
        instruction: str,
        state: np.ndarray | None = None,
        chunk_size: int | None = None,
    ) -> np.ndarray:
        """(H, D) float32: the next actions in the dataset's units; the first `chunk_size` of them where given.

        image: (h, w, 3) uint8 RGB where the checkpoint has one camera, else {camera: image}. A state is for checkpoints
        that were trained with one; of another the log says that it changes nothing.
        """
        if state is not None and not (self.spec.state or self.spec.relative) and not self.told:
            logger.warning("state= changes nothing: this checkpoint was trained without one")
            self.told = True
        if not isinstance(image, Mapping):
            if len(self.spec.cameras) > 1:
                raise InputError(f"images of cameras {list(self.spec.cameras)}", "one image", "pass image={camera: array}")
            image = dict.fromkeys(self.spec.cameras, np.asarray(image))
        return self.predict_batch([Observation(image, instruction, state)], chunk_size)[0]

    def predict_batch(self, observations: Sequence[Observation], chunk_size: int | None = None) -> np.ndarray:
        """(B, H, D) float32: a chunk for each observation, decoded together; its first `chunk_size` steps where given."""
        if not observations:
            raise InputError("one observation at least", "none", "pass a list of them")
        self._check(chunk_size)
        with self.alone:
            levels = self.decoder.decode(*self._asked(observations, chunk_size))
        return np.stack([self._actions(*pair) for pair in zip(levels, observations, strict=True)])

    def see(self, observation: Observation) -> Observation:
        """The observation with its pictures cropped and resized, so that `predict_batch` need not: for threads with time."""
        return observation if self.model is None else replace(observation, seen=self.prompt.see(observation))

    def predict_stream(self, observation: Observation, chunk_size: int | None = None) -> Iterator[np.ndarray]:
        """The actions (D,) of `predict`, one after another, each as soon as it is certain."""
        self._check(chunk_size)
        given = 0
        with self.alone:
            parts = self.decoder.stream(*self._asked([observation], chunk_size))
        while True:
            with self.alone:
                (levels,) = next(parts, (None,))
            if levels is None:
                return
            yield from self._actions(levels[given:], observation)
            given = len(levels)

    def ensemble_actions(
        self, chunks: Sequence[np.ndarray], k: int | None = None, weights: str | Sequence[float] = "v1"
    ) -> np.ndarray:
        """(D,): the action of now, from chunks queried at successive steps, newest last; k: default the Spec's."""
        return ensemble.ensemble_actions(chunks, k or self.spec.ensemble_k, weights, self.spec.periodic)

    def acting(self, replan: int = 1, weights: str | Sequence[float] = "v1") -> Self:
        """Itself, set to execute `replan` steps per query and to ensemble by `weights` (vla0.core.ensemble)."""
        steps = ensemble.steps_used(self.spec.horizon, replan, weights)
        predict = lambda observation: self.predict_batch([observation], steps)[0]  # noqa: E731
        self._acting = ChunkPolicy(predict, self.spec.horizon, replan, weights, self.spec.ensemble_k, self.spec.periodic)
        self.settings = replan, weights
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

    def _check(self, chunk_size: int | None) -> None:
        if chunk_size is not None and not 1 <= chunk_size <= self.spec.horizon:
            raise InputError(
                f"chunk_size in 1..{self.spec.horizon} (the horizon)",
                f"{chunk_size}",
                "ask for less, or train a longer horizon",
            )

    def _asked(self, observations: Sequence[Observation], chunk_size: int | None) -> tuple[Any, ...]:
        """What a decoder takes."""
        guesses = [self._guess(observation) for observation in observations]
        if all(observation.committed is None for observation in observations):
            return self.prompt.observe(observations), chunk_size, guesses
        begun = [self._begun(observation, chunk_size or self.spec.horizon) for observation in observations]
        texts = [written(levels) for levels in begun]
        return self.prompt.observe(observations, begun=texts), chunk_size, guesses, begun

    def _begun(self, observation: Observation, steps: int) -> np.ndarray:
        """(n, D) levels that the observation's chunk begins with."""
        dimensions = self.spec.dimensions
        if observation.committed is None:
            return np.zeros((0, dimensions), np.int64)
        committed = np.asarray(observation.committed, np.float64)
        if committed.ndim != 2 or committed.shape[1] != dimensions or len(committed) >= steps:
            expected = f"committed: fewer than {steps} actions of {dimensions}"
            raise InputError(expected, f"shape {committed.shape}", "commit to fewer steps than a chunk has")
        return self.codec.encode(to_written(committed, observation, self.spec))

    def _actions(self, levels: np.ndarray, observation: Observation) -> np.ndarray:
        """(n, D) float32 of levels (n, D)."""
        return from_written(self.codec.decode(levels), observation, self.spec).astype(np.float32)

    def _guess(self, observation: Observation) -> np.ndarray | None:
        """(H, D) levels near which the observation says that its chunk lies."""
        if observation.expected is None:
            return None
        expected = np.asarray(observation.expected, np.float64)
        most, dimensions = self.spec.horizon, self.spec.dimensions
        if expected.ndim != 2 or expected.shape[1] != dimensions or not 1 <= len(expected) <= most:
            raise InputError(
                f"expected: 1 to {most} actions of {dimensions}", f"shape {expected.shape}", "give the rest of the last chunk"
            )
        levels = self.codec.encode(to_written(expected, observation, self.spec))
        return filled(levels, most)
