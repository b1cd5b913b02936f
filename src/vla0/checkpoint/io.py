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
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
)

from vla0.checkpoint.lerobot_config import describe
from vla0.core.spec import MAIN, SPEC_FILE, Spec
from vla0.decode.window_attention import in_windows
from vla0.errors import InputError


def load(
    folder: Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    quantization: str | None = None,
) -> tuple[Any, Any]:
    """(model, processor) of an ordinary transformers folder, any image-text-to-text model of the
    Qwen2.5-VL family.

    device None: the GPU where there is one. quantization: "nf4" for the language model's weights in
    4 bits, on that device from the start. Raises InputError where files are missing, truncated or
    do not fit.
    """
    remedy, device = "fetch or train the checkpoint again", device_of(device)
    settings: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if quantization is not None:
        settings |= {"quantization_config": four_bits(dtype), "device_map": {"": str(device)}}
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, **settings)
        model, info = loaded
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        raise InputError(
            f"a complete transformers checkpoint in '{folder}'", reason, remedy
        ) from error
    if info["missing_keys"] or info["mismatched_keys"]:
        # transformers would go on with random numbers there.
        lost = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise InputError(
            f"all weights in '{folder}'", f"{len(lost)} missing, first {lost[0]}", remedy
        )
    return in_windows(model if quantization else model.to(device)), processor


def four_bits(dtype: str | torch.dtype) -> BitsAndBytesConfig:
    """How weights become 4 bits: as QLoRA does it, all but the vision tower and the output
    layer.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "bitsandbytes, for model.quantization",
            "no such package",
            "pip install 'vla0[qlora]', or leave that out",
        )
    computed = torch.float32 if dtype == "auto" else dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=computed,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_of(name: str | torch.device | None) -> torch.device:
    """The device of a name; None: the default.

    Raises InputError where this machine has none such.
    """
    if name is None:
        return default_device()
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:160]
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
    """Writes a self-sufficient checkpoint folder; at `folder` there is never a half-written one.

    specs: by embodiment. weights: to write in place of the model's own.
    """
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (model if weights is None else shell(model)).save_pretrained(partial, state_dict=weights)
    _complete(partial, processor, specs)
    put_in_place(partial, folder)


def shell(model: Any) -> Any:
    """A model of the same kind without weights, nothing in it quantised."""
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
    """A clean checkpoint folder out of a Trainer's: no pickle, weights as hard links where the disk
    has them.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    link_files(
        state,
        partial,
        lambda file: file.name != "trainer_state.json" and file.suffix in (".safetensors", ".json"),
    )
    _complete(partial, processor, specs)
    put_in_place(partial, folder)


def _complete(folder: Path, processor: Any, specs: Mapping[str, Spec]) -> None:
    """All that a folder needs beside the weights."""
    processor.save_pretrained(folder)
    for embodiment, spec in specs.items():
        spec.save(folder, embodiment)
    describe(folder, specs[MAIN])


def link_files(source: Path, folder: Path, kept: Callable[[Path], bool]) -> None:
    """The files of `source` that are kept, in `folder`: hard links, or copies where that is another
    disk.
    """
    for file in source.iterdir():
        if file.is_file() and kept(file):
            try:
                os.link(file, folder / file.name)
            except OSError:
                shutil.copy2(file, folder / file.name)


def put_in_place(partial: Path, folder: Path) -> None:
    """Renames a finished folder to its place.

    What stood there is replaced if it was a checkpoint, else refused.
    """
    if folder.exists():
        if any(folder.iterdir()) and not (folder / SPEC_FILE).is_file():
            shutil.rmtree(partial)
            raise InputError(
                "a new folder or an old checkpoint",
                f"'{folder}' with other files",
                "name another folder",
            )
        old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
        folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old)
    else:
        partial.rename(folder)


def untrained(model: Any) -> Any:
    """A model of the same shape with random weights: what training has to beat."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return in_windows(type(model)(model.config).to(model.device, model.dtype).eval())


def fingerprint(model: Any, spec: Spec) -> str:
    """Hexadecimal digits that differ between checkpoints: of the Spec and of a sample of every
    weight.
    """
    found = hashlib.sha256(repr(spec).encode())
    for name, weight in model.state_dict().items():
        flat = weight.flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64]
        found.update(name.encode() + sample.float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]
