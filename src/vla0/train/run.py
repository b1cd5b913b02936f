"""Fine-tune: train from a config to the folder `last`, or resume where a run stopped."""

import errno
import json
import logging
import math
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.tensorboard import SummaryWriter
from transformers import set_seed
from transformers.integrations import TensorBoardCallback

from vla0.checkpoint import io as models
from vla0.checkpoint.location import locate, restricted
from vla0.checkpoint.tiny import FAMILY, family_of, tiny_model, tiny_processor
from vla0.core.prompt import Prompt
from vla0.core.spec import Spec
from vla0.data.dataset import Mixture, Samples, collator
from vla0.data.lerobot import Source, sources_of
from vla0.errors import InputError, refuse_unknown, said
from vla0.files import held, write_whole
from vla0.train.checkpoints import FINISHED, CheckpointCallback
from vla0.train.config import UNITS, TrainConfig
from vla0.train.lora import adapted, plain
from vla0.train.measure import Measure, Measurement
from vla0.train.resume import DAMAGED, DATA, ended, recorded, refuse_other_data, resumable
from vla0.train.teacher import INPUT, SHARE, load_teacher
from vla0.train.trainer import VLA0Trainer, arguments

logger = logging.getLogger(__name__)

SEVERAL = "several GPUs, a process each, for training.shard"
# words of errors about a file that was cut off
CUT = ("PytorchStreamReader", "unexpected EOF", "not a ZIP archive", "Invalid magic number")
# words of errors about a full disk
FULL = ("No space left", "PytorchStreamWriter failed", "Disk quota")


def main(config: TrainConfig, measure: Measure | None = None) -> Path:
    """Train a model, or resume the run where the same config stopped.

    Args:
        config: The config of the run.
        measure: Tries a checkpoint in a simulator when an evaluation is due. None leaves that out.

    Returns:
        The folder `last`.

    Raises:
        InputError: When the config does not fit the data, the machine or the folder of the run.
    """
    # Without it memory of a GPU falls into pieces: 64 samples a step of a 3B model had 9.6 GiB of
    # 79 that it could not use (docs/results.md). It is read as the first tensor comes to the GPU.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # The first of several processes locks the folder for all of them.
    first_process = int(os.environ.get("RANK", 0)) == 0
    with held(Path(config.logging.output_dir), "training") if first_process else nullcontext():
        last = _run(config, measure)
        # Left to the end of the interpreter, it aborted a process once, after its last step.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return last


def _run(config: TrainConfig, measure: Measure | None) -> Path:
    """Do what `main` says, without the lock on the folder."""
    training, output = config.training, Path(config.logging.output_dir)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    resume = resumable(config, output, processes)
    all_steps_done = resume is not None and ended(resume)
    if all_steps_done and (output / "last" / FINISHED).is_file():
        logger.info("'%s' has ended already", output)
        return output / "last"
    if training.teacher_weight is not None and config.model.teacher is None:
        raise InputError("model.teacher with training.teacher_weight", "none", "give both, or none")
    if training.shard and processes < 2:
        raise InputError(SEVERAL, "one process", "start with torchrun, or leave it out")
    arguments(config, output, 1, 1)  # raises before data and a large model are loaded
    set_seed(training.seed)
    sources = sources_of(config.data)
    if resume is not None:
        refuse_other_data(output, sources)
    vlm, processor, specs = _start(config, sources, output / "last" if resume else None)
    teacher = None
    if config.model.teacher is not None:
        dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32
        teacher = load_teacher(config.model.teacher, specs, dtype)
    parts = [Samples(source, specs[name], training.seed) for name, source in sources.items()]
    samples = (
        Mixture(parts, [s.config.weight for s in sources.values()], training.seed)
        if len(parts) > 1
        else parts[0]
    )
    held_out = {
        name: Samples(s, specs[name], held_out=True)
        for name, s in sources.items()
        if s.config.held_out
    }
    vlm = adapted(vlm, config.model.lora, config.model.freeze_vision_encoder)
    per_epoch = math.ceil(
        math.ceil(len(samples) / (training.batch_size * processes))
        / training.gradient_accumulation_steps
    )
    steps = training.num_steps or math.ceil((training.num_epochs or 0) * per_epoch)
    output.mkdir(parents=True, exist_ok=True)
    _announce(
        config, output, vlm, samples, dict(zip(sources, parts, strict=True)), steps, processes
    )
    checkpoints = CheckpointCallback(
        output,
        processor,
        samples,
        specs,
        Measurement(processor, specs, held_out, measure, training.shard),
        config.logging.steps("eval", per_epoch, 0),
        config.logging.keep_last,
    )
    prompts = [Prompt(spec, processor) for spec in specs.values()]
    trainer = VLA0Trainer(
        model=vlm, args=arguments(config, output, steps, per_epoch, plain(vlm)),
        train_dataset=samples,
        data_collator=collator(
            prompts, config.augmentation, teacher.prompts if teacher else (), INPUT
        ),
        callbacks=[checkpoints, TensorBoardCallback(SummaryWriter(str(output / "tensorboard")))],
    )  # fmt: skip
    if training.shard and not trainer.is_fsdp_enabled:  # accelerate would silently go on
        raise InputError(SEVERAL, f"{processes} on {trainer.args.device}", "leave it out here")
    trainer.held_out_collator = collator(prompts, None)
    if teacher is not None:
        teacher.model.to(trainer.args.device)
        trainer.symbol_ids = prompts[0].symbol_ids
        trainer.teacher, trainer.teacher_weight = teacher, training.teacher_weight or SHARE
    checkpoints.trainer = trainer
    if all_steps_done:  # but the run was killed during its last save
        checkpoints.make_good(str(resume))
        return output / "last"
    with _explained(config):
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return output / "last"


def _announce(config, output, vlm, samples, parts, steps, processes) -> None:
    """Log what is about to be trained, write the config, and raise if the disk is too full."""
    trainable, total = (
        sum(p.numel() for p in vlm.parameters() if p.requires_grad or not only_trainable)
        for only_trainable in (True, False)
    )
    # A new checkpoint is written beside the old ones. Each has the weights and two moments of each
    # trained weight.
    needed = (1 + config.logging.keep_last) * (
        sum(p.numel() * p.element_size() for p in vlm.parameters()) + 8 * trainable
    )
    if (free := shutil.disk_usage(output).free) < needed:
        expected = f"{needed / 2**30:.2f} GiB free for checkpoints in '{output}'"
        got = f"{free / 2**30:.2f} GiB"
        raise InputError(expected, got, "free some, or choose another logging.output_dir")
    if int(os.environ.get("RANK", 0)) != 0:
        return
    for name in filter(None, (config.model.name, config.model.teacher)):
        if licence := restricted(name):
            logger.warning(
                "%s is under the licence '%s': read it before commercial use of what is trained",
                name,
                licence,
            )
    for part in parts.values():
        for text in (*part.source.problems(), *part.remarks):
            logger.warning("%s: %s", part.source.config.dataset, text)
        if (clipped := part.outside()).any():
            text = "%s: %s of %d actions lie outside the bounds, by dimension, and are clipped"
            logger.warning(text, part.source.config.dataset, clipped.tolist(), len(part))
    asked = [
        f"logging.eval_every_n_{unit}"
        for unit in UNITS
        if getattr(config.logging, f"eval_every_n_{unit}")
    ]
    if asked and not (
        config.simulator or any(part.source.config.held_out for part in parts.values())
    ):
        logger.warning(
            "%s only saves: there is no data.held_out and no simulator to measure", asked[0]
        )
    if config.model.tiny and family_of(config.model.name) is None:
        logger.warning("model.tiny changes nothing: the model is %s", config.model.name)
    training, written = config.training, recorded(config, processes)
    batch = written["global_batch"]
    logger.info("%.1f of %.1f million weights are trained", trainable / 1e6, total / 1e6)
    logger.info(
        "%d steps of %d samples (%d a device, %d devices, %d parts): %.2f times the %d rows; "
        "learning rate %g, not scaled",
        steps,
        batch,
        training.batch_size,
        processes,
        training.gradient_accumulation_steps,
        steps * batch / len(samples),
        len(samples),
        training.learning_rate,
    )
    written[DATA] = {name: part.source.fingerprint() for name, part in parts.items()}
    write_whole(output / "train_config.json", json.dumps(written, indent=2) + "\n")


@contextmanager
def _explained(config: TrainConfig) -> Iterator[None]:
    """Turn errors of the machine into InputErrors that say what to change; retry nothing."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        remedy = (
            "halve training.batch_size and double training.gradient_accumulation_steps, "
            "which gives the same training; "
        )
        remedy += "training.gradient_checkpointing=true or model.lora.rank=64 take less too"
        got = said(error)
        raise InputError(
            f"memory for training.batch_size={config.training.batch_size}", got, remedy
        ) from error
    except (EOFError, pickle.UnpicklingError) as error:
        raise InputError("a training state that is whole", said(error), DAMAGED) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        if any(word in str(error) for word in CUT):
            raise InputError("a training state that is whole", said(error), DAMAGED) from error
        if getattr(error, "errno", None) == errno.ENOSPC or any(
            word in str(error) for word in FULL
        ):
            got = str(error).strip().splitlines()[-1][:200]
            remedy = "free some and give the same command again: the checkpoint before is whole"
            raise InputError(
                f"room on the disk of '{config.logging.output_dir}'", got, remedy
            ) from error
        raise


def spec_of(config: TrainConfig, source: Source) -> Spec:
    """Return the Spec of a config and the data that it is trained on."""
    action = config.action
    written: dict[str, Any] = {
        "chunk_size": action.chunk_size,
        "bins": action.action_bins,
        "ensemble_k": action.ensemble_k,
    }
    return Spec(
        base_model=config.model.name,
        **source.spec_fields(action.chunk_size),
        **written,
        **config.spec,
    )


def _start(
    config: TrainConfig, sources: Mapping[str, Source], last: Path | None
) -> tuple[Any, Any, dict[str, Spec]]:
    """Return (model, processor, Specs) from `last` where a run resumes, else from the config."""
    lora = config.model.lora.rank > 0
    # Frozen weights do not learn, so bf16 loses nothing.
    dtype = torch.bfloat16 if lora and config.training.precision == "bf16" else torch.float32
    specs = {
        name: spec_of(config, source) if last is None else Spec.load(last, name)
        for name, source in sources.items()
    }
    # With LoRA, the Trainer loads the adapters, and the weights below them are those of the config.
    if last is not None and not lora:
        return *models.load(last, "cpu", dtype), specs
    bits = config.model.quantization
    device = (
        "cpu"
        if bits is None or not torch.cuda.is_available()
        else f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    )
    if family_of(config.model.name) is None:
        return *models.load(locate(config.model.name), device, dtype, bits), specs
    model, processor = tiny_of(config, specs, sources)
    if bits is not None:
        with TemporaryDirectory() as folder:
            models.save(Path(folder) / "tiny", model, processor, specs)
            model, _ = models.load(Path(folder) / "tiny", device, dtype, bits)
    return model, processor, specs


def tiny_of(
    config: TrainConfig, specs: Mapping[str, Spec], sources: Mapping[str, Source]
) -> tuple[Any, Any]:
    """Make the model and the processor of a config whose model is "tiny" or "tiny:FAMILY".

    The tokenizer learns the words of the data.

    Returns:
        The model and the processor.
    """
    systems = dict.fromkeys(spec.system_text() for spec in specs.values())
    words = [
        *systems,
        "State: ",
        *dict.fromkeys(task for source in sources.values() for task in source.tasks),
    ]
    processor = tiny_processor(words, family=family_of(config.model.name) or FAMILY)
    known = ("width", "layers", "heads", "vision_width", "vision_layers", "vision_heads", "seed")
    refuse_unknown(config.model.tiny, known, "model.tiny")
    return tiny_model(processor, **config.model.tiny), processor
