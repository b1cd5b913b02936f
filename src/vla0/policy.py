"""VLA0: an image and a sentence in, a chunk of actions out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from vla0 import ensemble, model
from vla0.codec import ActionCodec
from vla0.decode import decode
from vla0.prompt import Prompt
from vla0.rollout import ChunkPolicy
from vla0.spec import InputError, Observation, Spec, offset


class VLA0:
    """A VLM that writes actions. `predict` is pure; `act` remembers its chunks until `reset`."""

    def __init__(self, vlm: Any, processor: Any, spec: Spec, replan: int = 1, weights: str | Sequence[float] | None = None):
        self.model, self.processor, self.spec = vlm.eval(), processor, spec
        self.prompt, self.codec = Prompt(spec, processor), ActionCodec(spec)
        self.acting(replan, weights or ("v1" if spec.horizon > replan else ensemble.NONE))

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str | torch.device | None = None, dtype: str | torch.dtype = "auto"
    ) -> Self:
        """The policy of a checkpoint folder or Hub id. Raises InputError where it is not one, or not whole."""
        folder = model.locate(path)
        spec = Spec.load(folder)
        return cls(*model.load(folder, device, dtype), spec)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes a folder that `from_pretrained` and transformers read."""
        model.save(path, self.model, self.processor, self.spec)

    def eval(self) -> Self:
        """Itself, the model in evaluation mode (it is so from the start)."""
        self.model.eval()
        return self

    def predict(
        self,
        image: np.ndarray | Mapping[str, np.ndarray],
        instruction: str,
        state: np.ndarray | None = None,
        chunk_size: int | None = None,
    ) -> np.ndarray:
        """(H, D) float32: the next actions in the dataset's units; the first `chunk_size` of them where given.

        image: (h, w, 3) uint8 RGB where the checkpoint has one camera, else {camera: image}.
        """
        if not isinstance(image, Mapping):
            if len(self.spec.cameras) > 1:
                raise InputError(f"images of cameras {list(self.spec.cameras)}", "one image", "pass image={camera: array}")
            image = dict.fromkeys(self.spec.cameras, np.asarray(image))
        return self.predict_batch([Observation(image, instruction, state)], chunk_size)[0]

    def predict_batch(self, observations: Sequence[Observation], chunk_size: int | None = None) -> np.ndarray:
        """(B, H, D) float32: a chunk for each observation, decoded together; its first `chunk_size` steps where given."""
        if not observations:
            raise InputError("one observation at least", "none", "pass a list of them")
        if chunk_size is not None and not 1 <= chunk_size <= self.spec.horizon:
            raise InputError(
                f"chunk_size in 1..{self.spec.horizon} (the horizon)",
                f"{chunk_size}",
                "ask for less, or train a longer horizon",
            )
        levels = decode(self.model, self.prompt.observe(observations), self.prompt, chunk_size)
        base = np.stack([offset(observation, self.spec) for observation in observations])
        return (self.codec.decode(levels) + base[:, None]).astype(np.float32)

    def ensemble_actions(
        self, chunks: Sequence[np.ndarray], k: int | None = None, weights: str | Sequence[float] = "v1"
    ) -> np.ndarray:
        """(D,): the action of now, from chunks queried at successive steps, newest last."""
        return ensemble.ensemble_actions(chunks, k, weights)

    def acting(self, replan: int = 1, weights: str | Sequence[float] = "v1") -> Self:
        """Itself, set to execute `replan` steps per query and to ensemble by `weights` (vla0.ensemble)."""
        steps = ensemble.steps_used(self.spec.horizon, replan, weights)
        predict = lambda observation: self.predict_batch([observation], steps)[0]  # noqa: E731
        self._acting = ChunkPolicy(predict, self.spec.horizon, replan, weights)
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
