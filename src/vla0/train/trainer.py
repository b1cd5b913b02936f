"""Train with plain next-token loss on transformers' Trainer, as a config says.

Logits are computed only where the loss needs them.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from vla0.core.prompt import IGNORE
from vla0.data.dataset import Order
from vla0.errors import InputError, said
from vla0.train.config import TrainConfig
from vla0.train.loss import answered, summed
from vla0.train.teacher import INPUT, SHARE, Teacher, divergence

# Liger's rotary embedding would replace that of all models in the process, so it stays off; the
# loss is computed here.
LIGER = {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}


class VLA0Trainer(Trainer):
    """transformers' Trainer with logits only where there are labels, in fp32."""

    held_out_collator: Any = None
    teacher: Teacher | None = None
    teacher_weight: float = SHARE
    symbol_ids: Sequence[int] = ()  # the student's tokens of the symbols
    right: torch.Tensor | int = 0  # correctly predicted tokens since the last line of the log
    written: torch.Tensor | int = 0  # labelled tokens since then

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Qwen2.5-VL says no, and the Trainer would then not count a step's tokens. The count is
        # used below; the model never sees it.
        self.model_accepts_loss_kwargs = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the mean cross-entropy over the labelled tokens of the step.

        For held-out rows it is the mean over the tokens of each row, and then over the rows.
        """
        taught = {name: inputs.pop(name) for name in list(inputs) if name.startswith(INPUT)}
        outputs, logits, targets = answered(model, inputs)
        if model.training:
            with torch.no_grad():
                written = targets != IGNORE
                self.right = self.right + ((logits.argmax(-1) == targets) & written).sum()
                # The counts stay on the device: nothing waits for them before the log.
                self.written = self.written + written.sum()
        row_losses = summed(logits, targets)
        if taught:
            row_losses = self._with_teacher(row_losses, taught, logits, targets)
        loss = row_losses.sum()
        if not model.training:  # the same value, however rows are batched
            loss = (row_losses / (targets != IGNORE).sum(1).clamp(min=1)).mean()
        elif num_items_in_batch is None:
            loss = loss / (targets != IGNORE).sum()
        else:
            # The count is of all processes, and their gradients are averaged afterwards.
            share = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = loss / num_items_in_batch * share
        return (loss, outputs) if return_outputs else loss

    def _with_teacher(
        self,
        row_losses: torch.Tensor,
        taught: Mapping[str, torch.Tensor],
        logits: torch.Tensor,
        targets: torch.Tensor,
    ) -> torch.Tensor:
        """Return the losses (B,) of which the teacher's part is the divergence from it."""
        assert self.teacher is not None
        inputs = {name.removeprefix(INPUT): value for name, value in taught.items()}
        probabilities = self.teacher.probabilities(inputs)
        apart = divergence(logits[..., self.symbol_ids], targets, probabilities)
        return (1 - self.teacher_weight) * row_losses + self.teacher_weight * apart

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        """Return the order in which the rows of an epoch come."""
        processes = self.args.world_size
        return Order(
            self.train_dataset,
            self.args.train_batch_size * processes if processes > 1 else 1,
            self.args.seed,
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and add the share of labelled tokens that this process predicted correctly."""
        if "loss" in logs and self.written:
            logs = {**logs, "token_accuracy": float(self.right) / float(self.written)}
            self.right, self.written = 0, 0
        super().log(logs, *args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return batches of held-out rows, without augmentation."""
        loader = DataLoader(
            eval_dataset, self.args.eval_batch_size, collate_fn=self.held_out_collator
        )
        return self.accelerator.prepare(loader)


def sharded(model: Any) -> dict[str, Any]:
    """Return the Trainer's arguments for FSDP2.

    It splits weights, gradients and moments over the processes, by the layers that the model names.
    """
    layers = {type(part).__name__ for part in model.modules()} & set(model._no_split_modules or ())
    settings = {"version": 2, "transformer_layer_cls_to_wrap": sorted(layers)}
    return {"fsdp": "full_shard auto_wrap", "fsdp_config": settings}


def arguments(
    config: TrainConfig, output: Path, steps: int, per_epoch: float, model: Any = None
) -> TrainingArguments:
    """Translate a config into the Trainer's arguments.

    Args:
        config: The config of the run.
        output: The folder of the run.
        steps: Steps of the run.
        per_epoch: Steps of an epoch.
        model: The model, where training.shard splits it.

    Raises:
        InputError: When a package or a GPU that the config needs is missing, or when transformers
            refuses a setting.
    """
    training, logging = config.training, config.logging
    followers = {
        name: chosen for name in ("wandb", "trackio") if (chosen := getattr(logging, name))
    }
    for name in followers:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"{name}, for logging.{name}",
                "no such package",
                f"pip install {name}, or leave that out",
            )
    if training.liger and not (
        torch.cuda.is_available() and importlib.util.find_spec("liger_kernel")
    ):
        got = "no such package" if torch.cuda.is_available() else "no GPU"
        raise InputError(
            "a GPU and liger-kernel, for training.liger",
            got,
            "pip install 'vla0[liger]', or leave that out",
        )
    projects = [chosen for chosen in followers.values() if isinstance(chosen, str)]
    schedule = training.lr_scheduler
    # The schedule that transformers calls "constant" silently skips the warm-up.
    if schedule == "constant" and training.warmup_ratio:
        schedule = "constant_with_warmup"
    settings = dict(
        output_dir=str(output / "state"),
        max_steps=steps,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=round(training.warmup_ratio * steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=training.optimizer,
        gradient_checkpointing=training.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False}
        if training.gradient_checkpointing
        else None,
        use_liger_kernel=training.liger,
        liger_kernel_config=LIGER,
        bf16=training.precision == "bf16",
        seed=training.seed,
        dataloader_num_workers=config.data.num_workers,
        logging_steps=logging.log_every_n_steps,
        save_steps=logging.steps("save", per_epoch, 500),
        # The CheckpointCallback removes old checkpoints. The Trainer would go by the times of
        # files, and it removed the one that `last` needs.
        save_total_limit=None,
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=True,
        report_to=list(followers) or "none",
        project=projects[0] if projects else "vla0",
        run_name=output.name,
        trackio_space_id=None,  # on this machine, not in a Space of the Hub
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),  # else processes on CPUs would not find each other
        # While the first process tries a checkpoint in a simulator, the others wait for longer
        # than NCCL's half an hour.
        ddp_timeout=24 * 3600 if config.simulator is not None else 1800,
        **(sharded(model) if training.shard and model is not None else {}),
    )
    try:
        return TrainingArguments(**settings)  # type: ignore[arg-type]
    except ValueError as error:  # e.g. an unknown schedule, or no bf16 on this machine
        reason = said(error)
        raise InputError(
            "settings that this machine and transformers take",
            reason,
            "correct the config, or training.precision=fp32",
        ) from None
