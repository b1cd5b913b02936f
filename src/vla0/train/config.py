"""Define what a training config may say, and read it.

An unknown key is an error that names the nearest known one.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vla0.core.spec import Spec
from vla0.data.config import Augmentation
from vla0.data.lerobot import DataConfig
from vla0.errors import InputError, refuse_idle, refuse_unknown, said
from vla0.train.published_config import ours

# fields of Spec that a config may set by name
LOOKS = ("image_size", "crop", "tile", "history", "vision_id", "system")
UNITS = ("steps", "epochs")
PLAIN = (int, float, str, bool, types.NoneType)


@dataclass(frozen=True)
class Lora:
    """LoRA (arXiv 2106.09685) of all linear layers.

    For each weight, the product of two thin matrices is learned.
    """

    rank: int = 0  # 0: all weights are trained
    alpha: float | None = None  # the product is scaled by alpha / rank; None: twice the rank
    dropout: float = 0.0  # share of the layers' inputs that training drops

    def __post_init__(self):
        if self.rank < 0:
            raise InputError(
                "rank >= 0", f"{self.rank}", "0 trains all weights; 16 to 64 are usual"
            )
        if not self.rank:
            refuse_idle(
                {"lora.alpha": self.alpha, "lora.dropout": self.dropout or None}, "lora.rank"
            )
        if self.alpha is not None and not self.alpha > 0:
            raise InputError("alpha > 0", f"{self.alpha}", "leave it out for twice the rank")
        if not 0 <= self.dropout < 1:
            raise InputError("dropout in [0, 1)", f"{self.dropout}", "0 is usual")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which VLM is trained, and which of its weights."""

    name: str = "Qwen/Qwen2.5-VL-3B-Instruct"  # Hub id, folder, or "tiny" ("tiny:qwen3_vl")
    freeze_vision_encoder: bool = False  # the vision tower stays as it is
    lora: Lora = field(default_factory=Lora)  # few weights to train beside frozen ones
    # "nf4": the language model's frozen weights in 4 bits (QLoRA, arXiv 2305.14314)
    quantization: str | None = None
    # checkpoint whose probabilities are learned too (distillation), of any family
    teacher: str | None = None
    # arguments of vla0.checkpoint.tiny.tiny_model
    tiny: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.quantization not in (None, "nf4"):
            raise InputError(
                "model.quantization: nf4 or null", f"'{self.quantization}'", "choose one of those"
            )
        if self.quantization and not self.lora.rank:
            raise InputError(
                "model.lora.rank with model.quantization",
                "0",
                "weights of 4 bits cannot learn: rank 64 is usual",
            )


@dataclass(frozen=True)
class ActionConfig:
    """How actions are written. Saved as `chunk_size`, `bins` and `ensemble_k` of the Spec."""

    chunk_size: int = Spec.chunk_size  # H, steps that a chunk predicts
    action_bins: int = Spec.bins  # levels are 0..action_bins inclusive
    # how many of the newest chunks acting averages; None: all that reach the current step
    ensemble_k: int | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How the model is trained.

    Defaults are the published ones for one GPU where there is one.
    """

    num_steps: int | None = None  # give this or num_epochs
    num_epochs: float | None = None  # passes over the rows that are trained on
    batch_size: int = 8  # per device
    gradient_accumulation_steps: int = 1  # batches that make one step
    learning_rate: float = 5e-6  # never scaled by the batch size
    # the name of a scheduler of transformers; "constant" may have a warm-up too
    lr_scheduler: str = "constant"
    warmup_ratio: float = 0.0  # share of the steps that warm up
    weight_decay: float = 1e-10  # of AdamW
    max_grad_norm: float = 0.0  # 0: gradients are not clipped
    # the name of an optimiser of transformers; adamw_8bit needs bitsandbytes
    optimizer: str = "adamw_torch_fused"
    gradient_checkpointing: bool = False  # less memory, more time
    # Liger's fused norms and SwiGLU, on GPUs; the loss is computed in parts anyway
    liger: bool = False
    shard: bool = False  # split the weights over the processes of torchrun or accelerate, by FSDP2
    # share of the loss that is the divergence from model.teacher; None: half of it
    teacher_weight: float | None = None
    precision: str = "bf16"  # or "fp32"; fp16 diverges
    seed: int = 0  # of the order of rows, augmentation and LoRA's first weights

    def __post_init__(self):
        if (self.num_steps is None) == (self.num_epochs is None):
            got = "neither" if self.num_steps is None else f"{self.num_steps} and {self.num_epochs}"
            raise InputError("training.num_steps or training.num_epochs", got, "give one of them")
        for name in ("num_steps", "num_epochs", "batch_size", "gradient_accumulation_steps"):
            _positive(name, getattr(self, name))
        if not self.learning_rate > 0:
            raise InputError(
                "learning_rate > 0", f"{self.learning_rate}", "5e-6 is the published one"
            )
        if self.teacher_weight is not None and not 0 < self.teacher_weight <= 1:
            got = f"{self.teacher_weight}"
            raise InputError("teacher_weight in 0..1, above 0", got, "leave it out for one half")
        if not 0 <= self.warmup_ratio <= 1:
            raise InputError(
                "warmup_ratio in 0..1", f"{self.warmup_ratio}", "it is a share of the steps"
            )
        if self.precision not in ("bf16", "fp32"):
            raise InputError(
                "precision: bf16 or fp32",
                f"'{self.precision}'",
                "fp16 was found to diverge: use bf16",
            )


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Where a run saves and logs, and how often.

    Give a number of steps or of epochs. TensorBoard is always written.
    """

    output_dir: str  # folder of the run, for checkpoints, last, best and TensorBoard
    log_every_n_steps: int = 20  # to TensorBoard
    save_every_n_steps: int | None = None  # the most steps that a killed run loses
    save_every_n_epochs: float | None = None  # with neither, every 500 steps
    # measures held-out episodes, and success in the simulator where the config names one
    eval_every_n_steps: int | None = None
    eval_every_n_epochs: float | None = None  # with neither, at each save
    keep_last: int = 1  # newest checkpoints to keep, besides `best`
    wandb: bool | str = False  # true, or the name of a project
    trackio: bool | str = False  # true, or the name of a project

    def __post_init__(self):
        for name in (
            "log_every_n_steps",
            "keep_last",
            *(f"{what}_every_n_{unit}" for what in ("save", "eval") for unit in UNITS),
        ):
            _positive(name, getattr(self, name))
        for what in ("save", "eval"):
            if None not in (every := [getattr(self, f"{what}_every_n_{unit}") for unit in UNITS]):
                raise InputError(
                    f"{what}_every_n_steps or {what}_every_n_epochs", f"{every}", "give one of them"
                )

    def steps(self, what: str, per_epoch: float, default: int) -> int:
        """Return the steps between two saves or evaluations.

        Args:
            what: "save" or "eval".
            per_epoch: Steps of an epoch.
            default: The result where the config gives neither steps nor epochs.
        """
        steps, epochs = (getattr(self, f"{what}_every_n_{unit}") for unit in UNITS)
        return steps or (max(1, round(epochs * per_epoch)) if epochs else default)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The config of a training run.

    Keys have the names of the method's public write-up where it has one.
    """

    data: DataConfig
    training: TrainingConfig
    logging: LoggingConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    action: ActionConfig = field(default_factory=ActionConfig)
    # further fields of Spec: how pictures and the system text look
    spec: Mapping[str, Any] = field(default_factory=dict)
    augmentation: Augmentation = field(default_factory=Augmentation)
    # an evaluation (vla0.sim.evaluate.EvalConfig) that runs whenever held-out episodes are measured
    simulator: Mapping[str, Any] | None = None

    def __post_init__(self):
        refuse_unknown(self.spec, LOOKS, "spec")
        if not self.data.mixture:
            refuse_idle(
                {"data.weight": self.data.weight if self.data.weight != 1 else None}, "data.mixture"
            )
        if self.training.shard and self.model.lora.rank:
            raise InputError(
                "training.shard or model.lora",
                "both",
                "LoRA of a 3B or 7B model fits one GPU: leave shard out",
            )


def read_config(cls: type, file: str | Path, overrides: Sequence[str] = ()) -> Any:
    """Read a config from a YAML file.

    The file may have the spelling of the method's public write-up (vla0.train.published_config).

    Args:
        cls: The dataclass of the config, e.g. TrainConfig.
        file: The YAML file.
        overrides: `key=value` each. Dots in a key go deeper.

    Raises:
        InputError: When the file cannot be read, or when a key or a value does not fit.
    """
    return build(cls, read_yaml(file, overrides, ours), str(file))


def read_yaml(
    file: str | Path,
    overrides: Sequence[str] = (),
    change: Callable[[Any], Any] = lambda content: content,
) -> Any:
    """Read the content of a YAML file.

    Args:
        file: The YAML file.
        overrides: `key=value` each. Dots in a key go deeper. A mapping as a value replaces the
            file's mapping.
        change: Changes the file's content before the overrides.

    Raises:
        InputError: When the file cannot be read, or when it or an override is malformed.
    """
    try:
        merged = OmegaConf.create(change(OmegaConf.to_container(OmegaConf.load(file))))
        for word in overrides:
            key, equals_sign, _ = word.partition("=")
            if not (key and equals_sign):
                raise InputError("key=value", f"'{word}'", "e.g. training.num_steps=500")
            value = OmegaConf.select(OmegaConf.from_dotlist([word]), key)
            section, dot, deeper = key.partition(".")
            OmegaConf.update(
                merged, section.lower() + dot + deeper, value, merge=False, force_add=True
            )
        return OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OSError as error:
        reason = "which is not there" if isinstance(error, FileNotFoundError) else error.strerror
        raise InputError(
            "a YAML file", f"'{file}', {reason}", "name another; configs are in configs/"
        ) from None
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise InputError(f"YAML in '{file}' and key=value", said(error), "correct it") from None


def build(cls: type, content: Any, where: str) -> Any:
    """Build a dataclass from a mapping, and the dataclasses inside it from the mappings inside.

    Args:
        cls: The dataclass.
        content: The mapping.
        where: How errors name the mapping, e.g. the file.

    Raises:
        InputError: When a key is unknown or missing, or when a value has the wrong type.
    """
    if not isinstance(content, Mapping):
        raise InputError(f"a mapping in {where}", f"{content!r}", f"give keys of {cls.__name__}")
    kinds = typing.get_type_hints(cls)
    deeper = {f.name: f"{name}.{f.name}" for name, kind in kinds.items() for f in _fields(kind)}
    for key in map(str, content):
        if key not in kinds:
            refuse_unknown(
                [key],
                kinds,
                where,
                {name: full for name, full in deeper.items() if name not in kinds},
            )
    values = {}
    for key, value in content.items():
        choices = _choices(kinds[key])
        inner = next(filter(dataclasses.is_dataclass, choices), None)
        if inner is not None and not (value is None and types.NoneType in choices):
            value = build(typing.cast(type, inner), value, f"{where}: {key}")
        elif float in choices and type(value) is int:
            value = float(value)
        elif all(choice in PLAIN for choice in choices) and type(value) not in choices:
            names = " or ".join(
                "null" if choice is types.NoneType else choice.__name__ for choice in choices
            )
            raise InputError(f"{key} as {names} in {where}", f"{value!r}", "correct the config")
        values[key] = value
    needed = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is f.default_factory is dataclasses.MISSING
    ]
    for name in needed:
        if name not in values:
            raise InputError(f"'{name}' in {where}", "nothing", f"add {name}: {kinds[name]}")
    return cls(**values)


def _choices(kind: Any) -> tuple[Any, ...]:
    """Return the types that a union allows, or the type itself."""
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _fields(kind: Any) -> tuple[Any, ...]:
    """Return the fields of a dataclass, perhaps of one that may be missing; () for others."""
    return tuple(
        field
        for choice in _choices(kind)
        if dataclasses.is_dataclass(choice)
        for field in dataclasses.fields(choice)
    )


def _positive(name: str, value: float | None) -> None:
    """Raise InputError unless a number is positive, or None."""
    if value is not None and not (value > 0 if isinstance(value, float) else value >= 1):
        raise InputError(f"{name} > 0", f"{value}", "give a number above nothing")
