"""Load and save a VLM, its processor and vla0.json."""

import copy
import hashlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
)

from vla0.checkpoint.lerobot_config import describe
from vla0.core.prompt import Prompt
from vla0.core.spec import MAIN, SPEC_FILE, Spec
from vla0.decode.window_attention import in_windows
from vla0.errors import InputError, said
from vla0.files import whole_folder


def load(
    folder: Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    quantization: str | None = None,
) -> tuple[Any, Any]:
    """Load an image-text-to-text model and its processor.

    Args:
        folder: Folder in the format of transformers.
        device: Where the model runs. None takes the GPU where there is one.
        dtype: Type of the weights. "auto" keeps the type in which they were saved.
        quantization: "nf4" loads the language model's weights in 4 bits, directly on the device.

    Returns:
        (model, processor).

    Raises:
        InputError: When files are missing, truncated or do not fit.
    """
    remedy, device = "fetch or train the checkpoint again", device_of(device)
    settings: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if quantization is not None:
        settings |= {"device_map": {"": str(device)}}
    try:
        config = AutoConfig.from_pretrained(folder)
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise InputError(
                "a model that takes pictures and writes text (image-text-to-text)",
                f"{config.model_type} in '{folder}'",
                "name a vision-language model",
            )
        if quantization is not None:
            settings["quantization_config"] = four_bits(config, dtype)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, **settings)
        model, info = loaded
        processor = AutoProcessor.from_pretrained(folder)
    except InputError:
        raise
    except ImportError as error:  # of a package that this family needs
        reason = said(error)
        raise InputError(f"what the model in '{folder}' needs", reason, "install that") from error
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        reason = said(error)
        raise InputError(
            f"a complete transformers checkpoint in '{folder}'", reason, remedy
        ) from error
    if info["missing_keys"] or info["mismatched_keys"]:
        # transformers would continue with random numbers for these weights.
        lost = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise InputError(
            f"all weights in '{folder}'", f"{len(lost)} missing, first {lost[0]}", remedy
        )
    return in_windows(model if quantization else model.to(device)), processor


def opening_of(folder: Path, spec: Spec) -> str:
    """Return what a checkpoint's chat template writes before an answer, "" without a processor.

    Raises:
        InputError: When there is a processor that cannot be read.
    """
    if not any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        return ""
    try:
        return Prompt(spec, AutoProcessor.from_pretrained(folder)).opening
    except (OSError, ImportError) as error:
        reason = said(error)
        raise InputError(f"the processor in '{folder}'", reason, "install or copy that") from None


def four_bits(config: Any, dtype: str | torch.dtype) -> BitsAndBytesConfig:
    """Return the settings for weights in 4 bits, as in QLoRA.

    Only the language model's linear layers are quantised; the output layer is not one of them.

    Args:
        config: The model's configuration.
        dtype: Type in which the model computes. "auto" means float32.

    Raises:
        InputError: When bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "bitsandbytes, for model.quantization",
            "no such package",
            "pip install 'vla0[qlora]', or leave that out",
        )
    computed = torch.float32 if dtype == "auto" else dtype
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)
    inside = set(model.get_decoder().modules()) - {model.get_output_embeddings()}
    outside = [
        name
        for name, part in model.named_modules()
        if isinstance(part, torch.nn.Linear) and part not in inside
    ]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=computed,
        llm_int8_skip_modules=outside,
    )


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_of(name: str | torch.device | None) -> torch.device:
    """Return the device of a name, or the default device for None.

    Raises:
        InputError: When this machine has no such device.
    """
    if name is None:
        return default_device()
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = said(error)
        raise InputError(
            "a torch device of this machine", f"'{name}' ({reason})", "leave it out for the default"
        ) from None


def save(
    folder: str | Path,
    model: Any,
    processor: Any,
    specs: Mapping[str, Spec],
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a self-sufficient checkpoint folder, which appears only when it is complete.

    Args:
        folder: Where the checkpoint is written.
        model: The model.
        processor: Its processor.
        specs: The Spec of each embodiment.
        weights: Weights to write instead of the model's own, by name.

    Raises:
        InputError: When the folder holds something other than a checkpoint.
    """
    with whole_folder(Path(folder), SPEC_FILE) as partial:
        (model if weights is None else shell(model)).save_pretrained(partial, state_dict=weights)
        _complete(partial, processor, specs)


def shell(model: Any) -> Any:
    """Return a model of the same class on the meta device, without weights or quantisation."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    before = torch.get_default_dtype()
    torch.set_default_dtype(model.get_input_embeddings().weight.dtype)
    try:
        with torch.device("meta"):
            return type(model)(config)
    finally:
        torch.set_default_dtype(before)


def publish(state: Path, folder: Path, processor: Any, specs: Mapping[str, Spec]) -> None:
    """Make a clean checkpoint folder, without pickles, from the folder that a Trainer wrote.

    Weights become hard links where the disk supports them, else copies.

    Args:
        state: Folder of the Trainer.
        folder: Where the checkpoint is written.
        processor: The model's processor.
        specs: The Spec of each embodiment.

    Raises:
        InputError: When `folder` holds something other than a checkpoint.
    """
    with whole_folder(folder, SPEC_FILE) as partial:
        link_files(state, partial, _belongs)
        _complete(partial, processor, specs)


def _belongs(file: Path) -> bool:
    """Return whether a file of a Trainer's folder belongs to the checkpoint."""
    return file.name != "trainer_state.json" and file.suffix in (".safetensors", ".json")


def _complete(folder: Path, processor: Any, specs: Mapping[str, Spec]) -> None:
    """Write everything that a checkpoint folder needs beside the weights."""
    processor.save_pretrained(folder)
    for embodiment, spec in specs.items():
        spec.save(folder, embodiment)
    describe(folder, specs[MAIN])


def link_files(source: Path, folder: Path, kept: Callable[[Path], bool]) -> None:
    """Link files into a new folder, or copy them where hard links are not possible.

    Args:
        source: Folder of the files.
        folder: Folder of the links.
        kept: Returns whether a file is linked.
    """
    folder.mkdir()
    for file in source.iterdir():
        if file.is_file() and kept(file):
            try:
                # The Hub's cache holds links: what they lead to is linked.
                os.link(os.path.realpath(file), folder / file.name)
            except OSError:
                shutil.copy2(file, folder / file.name)


def untrained(model: Any) -> Any:
    """Return a model of the same shape with random weights, which training has to beat."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return in_windows(type(model)(model.config).to(model.device, model.dtype).eval())


def fingerprint(model: Any, spec: Spec | str) -> str:
    """Return 16 hexadecimal digits that tell checkpoints apart.

    They are a digest of the Spec, or of what else tells models apart, and of a sample of every
    weight.
    """
    digest = hashlib.sha256(repr(spec).encode())
    for name, weight in model.state_dict().items():
        flat = weight.flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64]
        digest.update(name.encode() + sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
