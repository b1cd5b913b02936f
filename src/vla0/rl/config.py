"""What a config of `vla0 rl` may say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from vla0.data.config import DataConfig, Masking
from vla0.errors import InputError, refuse_idle
from vla0.train.config import Lora

GRPO, IMITATION = "grpo", "imitation"
METHODS = (GRPO, IMITATION)
SCHEDULERS = ("constant", "linear")
RATIOS = ("token", "chunk")
WAYS = ("filter", "weighted")


def _at_least(least: float, **values: float | None) -> None:
    """Raise InputError for a value that is below the least."""
    for name, value in values.items():
        if value is not None and not value >= least:
            raise InputError(f"{name} >= {least:g}", f"{value}", "give a larger number")


@dataclass(frozen=True, kw_only=True)
class RolloutsConfig:
    """The episodes that are played at random in each round, and judged by their success."""

    group_size: int = 8  # episodes from the same initial state, which are compared
    # groups of a round from which something is learned: their episodes differ in success or, with
    # update.method=imitation, one of them succeeded
    groups: int = 8
    # How many times as many initial states are tried, at most, to find these groups
    waves: int = 3
    temperature: float = 1.0  # 1: drawn from the model's own probabilities; larger: more varied
    # queries of an episode in a row that are drawn with the same noise: they stray to the same
    # side, and success tells more of where to stray (J. Hollenstein et al., arXiv 2312.11091)
    noise_hold: int = 1
    # of the initial states; None: the later half of the seeds that demonstrations may have
    first_seed: int | None = None
    workers: int | None = None  # worlds at once; None: 8 a core, or one where worlds are heavy

    def __post_init__(self):
        if self.group_size < 2:
            remedy = "success is compared within a group: 8 is usual"
            raise InputError("rollouts.group_size >= 2", f"{self.group_size}", remedy)
        _at_least(
            1,
            groups=self.groups,
            waves=self.waves,
            workers=self.workers,
            noise_hold=self.noise_hold,
        )
        if not self.temperature > 0:
            raise InputError(
                "rollouts.temperature above 0",
                f"{self.temperature}",
                "without chance all episodes of a group are the same: 1 is usual",
            )


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """How the weights follow success."""

    # "grpo": what went better than its group becomes likelier, what went worse less likely
    # (Z. Shao et al., arXiv 2402.03300). "imitation": successes alone become likelier, those
    # of each task as often, which bears learning rates near those of training (RAFT:
    # H. Dong et al., arXiv 2304.06767)
    method: str = GRPO
    learning_rate: float = 1e-6  # of AdamW, at the start
    # "constant", or "linear": falls to 0 by num_rounds, or by max_minutes if that is sooner; by
    # minutes, a run that resumes does not end in the same bits
    lr_scheduler: str = "constant"
    steps_per_round: int = 4  # steps of the optimizer in a pass over a round's episodes
    epochs: int = 1  # passes over a round's episodes
    batch_size: int = 8  # chunks in one pass through the model; the result does not depend on it
    clip_low: float = 0.2  # how far below 1 a ratio of probabilities moves what is learned
    # how far above; more, so that rare chunks can become likelier (Q. Yu et al., arXiv 2503.14476)
    clip_high: float = 0.28
    ratio: str = "token"  # whose ratio is clipped: "token" or "chunk", of all its tokens together
    # divide a group's advantages by their deviation; if not, hard initial states count less
    scale_by_deviation: bool = True
    # weight of episodes that went worse than their group; 0: only successes are learned from, which
    # bears larger steps (RAFT++: W. Xiong et al., arXiv 2504.11343)
    failures: float = 1.0
    kl: float = 0.0  # weight of the divergence from the checkpoint at the start
    # of imitation: a round learns from successes that are drawn from those of so many rounds, its
    # own the last; they stay in memory and in the folder's state
    replay_rounds: int = 20
    # share of demonstrations among the chunks that a round learns from, where `data` names some
    demonstrations: float = 0.5
    # what of a chunk is hidden while it is imitated, as in training, so that numbers are read off
    # the pictures and not off the numbers before them
    augmentation: Masking = field(default_factory=lambda: Masking(mask="none"))
    max_grad_norm: float = 1.0  # 0: gradients are not clipped
    lora: Lora = field(default_factory=Lora)  # few weights to train beside frozen ones
    # of the weights that act: "bf16" or "fp32"; null: as the checkpoint was saved. What is learned
    # is added up in 32 bits
    precision: str | None = None
    gradient_checkpointing: bool = False  # less memory, more time

    def __post_init__(self):
        counts = ("steps_per_round", "epochs", "batch_size", "replay_rounds")
        _at_least(1, **{name: getattr(self, name) for name in counts})
        _at_least(0, clip_low=self.clip_low, clip_high=self.clip_high, kl=self.kl)
        _at_least(0, max_grad_norm=self.max_grad_norm, failures=self.failures)
        if not 0 <= self.demonstrations < 1:
            got = f"{self.demonstrations}"
            raise InputError("update.demonstrations >= 0 and below 1", got, "0.5 is the default")
        choices = {"method": METHODS, "lr_scheduler": SCHEDULERS, "ratio": RATIOS}
        for name, known in choices.items():
            if (given := getattr(self, name)) not in known:
                raise InputError(f"update.{name} of {known}", f"'{given}'", "choose one of those")
        if self.method == IMITATION:
            refuse_idle(changed(self, COMPARED), f"update.method={GRPO}")
        if not self.learning_rate > 0:
            raise InputError("update.learning_rate > 0", f"{self.learning_rate}", "1e-6, say")
        if self.precision not in (None, "bf16", "fp32"):
            got = f"'{self.precision}'"
            raise InputError("update.precision: bf16, fp32 or null", got, "choose one of those")
        if self.lora.dropout:
            raise InputError(
                "no update.lora.dropout",
                f"{self.lora.dropout}",
                "leave it out: what acts must be what is trained",
            )


# Settings of episodes that are compared with their group.
COMPARED = ("ratio", "clip_low", "clip_high", "scale_by_deviation", "failures")


def changed(config: UpdateConfig, names: Sequence[str]) -> dict[str, bool]:
    """Return {setting: whether it is not the default}, for `refuse_idle`."""
    defaults = {each.name: each.default for each in fields(UpdateConfig)}
    return {f"update.{name}": getattr(config, name) != defaults[name] for name in names}


def _plain_data(data: DataConfig) -> None:
    """Raise InputError for what a dataset cannot have where a checkpoint is there already."""
    if data.mixture:
        raise InputError("one dataset", "data.mixture", "learn from one after the other")
    plain = DataConfig(dataset=data.dataset)
    idle = ("statistics", "relative_dims", "periodic", "weight", "num_workers")
    other = [name for name in idle if getattr(data, name) != getattr(plain, name)]
    refuse_idle(
        {f"data.{name}": True for name in other}, "training anew (the checkpoint's Spec has them)"
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run saves and logs, and when it ends."""

    output_dir: str  # folder of the run, for checkpoints, last, best and TensorBoard
    measure_every_n_rounds: int = 5  # greedy acting at held-out seeds, and a checkpoint
    keep_last: int = 1  # newest checkpoints to keep, besides `best`
    # the run ends when held-out success is so far below the best; null: never
    stop_below_best: float | None = 0.2

    def __post_init__(self):
        _at_least(1, measure_every_n_rounds=self.measure_every_n_rounds, keep_last=self.keep_last)
        _at_least(0, stop_below_best=self.stop_below_best)


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """The config of reinforcement learning."""

    checkpoint: str  # what it begins with: a folder or Hub id; it must succeed at times
    # the tasks and how to act there (vla0.sim.evaluate.EvalConfig); its episodes and first_seed are
    # those of the held-out measurements
    simulator: Mapping[str, Any]
    logging: RunConfig  # see below
    rollouts: RolloutsConfig = field(default_factory=RolloutsConfig)  # see below
    update: UpdateConfig = field(default_factory=UpdateConfig)  # see below
    # demonstrations that are learned beside what is played, so that they are not forgotten; with
    # the names of the dataset's columns, as in the training of the checkpoint. null: none
    data: DataConfig | None = None
    num_rounds: int | None = None  # give this, max_minutes, or both
    max_minutes: float | None = None  # a round that has begun is finished
    seed: int = 0  # of the initial states, what is drawn, and the order of chunks

    def __post_init__(self):
        if self.num_rounds is None and self.max_minutes is None:
            raise InputError("num_rounds or max_minutes", "neither", "say when the run ends")
        if self.data is None:
            refuse_idle(changed(self.update, ("demonstrations",)), "data.dataset")
        else:
            _plain_data(self.data)
        if self.update.method != IMITATION:
            refuse_idle(changed(self.update, ("replay_rounds",)), f"update.method={IMITATION}")
            if self.data is None:
                hidden = self.update.augmentation.mask != "none"
                refuse_idle({"update.augmentation": hidden}, f"update.method={IMITATION} or data")
        _at_least(1, num_rounds=self.num_rounds)
        _at_least(0, max_minutes=self.max_minutes)


@dataclass(frozen=True, kw_only=True)
class OfflineConfig:
    """The config of `vla0 rl --offline`."""

    checkpoint: str  # what it begins with: a folder or Hub id
    data: DataConfig  # the recorded episodes, with `next.success`, and the names of their columns
    output_dir: str  # folder of the result
    # "filter": only episodes that succeeded; "weighted": all, those that went better count more
    episodes: str = "filter"
    temperature: float = 0.5  # of "weighted": the smaller, the less failures count
    # see above; how ratios are clipped does nothing here
    update: UpdateConfig = field(default_factory=UpdateConfig)
    seed: int = 0  # of the order of chunks

    def __post_init__(self):
        if self.episodes not in WAYS:
            raise InputError(f"episodes of {WAYS}", f"'{self.episodes}'", "choose one of those")
        if not self.temperature > 0:
            raise InputError("temperature above 0", f"{self.temperature}", "0.5 is the default")
        _plain_data(self.data)
        idle = changed(
            self.update, ("method", "lr_scheduler", "replay_rounds", "demonstrations", *COMPARED)
        )
        refuse_idle(idle, "rounds that are played (no --offline)")
