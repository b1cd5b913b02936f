"""VLA0 behind LeRobot's interface: batches of tensors there, Samples and Observations of the spine
here.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import draccus
import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from lerobot_policy_vla0.configuration_vla0 import VLA0Config
from vla0.checkpoint import io as models
from vla0.checkpoint.location import locate
from vla0.core.ensemble import TemporalEnsemble
from vla0.core.images import DEPTH_REMEDY
from vla0.core.prompt import IGNORE, Prompt
from vla0.core.spec import SPEC_FILE, Observation, Sample, Spec
from vla0.data.dataset import collator
from vla0.data.storage import names_of
from vla0.errors import InputError
from vla0.policy import VLA0
from vla0.train.config import Lora
from vla0.train.lora import adapted, lora_layers
from vla0.train.loss import answered, summed

logger = logging.getLogger(__name__)

ACTION, STATE, PADDED = "action", "observation.state", "action_is_pad"


class VLA0Policy(PreTrainedPolicy):
    """The policy. `self.model` is the unmodified VLM, `self.vla` what writes and reads its text."""

    config_class = VLA0Config  # type: ignore[assignment]
    name = "vla0"  # type: ignore[assignment]
    config: VLA0Config

    def __init__(
        self, config: VLA0Config, vla: VLA0 | None = None, dataset_meta: Any = None, **others: Any
    ):
        """vla: of a checkpoint; None: config.model_name, to be fine-tuned on the dataset of
        dataset_meta.
        """
        super().__init__(config)
        if vla is None:
            spec = (
                Spec.parse(config.spec, "config.spec")
                if config.spec
                else spec_of_dataset(config, dataset_meta)
            )
            vla = VLA0(*models.load(locate(config.model_name), config.device, torch.float32), spec)
        _follow(config, vla.spec)
        self.vla = vla
        self.model = adapted(vla.model, Lora(), config.freeze_vision_encoder)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        self.collate = collator([Prompt(vla.spec, vla.processor)], config.augmentation)
        self.reset()

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, config: Any = None, **others: Any
    ) -> Self:
        """Of a checkpoint folder or Hub id, whether vla0 or LeRobot saved it; of adapters, the
        model that they change.
        """
        folder, meta = locate(pretrained_name_or_path), others.get("dataset_meta")
        config = config or PreTrainedConfig.from_pretrained(folder)
        if (folder / SPEC_FILE).is_file():  # to be trained in fp32, whatever it was saved as
            vla = VLA0.from_pretrained(
                folder, config.device, "auto" if meta is None else torch.float32
            )
            _compare(vla.spec, config, meta)
        else:
            spec = (
                Spec.parse(config.spec, "config.spec")
                if config.spec
                else spec_of_dataset(config, meta)
            )
            vla = VLA0(*models.load(folder, config.device, torch.float32), spec)
        return cls(config, vla).eval()

    def _save_pretrained(
        self, save_directory: Path, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """The files of a vla0 checkpoint; its config.json is LeRobot's too."""
        weights = (
            None
            if state_dict is None
            else {k.removeprefix("model."): v for k, v in state_dict.items()}
        )
        with TemporaryDirectory(dir=save_directory.parent) as above:
            folder = Path(above) / "saved"
            models.save(folder, self.model, self.vla.processor, self.vla.specs, weights)
            content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            content |= draccus.encode(self.config, PreTrainedConfig)
            (folder / "config.json").write_text(
                json.dumps(content, indent=2) + "\n", encoding="utf-8"
            )
            for file in folder.iterdir():
                file.replace(save_directory / file.name)

    def get_optim_params(self) -> Any:
        """What is trained."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def _get_default_peft_targets(self) -> dict[str, Any]:
        return {"target_modules": lora_layers(self.model, self.config.freeze_vision_encoder)}

    def _validate_peft_config(self, peft_config: Any) -> None:
        """Adapters learn beside the checkpoint, or beside the model itself."""
        self.name_or_path = str(self.config.pretrained_path or self.config.model_name)

    def forward(
        self, batch: dict[str, Any], reduction: str = "mean"
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of the answer's tokens, and the share of them that the model would have written
        so.
        """
        samples = self._samples(batch)
        # of torch's generator, which LeRobot resumes
        seeds = torch.randint(2**31, (len(samples),)).tolist()
        inputs = self.collate(
            [(sample, (seed,), 0) for sample, seed in zip(samples, seeds, strict=True)]
        )
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        _, logits, targets = answered(self.model, inputs)
        losses, counts = summed(logits, targets), (targets != IGNORE).sum(dim=1)
        with torch.no_grad():
            right = ((logits.argmax(-1) == targets) & (targets != IGNORE)).sum() / counts.sum()
        told = {"token_accuracy": float(right)}
        return (losses / counts if reduction == "none" else losses.sum() / counts.sum()), told

    @torch.no_grad()
    def predict_action_chunk(
        self,
        batch: dict[str, Any],
        inference_delay: int = 0,
        prev_chunk_left_over: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """(B, H, D) in the dataset's units.

        With real-time chunking the first `inference_delay` steps are those that will have been
        executed by then: they are forced, and the model goes on from them.
        """
        observations = self._observations(batch)
        if prev_chunk_left_over is not None and inference_delay > 0:
            ahead = prev_chunk_left_over.float().cpu().numpy().reshape(-1, self.vla.spec.dimensions)
            ahead = ahead[
                : min(inference_delay, self.vla.spec.chunk_size - 1, left_over(ahead, self.given))
            ]
            if len(ahead):
                observations = [
                    replace(observation, action_prefix=ahead) for observation in observations
                ]
        chunks = self.vla.predict_batch(observations)
        self.given = chunks[0]
        return torch.from_numpy(chunks)

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **others: Any) -> Tensor:
        """(B, D): of the chunks that are executed in turn, or averaged."""
        steps = self.config.n_action_steps or self.config.chunk_size
        if self.step % steps == 0:
            chunks = self.vla.predict_batch(self._observations(batch))
            self.ensemble.add(np.moveaxis(chunks, 0, 1), self.step)  # (H, B, D)
        action = self.ensemble.action(self.step)
        self.step += 1
        return torch.from_numpy(action)

    def reset(self) -> None:
        """A new episode."""
        config = self.config
        self.step, self.given = 0, None
        steps = config.n_action_steps or config.chunk_size
        if not 1 <= steps <= config.chunk_size:
            raise InputError(
                f"n_action_steps in 1..{config.chunk_size} (chunk_size)",
                f"{steps}",
                "leave it out for all",
            )
        spec = self.vla.spec
        self.ensemble = TemporalEnsemble(
            spec.chunk_size, steps, config.temporal_ensemble, spec.ensemble_k, spec.periodic
        )

    def supports_rtc(self) -> bool:
        """Yes, exactly: see `predict_action_chunk`."""
        return True

    def _samples(self, batch: dict[str, Any]) -> list[Sample]:
        actions = batch[ACTION].float().cpu().numpy()
        padded = (
            batch[PADDED].cpu().numpy() if PADDED in batch else np.zeros(actions.shape[:2], bool)
        )
        return [
            Sample(*row) for row in zip(self._observations(batch), actions, ~padded, strict=True)
        ]

    def _observations(self, batch: dict[str, Any]) -> list[Observation]:
        """One for each row of a batch: pictures in 0..1, channels first, as LeRobot has them."""
        spec, keys = self.vla.spec, list(self.config.image_features)
        if missing := [key for key in keys if key not in batch]:
            found = [key for key in batch if "image" in key]
            raise InputError(
                f"pictures '{missing[0]}'", f"{found}", "give --rename_map={name here: that name}"
            )
        pictures = {
            camera: _frames(batch[key], key) for camera, key in zip(spec.cameras, keys, strict=True)
        }
        states = (
            batch[STATE].float().cpu().numpy()
            if (spec.state or spec.relative_dims) and STATE in batch
            else None
        )
        tasks = batch.get("task", "")
        count = len(next(iter(pictures.values())))
        tasks = [tasks] * count if isinstance(tasks, str) else list(tasks)
        return [
            Observation(
                {camera: frames[row] for camera, frames in pictures.items()},
                tasks[row],
                None if states is None else states[row],
            )
            for row in range(count)
        ]


def left_over(ahead: np.ndarray, given: np.ndarray | None) -> int:
    """How many of the rows (T, D) are left of the chunk (H, D) that was given last; all of them
    where they are not of it.

    LeRobot fills them up with zeros to a fixed length, and zeros are actions, too: a joint at 0, a
    difference at rest.
    """
    for begun in range(0 if given is None else len(given)):
        rest = given[begun : begun + len(ahead)]  # type: ignore[index]
        if np.array_equal(ahead[: len(rest)], rest) and not ahead[len(rest) :].any():
            return len(rest)
    return len(ahead)


def spec_of_dataset(config: VLA0Config, meta: Any) -> Spec:
    """The Spec of a dataset under a config: bounds are the dataset's minima and maxima."""
    if meta is None:
        raise InputError(
            "a dataset, for the bounds of actions",
            "none",
            "train on one, or give --policy.path=CHECKPOINT",
        )
    _refuse_misread(config, meta)
    bounds = {key: [np.ravel(meta.stats[key][end]).tolist() for end in ("min", "max")]
              for key in (ACTION, STATE) if key in meta.stats}  # fmt: skip
    if config.use_state and STATE not in bounds:
        raise InputError(
            f"'{STATE}' for use_state", f"{sorted(meta.features)}", "leave use_state out"
        )
    low, high = map(tuple, bounds[ACTION])
    low_state, high_state = map(tuple, bounds.get(STATE, ((), ())))
    return Spec(
        low=low,
        high=high,
        fps=float(meta.fps),
        cameras=tuple(key.rsplit(".", 1)[-1] for key in config.image_features),
        base_model=config.model_name,
        chunk_size=config.chunk_size,
        bins=config.action_bins,
        image_size=config.image_size,
        crop=config.crop,
        tile=config.tile,
        system=config.system,
        state=(low_state, high_state) if config.use_state else None,
        action_names=names_of(meta.features[ACTION]),
        state_names=names_of(meta.features[STATE]) if config.use_state else None,
    )


def _compare(spec: Spec, config: VLA0Config, meta: Any) -> None:
    """A checkpoint keeps its bounds when it learns from another dataset."""
    if meta is not None:
        _refuse_misread(config, meta)
    if meta is not None and ACTION in meta.stats:
        low, high = (np.ravel(meta.stats[ACTION][end]) for end in ("min", "max"))
        if len(low) != spec.dimensions:
            remedy = "for another robot: --policy.type=vla0 --policy.model_name=CHECKPOINT"
            raise InputError(
                f"actions of {spec.dimensions} numbers, as the checkpoint",
                f"{len(low)} in the dataset",
                remedy,
            )
        beyond = np.flatnonzero(
            (low < np.array(spec.low) - 1e-6) | (high > np.array(spec.high) + 1e-6)
        )
        beyond = [d for d in beyond.tolist() if d not in spec.relative_dims]
        if beyond:
            text = (
                "actions %s of this dataset leave the checkpoint's bounds and are clipped; "
                "for bounds of its own: %s"
            )
            logger.warning(text, beyond, "--policy.type=vla0 --policy.model_name=CHECKPOINT")


def _refuse_misread(config: VLA0Config, meta: Any) -> None:
    """Raises InputError for a dataset that LeRobot's reader would give us wrongly without a
    word.
    """
    if flagged := [key for key in config.image_features if key in meta.depth_keys]:
        raise InputError(
            f"'{flagged[0]}' to be colours",
            "a camera that the dataset flags as depth maps",
            "leave it out",
        )
    if meta.tasks is not None and (numbers := meta.tasks["task_index"].tolist()) != list(
        range(len(numbers))
    ):
        remedy = "write meta/tasks.parquet in that order, or train with `vla0 train`"
        raise InputError(
            "instructions in the order of their task_index, by which LeRobot takes them",
            f"{numbers[:8]}",
            remedy,
        )
    if meta.episodes is not None and (numbers := list(meta.episodes["episode_index"])) != list(
        range(len(numbers))
    ):
        remedy = "write the dataset again with lerobot-edit-dataset, or train with `vla0 train`"
        raise InputError(
            "episodes 0, 1, 2 ... in meta/episodes, by whose places LeRobot takes them",
            f"{numbers[:8]}",
            remedy,
        )


def _follow(config: VLA0Config, spec: Spec) -> None:
    """Makes a config say what the checkpoint does.

    Raises InputError for what LeRobot's batches cannot give.
    """
    if spec.history > 1 or spec.depth:
        raise InputError(
            "one frame of colours for each camera",
            "past frames or depth maps",
            "use vla0's own commands",
        )
    if config.chunk_size != spec.chunk_size:
        raise InputError(
            f"chunk_size {spec.chunk_size}, as the checkpoint",
            f"{config.chunk_size}",
            "leave chunk_size out",
        )
    if len(config.image_features) != len(spec.cameras):
        expected = f"input_features with the cameras {list(spec.cameras)}"
        raise InputError(expected, f"{list(config.image_features)}", "name them in that order")
    for name in ("image_size", "crop", "tile", "system"):
        setattr(config, name, getattr(spec, name))
    config.action_bins = spec.bins
    config.use_state = spec.state is not None
    config.spec = spec.text()


def _frames(pictures: Tensor, key: str) -> np.ndarray:
    """(B, h, w, 3) uint8 of (B, 3, h, w) in 0..1: the very bytes that LeRobot divided.

    Raises InputError for anything else.
    """
    if pictures.shape[-3] != 3:
        raise InputError(
            f"'{key}' (B, 3, h, w)", f"shape {tuple(pictures.shape)}", "give the camera's colours"
        )
    if pictures.dtype != torch.uint8:
        least, most = float(pictures.min()), float(pictures.max())
        # depths would become white
        if not (pictures.is_floating_point() and least >= -1e-6 and most <= 1 + 1e-6):
            got = f"{str(pictures.dtype).removeprefix('torch.')}, {least:g} to {most:g}"
            raise InputError(f"'{key}', colours as floats in 0..1 or as uint8", got, DEPTH_REMEDY)
        pictures = (pictures * 255).round().clamp(0, 255).to(torch.uint8)
    return pictures.movedim(-3, -1).cpu().numpy()
