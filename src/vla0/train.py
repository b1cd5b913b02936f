"""TrainConfig and main: fine-tuning with plain next-token loss, on transformers' Trainer."""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from transformers import Trainer, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback

from vla0 import model as models
from vla0.adapter import Adapter, adapted
from vla0.data import Augmentation, DataConfig, Samples, Source, collator
from vla0.keep import Keeper, Measure, write_whole
from vla0.prompt import IGNORE, Prompt
from vla0.spec import InputError, Spec, refuse_unknown

logger = logging.getLogger(__name__)

FROM_DATA = ("low", "high", "fps", "cameras", "state", "base_model")  # fields of Spec that a recipe does not choose


@dataclass(frozen=True)
class TrainConfig:
    """A recipe. Defaults are the published LIBERO ones on one GPU where there is one."""

    output: str  # folder of the run: checkpoints, last, best, TensorBoard
    data: DataConfig
    steps: int
    model: str = "Qwen/Qwen2.5-VL-3B-Instruct"  # Hub id, folder, or "tiny"
    tiny: Mapping[str, Any] = field(default_factory=dict)  # arguments of vla0.model.tiny_model
    spec: Mapping[str, Any] = field(default_factory=dict)  # fields of Spec, but for those that data decides
    augmentation: Augmentation = field(default_factory=Augmentation)
    adapter: Adapter = field(default_factory=Adapter)  # LoRA
    freeze_vision: bool = False  # the vision tower stays as it is
    batch_size: int = 8  # per device
    accumulate: int = 1  # batches per step
    learning_rate: float = 5e-6
    schedule: str = "constant"  # a name of transformers' schedulers
    warmup: float = 0.0  # share of the steps
    weight_decay: float = 1e-10
    clip: float = 0.0  # norm of the gradient; 0 leaves it alone
    optimizer: str = "adamw_torch_fused"  # a name of transformers' optimisers; adamw_8bit needs bitsandbytes
    gradient_checkpointing: bool = False  # less memory, more time
    precision: str = "bf16"  # or "fp32"; fp16 diverges
    seed: int = 0
    workers: int = 0  # processes that prepare batches
    log_every: int = 20
    save_every: int = 500  # steps that a killed run loses at most; also when it is measured
    simulator: Mapping[str, Any] | None = None  # an evaluation (vla0.evaluate.EvalConfig) at each save

    def __post_init__(self):
        choosable = [f.name for f in dataclasses.fields(Spec) if f.name not in FROM_DATA]
        refuse_unknown(self.spec, choosable, "spec")
        for name in ("steps", "batch_size", "accumulate", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} >= 1", f"{getattr(self, name)}", "give a whole number of at least one")
        if not self.learning_rate > 0:
            raise InputError("learning_rate > 0", f"{self.learning_rate}", "5e-6 is the published one")
        if self.precision not in ("bf16", "fp32"):
            raise InputError("precision: bf16 or fp32", f"'{self.precision}'", "fp16 was found to diverge")


class VLA0Trainer(Trainer):
    """transformers' Trainer with logits only where there are labels, in fp32."""

    held_out_collator: Any = None
    right: torch.Tensor | int = 0  # tokens, since the last line of the log
    written: torch.Tensor | int = 0

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Qwen2.5-VL says no, and then nobody counts a step's tokens; the count is used below, the model never sees it.
        self.model_accepts_loss_kwargs = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean cross-entropy over the step's labelled tokens."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        # Rows end together (left padding), so the answers are the last `kept` columns.
        kept = labels.shape[1] - int((labels != IGNORE).any(dim=0).int().argmax())
        outputs = model(**inputs, logits_to_keep=kept + 1, use_cache=False)
        logits = outputs.logits[:, :-1].float()
        targets = labels[:, -kept:]
        if model.training:
            with torch.no_grad():
                written = targets != IGNORE
                self.right = self.right + ((logits.argmax(-1) == targets) & written).sum()
                self.written = self.written + written.sum()  # on the device: nothing waits for it before the log
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        if num_items_in_batch is None:
            loss = loss / (targets != IGNORE).sum()
        else:
            # The count is that of all processes, whose gradients are then averaged.
            share = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = loss / num_items_in_batch * share
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the share of tokens that the model would have written so, on this process."""
        if "loss" in logs and self.written:
            logs = {**logs, "token_accuracy": float(self.right) / float(self.written)}
            self.right, self.written = 0, 0
        super().log(logs, *args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Held-out rows without augmentation."""
        loader = DataLoader(eval_dataset, self.args.eval_batch_size, collate_fn=self.held_out_collator)
        return self.accelerator.prepare(loader)


def main(config: TrainConfig, measure: Measure | None = None) -> Path:
    """Trains, or goes on where the same recipe stopped; the folder `last`. measure: tries a checkpoint at each save."""
    output = Path(config.output)
    resume = _resumable(config, output)
    if resume and resume.name == f"checkpoint-{config.steps}":
        logger.info("'%s' has ended already", output)
        return output / "last"
    arguments = _arguments(config, output)  # refuses before a large model is loaded
    set_seed(config.seed)
    source = Source(config.data)
    vlm, processor, spec = _start(config, source, output / "last" if resume else None)
    vlm = adapted(vlm, config.adapter, config.freeze_vision)
    trained, whole = (sum(p.numel() for p in vlm.parameters() if p.requires_grad or not only) for only in (True, False))
    logger.info("%.1f of %.1f million weights are trained", trained / 1e6, whole / 1e6)
    output.mkdir(parents=True, exist_ok=True)
    # The weights twice, while a new checkpoint is written beside the old; two moments of what is trained, in both.
    _refuse_full_disk(output, 2 * sum(p.numel() * p.element_size() for p in vlm.parameters()) + 2 * 8 * trained)
    prompt = Prompt(spec, processor)
    samples = Samples(source, spec, config.seed)
    clipped = samples.outside()
    if clipped.any():
        logger.warning("%s of %d actions lie outside the bounds, by dimension, and are clipped", clipped.tolist(), len(samples))
    held_out = Samples(source, spec, held_out=True) if config.data.held_out else None
    if int(os.environ.get("RANK", 0)) == 0:
        write_whole(output / "recipe.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    keeper = Keeper(output, processor, samples, held_out, measure)
    trainer = VLA0Trainer(
        model=vlm, args=arguments, train_dataset=samples,
        data_collator=collator(prompt, config.augmentation),
        callbacks=[keeper, TensorBoardCallback(SummaryWriter(str(output / "tensorboard")))],
    )  # fmt: skip
    trainer.held_out_collator = collator(prompt, None)
    keeper.trainer = trainer
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return output / "last"


def _refuse_full_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        remedy = "free some, or choose another output"
        raise InputError(f"{needed / 2**30:.2f} GiB free for checkpoints in '{folder}'", f"{free / 2**30:.2f} GiB", remedy)


def spec_of(config: TrainConfig, source: Source) -> Spec:
    """The Spec of a recipe and the data that it is trained on."""
    chosen = dict(config.spec)
    horizon = chosen.get("horizon", Spec.horizon)
    return Spec(base_model=config.model, **source.spec_fields(horizon, chosen.get("relative", ())), **chosen)


def _start(config: TrainConfig, source: Source, last: Path | None) -> tuple[Any, Any, Spec]:
    """(model, processor, Spec) to train: of the run's own `last` where it goes on, else of the recipe."""
    lora = config.adapter.rank > 0
    # Frozen weights learn nothing that bf16 would lose.
    dtype = torch.bfloat16 if lora and config.precision == "bf16" else torch.float32
    spec = spec_of(config, source) if last is None else Spec.load(last)
    if last is not None and not lora:  # the Trainer brings the adapters, and what they change is as it was
        return *models.load(last, "cpu", dtype), spec
    if config.model != models.TINY:
        return *models.load(models.locate(config.model), "cpu", dtype), spec
    return *tiny_of(config, spec, source), spec


def tiny_of(config: TrainConfig, spec: Spec, source: Source) -> tuple[Any, Any]:
    """(model, processor) of a recipe whose model is "tiny"; the tokenizer learns the data's words."""
    processor = models.tiny_processor([spec.system_text(), "State: ", *source.tasks])
    refuse_unknown(config.tiny, ("width", "layers", "heads", "vision_width", "vision_layers", "vision_heads", "seed"), "tiny")
    return models.tiny_model(processor, **config.tiny), processor


def _arguments(config: TrainConfig, output: Path) -> TrainingArguments:
    settings = dict(
        output_dir=str(output / "state"), max_steps=config.steps,
        per_device_train_batch_size=config.batch_size, per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.learning_rate, lr_scheduler_type=config.schedule,
        warmup_steps=round(config.warmup * config.steps), weight_decay=config.weight_decay, max_grad_norm=config.clip,
        optim=config.optimizer, gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        bf16=config.precision == "bf16", seed=config.seed, dataloader_num_workers=config.workers,
        logging_steps=config.log_every, save_steps=config.save_every, save_total_limit=2,
        remove_unused_columns=False, label_names=["labels"], prediction_loss_only=True, report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),  # else processes on CPUs would not know each other
    )  # fmt: skip
    try:
        return TrainingArguments(**settings)  # type: ignore[arg-type]
    except ValueError as error:  # an unknown schedule; bf16 on a machine that has none
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            "settings that this machine and transformers take", reason, "correct the recipe, or precision=fp32"
        ) from None


def _resumable(config: TrainConfig, output: Path) -> Path | None:
    """The Trainer's folder to go on from; None for a new run. Raises InputError where another recipe ran there."""
    last, file = output / "last", output / "recipe.json"
    if not last.exists():
        return None
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    differing = [key for key in now if before.get(key) != now[key]]
    if differing:
        key = differing[0]
        raise InputError(
            f"the recipe of '{output}' to go on with", f"{key}: {now[key]} instead of {before.get(key)}",
            "choose another output, or remove that folder",
        )  # fmt: skip
    state = output / "state" / f"checkpoint-{int(last.resolve().name.removeprefix('step-'))}"
    if not state.is_dir():
        raise InputError(f"the training state of '{last}'", f"no '{state}'", "choose another output")
    return state
