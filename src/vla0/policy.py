"""Policies that turn images and an instruction into a chunk of actions."""

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
    """A policy whose model writes actions as text, in this process or on a server.

    `predict` keeps no state and may be called from several threads. `act` remembers the chunks that
    it predicted until `reset`.

    Args:
        spec: The Spec of the checkpoint.
        prompt: Turns observations into the input of the decoder.
        decoder: Turns that input into levels.
        n_action_steps: Steps that `act` executes per query of the model.
        weights: Weights of the temporal ensemble (see `vla0.core.ensemble`). None means "v1" where
            chunks overlap, and no averaging elsewhere.
    """

    def __init__(
        self, spec: Spec, prompt: Any, decoder: Any, n_action_steps: int = 1,
        weights: str | Sequence[float] | None = None,
    ):  # fmt: skip
        self.spec, self.codec = spec, ActionCodec(spec)
        self.prompt, self.decoder = prompt, decoder
        self.warned = False  # whether the log has said that a state changes nothing
        # All decodes share one cache of keys and values: this lock is held for a pass at least.
        self.alone = threading.RLock()
        self.acting(n_action_steps, weights)

    def predict(
        self,
        image: np.ndarray | Mapping[str, np.ndarray],
        instruction: str,
        state: np.ndarray | None = None,
        num_steps: int | None = None,
    ) -> np.ndarray:
        """Predict the next actions.

        Args:
            image: (h, w, 3) uint8 RGB. A checkpoint with several cameras takes a mapping
                {camera: image}.
            instruction: What the robot shall do.
            state: (S,) in the dataset's units, for checkpoints that were trained with a state.
                With any other checkpoint, the log warns once that it changes nothing.
            num_steps: Predict only this many steps. None predicts the whole chunk.

        Returns:
            (H, D) float32 actions in the dataset's units, or (num_steps, D).

        Raises:
            InputError: When an image, the state, the instruction or num_steps does not fit the
                checkpoint.
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
        """Predict a chunk for each observation, all decoded together.

        Args:
            observations: B observations.
            num_steps: Predict only this many steps. None predicts the whole chunk.

        Returns:
            (B, H, D) float32 actions in the dataset's units, or (B, num_steps, D).

        Raises:
            InputError: When there is no observation, or one does not fit the checkpoint.
        """
        if not observations:
            raise InputError("one observation at least", "none", "pass a list of them")
        self._check(num_steps)
        with self.alone:
            levels = self.decoder.decode(*self._asked(observations, num_steps))
        return np.stack([self.actions(*pair) for pair in zip(levels, observations, strict=True)])

    def see(self, observation: Observation) -> Observation:
        """Return the observation, with as much of it prepared as can be done before a query."""
        return observation

    def predict_stream(
        self, observation: Observation, num_steps: int | None = None
    ) -> Iterator[np.ndarray]:
        """Predict the next actions and yield each as soon as it is certain.

        Yields:
            (D,) float32 actions, the same as those of `predict`.

        Raises:
            InputError: When the observation or num_steps does not fit the checkpoint, or when
                another decode began before this stream had ended.
        """
        self._check(num_steps)
        steps_yielded = 0
        with self.alone:
            parts = self.decoder.stream(*self._asked([observation], num_steps))
        while True:
            with self.alone:
                (levels,) = next(parts, (None,))
            if levels is None:
                return
            yield from self.actions(levels[steps_yielded:], observation)
            steps_yielded = len(levels)

    def ensemble_actions(
        self,
        chunks: Sequence[np.ndarray],
        k: int | None = None,
        weights: str | Sequence[float] = "v1",
    ) -> np.ndarray:
        """Average what several chunks predict for the present step.

        Args:
            chunks: (H, D) chunks that were queried at successive steps, newest last.
            k: How many of the newest chunks to average. None takes the Spec's ensemble_k.
            weights: Weights by age (see `vla0.core.ensemble`).

        Returns:
            (D,) float32 action.
        """
        return ensemble.ensemble_actions(
            chunks, k or self.spec.ensemble_k, weights, self.spec.periodic
        )

    def acting(self, n_action_steps: int = 1, weights: str | Sequence[float] | None = None) -> Self:
        """Set how `act` executes and averages chunks; the arguments are those of the class.

        Returns:
            This policy.

        Raises:
            InputError: When n_action_steps is outside the chunk, or leaves nothing to average.
        """
        if weights is None:
            overlapping = n_action_steps < self.spec.chunk_size and self.spec.ensemble_k != 1
            weights = "v1" if overlapping else ensemble.NONE
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
        """Return the action for the present step and advance by one step.

        Returns:
            (D,) float32 action, averaged over the chunks predicted since `reset`.
        """
        return self._acting.act(observation)

    def reset(self) -> None:
        """Forget the episode."""
        self._acting.reset()

    @property
    def chunks(self) -> list[tuple[int, np.ndarray]]:
        """The step and the (H, D) chunk of each query since `reset`."""
        return self._acting.chunks

    def _check(self, num_steps: int | None) -> None:
        """Raise InputError unless num_steps is None or within the chunk."""
        whole = isinstance(num_steps, int | np.integer) and not isinstance(num_steps, bool)
        if num_steps is not None and not (whole and 1 <= num_steps <= self.spec.chunk_size):
            raise InputError(
                f"num_steps in 1..{self.spec.chunk_size} (the chunk's size)",
                f"{num_steps}",
                "ask for less, or train with a larger action.chunk_size",
            )

    def _asked(self, observations: Sequence[Observation], num_steps: int | None) -> tuple[Any, ...]:
        """Return the arguments for the decoder."""
        guesses = [self.guess(observation) for observation in observations]
        if all(observation.action_prefix is None for observation in observations):
            return self.prompt.observe(observations), num_steps, guesses
        prefixes = [
            self._begun(observation, num_steps or self.spec.chunk_size)
            for observation in observations
        ]
        texts = [written(levels) for levels in prefixes]
        return self.prompt.observe(observations, prefixes=texts), num_steps, guesses, prefixes

    def _begun(self, observation: Observation, steps: int) -> np.ndarray:
        """Return the (n, D) levels with which the observation's chunk begins."""
        if (actions := observation.action_prefix) is None:
            return np.zeros((0, self.spec.dimensions), np.int64)
        return self._encoded("action_prefix", actions, observation, range(steps))

    def actions(self, levels: np.ndarray, observation: Observation) -> np.ndarray:
        """Turn (n, D) levels into (n, D) float32 actions."""
        return from_written(self.codec.decode(levels), observation, self.spec).astype(np.float32)

    def guess(self, observation: Observation) -> np.ndarray | None:
        """Return (H, D) levels close to the expected chunk, or None without draft actions."""
        if (actions := observation.draft_actions) is None:
            return None
        size = self.spec.chunk_size
        levels = self._encoded("draft_actions", actions, observation, range(1, size + 1))
        return filled(levels, size)

    def _encoded(self, name: str, actions: Any, seen: Observation, lengths: range) -> np.ndarray:
        """Return the (n, D) levels of actions (n, D), or raise InputError for another shape."""
        values, dimensions = np.asarray(actions, np.float64), self.spec.dimensions
        if values.ndim != 2 or values.shape[1] != dimensions or len(values) not in lengths:
            expected = f"{lengths[0]} to {lengths[-1]} actions of {dimensions}"
            remedy = "give the rest of the last chunk (draft_actions), or fewer (action_prefix)"
            raise InputError(expected, f"{name} of shape {values.shape}", remedy)
        return self.codec.encode(to_written(values, seen, self.spec))


class VLA0(TextPolicy):
    """A vision-language model, with its weights in this process, that writes actions as text.

    Args:
        vlm: The model, as transformers loads it.
        processor: The processor that belongs to the model.
        spec: The Spec of the checkpoint.
        n_action_steps: Steps that `act` executes per query of the model.
        weights: Weights of the temporal ensemble (see `vla0.core.ensemble`). None means "v1" where
            chunks overlap, and no averaging elsewhere.
        mode: A mode of `vla0.decode.approximate`. None decodes exactly.
    """

    def __init__(
        self,
        vlm: Any,
        processor: Any,
        spec: Spec,
        n_action_steps: int = 1,
        weights: str | Sequence[float] | None = None,
        mode: str | None = None,
    ):
        prompt, self.mode = Prompt(spec, processor), mode
        if mode is None:
            self.model: Any = vlm.eval()
            decoding: Any = decoder(self.model, prompt)
        else:
            self.model, decoding = approximate(vlm.eval(), prompt, mode)
        self.processor = processor
        self.specs = {MAIN: spec}  # what `save_pretrained` writes, by embodiment
        super().__init__(spec, prompt, decoding, n_action_steps, weights)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        embodiment: str = MAIN,
    ) -> Self:
        """Load the policy of a checkpoint.

        Args:
            path: Checkpoint folder, or id of a model on the Hub.
            device: Where the model runs. None takes the GPU where there is one.
            dtype: Type of the weights. "auto" keeps the type in which they were saved.
            embodiment: For a checkpoint trained on a mixture, the name of the dataset whose robot
                is to act. The default is the first dataset.

        Raises:
            InputError: When path is not a checkpoint, or the checkpoint is incomplete.
        """
        folder = locate(path)
        spec = Spec.load(folder, embodiment)
        policy = cls(*model.load(folder, device, dtype), spec)
        policy.specs = {name: Spec.load(folder, name) for name in embodiments(folder)}
        return policy

    @staticmethod
    def remote(base_url: str, spec: Spec | str | Path, **server: Any) -> "RemoteVLA0":
        """Return the policy of a checkpoint that another engine serves over OpenAI's chat API.

        A later query raises TimeoutError or ConnectionError when the server stops answering.

        Args:
            base_url: Address of the server: vLLM, SGLang or llama.cpp.
            spec: The checkpoint's folder or Hub id, or its Spec (not enough of SmolVLM2).
            server: The options of `vla0.decode.remote.Remote`.

        Raises:
            InputError: When the server does not answer.
        """
        if not isinstance(spec, Spec):
            folder = locate(spec, weights=False)
            spec = Spec.load(folder)
            server = {"opening": model.opening_of(folder, spec)} | server
        return RemoteVLA0(base_url, spec, **server)

    def save_pretrained(self, path: str | Path) -> None:
        """Write a checkpoint folder that `from_pretrained` and transformers can read.

        Raises:
            InputError: When this policy decodes approximately, or path holds other files.
        """
        if self.mode is not None:
            got = f"one made {self.mode}"
            raise InputError("the exact policy, to save", got, "save what it was made from")
        model.save(path, self.model, self.processor, self.specs)

    def eval(self) -> Self:
        """Put the model in evaluation mode, in which it also starts, and return this policy."""
        self.model.eval()
        return self

    def see(self, observation: Observation) -> Observation:
        """Return the observation with its images already cropped and resized.

        `predict_batch` then need not do it. Call this in a thread that would otherwise wait.
        """
        return replace(observation, seen=self.prompt.see(observation))

    def compile(self) -> Self:
        """Compile the layers, for fewer kernels a pass on a GPU, and return this policy.

        Each size, by observations and length of prompts, takes seconds when it is first met.

        Raises:
            InputError: When the model is not Qwen2.5-VL, or the policy decodes approximately.
        """
        if self.mode is not None:
            raise InputError(
                "an exact policy, to compile", f"one made {self.mode}", "decode exactly"
            )
        self.decoder = decoder(self.model, self.prompt, compiled=True)
        return self

    def approximate(self, mode: str) -> "VLA0":
        """Return a second policy that decodes faster but may write other numbers.

        Both policies share the weights. `vla0.decode.approximate` lists the modes.
        """
        faster = VLA0(self.model, self.processor, self.spec, *self.settings, mode=mode)
        faster.alone = self.alone  # both use the parts of the model that are not copied
        return faster


class RemoteVLA0(TextPolicy):
    """A policy whose model runs in another engine. `VLA0.remote` makes it."""

    def __init__(self, base_url: str, spec: Spec, **server: Any):
        from vla0.decode.remote import ChatPrompt, Remote

        super().__init__(spec, ChatPrompt(spec), Remote(base_url, spec, **server))

    def save_pretrained(self, path: str | Path) -> None:
        """Raise InputError, because the weights are on the server."""
        got, remedy = "a policy of another's server", "copy the checkpoint that it serves"
        raise InputError("weights, to save", got, remedy)

    def approximate(self, mode: str) -> VLA0:
        """Raise InputError, because the weights are on the server."""
        got, remedy = "a policy of another's server", "let that server be approximate"
        raise InputError("weights here", got, remedy)
