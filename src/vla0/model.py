"""Load and save a VLM, its processor and vla0.json; the tiny model for a machine without weights."""

import copy
import hashlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
)
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from vla0.spec import SPEC_FILE, InputError, Spec

UNWANTED = ["*.bin", "*.pt", "*.pth", "*.pkl"]  # pickles
TINY = "tiny"  # the base_model that is built here instead of loaded

_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_CHAT = (  # the turns of Qwen2.5-VL's template, without video and tools
    "{% set images = namespace(count=0) %}{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}{% set images.count = images.count + 1 %}"
    "{% if add_vision_id %}Picture {{ images.count }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def locate(path: str | Path, weights: bool = True) -> Path:
    """The local folder of a checkpoint: the path itself where it is one, else that of a Hub id, with or without weights."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), ignore_patterns=UNWANTED if weights else [*UNWANTED, "*.safetensors"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError("a checkpoint folder or Hub id", f"'{path}' ({reason})", "check the path or the connection") from None


def load(
    folder: Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    quantization: str | None = None,
) -> tuple[Any, Any]:
    """(model, processor) of an ordinary transformers folder, any image-text-to-text model of the Qwen2.5-VL family.

    device None: the GPU where there is one. quantization: "nf4" for the language model's weights in 4 bits, on that
    device from the start. Raises InputError where files are missing, truncated or do not fit.
    """
    remedy = "fetch or train the checkpoint again"
    settings: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if quantization is not None:
        settings |= {"quantization_config": four_bits(dtype), "device_map": {"": str(device or default_device())}}
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, **settings)
        model, info = loaded
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        raise InputError(f"a complete transformers checkpoint in '{folder}'", reason, remedy) from error
    if info["missing_keys"] or info["mismatched_keys"]:
        # transformers would go on with random numbers there.
        lost = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise InputError(f"all weights in '{folder}'", f"{len(lost)} missing, first {lost[0]}", remedy)
    return (model if quantization else model.to(device or default_device())), processor


def four_bits(dtype: str | torch.dtype) -> BitsAndBytesConfig:
    """How weights become 4 bits: as QLoRA does it, all but the vision tower and the output layer."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "bitsandbytes, for model.quantization", "no such package", "pip install 'vla0[qlora]', or leave that out"
        )
    computed = torch.float32 if dtype == "auto" else dtype
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=computed,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )  # fmt: skip


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
    processor.save_pretrained(partial)
    for embodiment, spec in specs.items():
        spec.save(partial, embodiment)
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
    """A clean checkpoint folder out of a Trainer's: no pickle, weights as hard links where the disk has them."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    link_files(state, partial, lambda file: file.name != "trainer_state.json" and file.suffix in (".safetensors", ".json"))
    processor.save_pretrained(partial)
    for embodiment, spec in specs.items():
        spec.save(partial, embodiment)
    put_in_place(partial, folder)


def link_files(source: Path, folder: Path, kept: Callable[[Path], bool]) -> None:
    """The files of `source` that are kept, in `folder`: hard links, or copies where that is another disk."""
    for file in source.iterdir():
        if file.is_file() and kept(file):
            try:
                os.link(file, folder / file.name)
            except OSError:
                shutil.copy2(file, folder / file.name)


def put_in_place(partial: Path, folder: Path) -> None:
    """Renames a finished folder to its place. What stood there is replaced if it was a checkpoint, else refused."""
    if folder.exists():
        if any(folder.iterdir()) and not (folder / SPEC_FILE).is_file():
            shutil.rmtree(partial)
            raise InputError("a new folder or an old checkpoint", f"'{folder}' with other files", "name another folder")
        old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
        folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old)
    else:
        partial.rename(folder)


def tiny_processor(words: Iterable[str], vocabulary: int = 400) -> Qwen2_5_VLProcessor:
    """A Qwen2.5-VL processor whose byte-level BPE is learned from `words`, digits apart: no download."""
    tokenizer = Tokenizer(models.BPE())
    # Every digit and every space is a piece of its own, as in Qwen2's tokenizer where it matters: in answers.
    split = pre_tokenizers.Split(Regex(r"\d| ?\p{L}+|\s|[^\s\p{L}\d]+"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocabulary, 256 + len(_SPECIAL)),
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*words, "system", "user", "assistant"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=_CHAT,
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )  # fmt: skip
    return Qwen2_5_VLProcessor(Qwen2VLImageProcessor(), fast, Qwen2VLVideoProcessor(), chat_template=_CHAT)


def tiny_model(
    processor: Any,
    width: int = 192,
    layers: int = 4,
    heads: int = 6,
    vision_width: int = 128,
    vision_layers: int = 3,
    vision_heads: int = 4,
    seed: int = 0,
) -> Qwen2_5_VLForConditionalGeneration:
    """A randomly initialised Qwen2.5-VL, the same architecture at about 3 M parameters."""
    ids = {token: processor.tokenizer.convert_tokens_to_ids(token) for token in _SPECIAL}
    head = width // heads
    height = (head // 2 - head // 8) // 2  # of the rotary pairs a quarter is time; the rest height and width
    settings: dict[str, Any] = {
        "text_config": {
            "vocab_size": len(processor.tokenizer), "hidden_size": width, "intermediate_size": width * 8 // 3 // 8 * 8,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 3),
            "max_position_embeddings": 4096, "tie_word_embeddings": True,
            "bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10_000.0,
                "mrope_section": [head // 2 - 2 * height, height, height],
            },
        },
        "vision_config": {
            "depth": vision_layers, "hidden_size": vision_width, "intermediate_size": vision_width * 2,
            "num_heads": vision_heads, "out_hidden_size": width, "fullatt_block_indexes": list(range(vision_layers)),
        },
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": True,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**settings)).eval()


def untrained(model: Any) -> Any:
    """A model of the same shape with random weights: what training has to beat."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return type(model)(model.config).to(model.device, model.dtype).eval()


def fingerprint(model: Any, spec: Spec) -> str:
    """Hexadecimal digits that differ between checkpoints: of the Spec and of a sample of every weight."""
    found = hashlib.sha256(repr(spec).encode())
    for name, weight in model.state_dict().items():
        flat = weight.flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64]
        found.update(name.encode() + sample.float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]
