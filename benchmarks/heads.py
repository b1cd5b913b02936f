"""Action heads of other methods on the backbone of a config, for `versus.py`.

The same model reads the same prompt; only its end differs from text. What a head adds, it adds to
the keys and values of all layers, as text does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import set_seed

from vla0.core.greedy import model_inputs
from vla0.core.prompt import Prompt
from vla0.core.spec import Observation, Spec
from vla0.data.dataset import Drawn, Samples
from vla0.data.lerobot import sources_of
from vla0.errors import InputError
from vla0.train.config import TrainConfig
from vla0.train.run import spec_of, tiny_of
from vla0.train.trainer import VLA0Trainer, arguments

EULER_STEPS = 10  # of the flow, as pi0 takes
WEIGHTS = "model.safetensors"


@dataclass
class Reading:
    """What the backbone has read.

    Args:
        last: (B, width), what it gives at the last token of the prompt.
        cache: Keys and values of all layers.
        place: (B,) position of the next token.
        visible: (B, L) bool, False at padding.
    """

    last: torch.Tensor
    cache: Any
    place: torch.Tensor
    visible: torch.Tensor


def read(vlm: Any, inputs: Mapping[str, torch.Tensor]) -> Reading:
    """Let the backbone read prompts, padded on the left."""
    places, _ = vlm.model.get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    seen = vlm.model(**inputs, position_ids=places, use_cache=True)
    visible = inputs["attention_mask"].bool()
    last = seen.last_hidden_state[:, -1]
    return Reading(last, seen.past_key_values, places.amax((0, 2)) + 1, visible)


def go_on(vlm: Any, reading: Reading, tokens: torch.Tensor, causal: bool) -> torch.Tensor:
    """Let the backbone read (B, n, width) more, whose keys and values join the cache.

    causal: each token sees those before it; otherwise all n see each other.

    Returns:
        (B, n, width), what the backbone gives at them.
    """
    rows, count, _ = tokens.shape
    block = torch.ones(count, count, dtype=torch.bool, device=tokens.device)
    block = (block.tril() if causal else block).expand(rows, count, count)
    before = reading.visible[:, None].expand(rows, count, -1)
    mask = torch.cat([before, block], dim=-1)[:, None]
    places = reading.place[:, None] + torch.arange(count, device=tokens.device)
    given = vlm.model.language_model(
        inputs_embeds=tokens,
        attention_mask={"full_attention": mask},
        position_ids=places.expand(3, rows, count),
        past_key_values=reading.cache,
        use_cache=True,
    )
    return given.last_hidden_state


class Head(nn.Module):
    """The end of a policy.

    Args:
        width: Of the backbone.
        spec: Gives the shape of a chunk and the bins.
    """

    def __init__(self, width: int, spec: Spec):
        super().__init__()
        self.width, self.bins = width, spec.bins
        self.steps, self.dimensions = spec.chunk_size, spec.dimensions

    def loss(
        self, vlm: Any, reading: Reading, actions: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of chunks (B, H, D) in -1..1, of which `valid` (B, H) count."""
        raise NotImplementedError

    def act(self, vlm: Any, reading: Reading) -> torch.Tensor:
        """Return chunks (B, H, D) in -1..1."""
        raise NotImplementedError


class Bins(Head):
    """A new token for each level, one a number, as RT-2 and OpenVLA do.

    The levels are those of the text, so that only the way of writing them differs.
    """

    def __init__(self, width: int, spec: Spec):
        super().__init__(width, spec)
        self.tokens = nn.Embedding(spec.bins + 1, width)  # and what predicts them, as in the model
        nn.init.normal_(self.tokens.weight, std=0.02)

    def loss(self, vlm, reading, actions, valid):
        """Return the mean cross-entropy of the numbers."""
        levels = ((actions + 1) / 2 * self.bins).round().long().flatten(1)
        hidden = go_on(vlm, reading, self.tokens(levels[:, :-1]), causal=True)
        hidden = torch.cat([reading.last[:, None], hidden], dim=1)
        logits = (hidden @ self.tokens.weight.T.to(hidden.dtype)).float()
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), levels, reduction="none")
        return losses[valid.repeat_interleave(self.dimensions, 1)].mean()

    def act(self, vlm, reading):
        """Write the likeliest token, one after another."""
        hidden, levels = reading.last, []
        for number in range(self.steps * self.dimensions):
            levels.append((hidden @ self.tokens.weight.T).argmax(-1))
            if number + 1 < self.steps * self.dimensions:
                token = self.tokens(levels[-1])[:, None]
                hidden = go_on(vlm, reading, token, causal=True)[:, 0]
                reading.place = reading.place + 1
                reading.visible = nn.functional.pad(reading.visible, (0, 1), value=True)
        chunk = torch.stack(levels, dim=1).view(-1, self.steps, self.dimensions)
        return chunk / self.bins * 2 - 1


class Regression(Head):
    """All numbers at once with L1 loss, by queries that see each other, as OpenVLA-OFT does."""

    def __init__(self, width: int, spec: Spec):
        super().__init__(width, spec)
        self.queries = nn.Parameter(0.02 * torch.randn(spec.chunk_size, width))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU()) for _ in range(2)
        )
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, spec.dimensions))

    def act(self, vlm, reading):
        """Give the chunk of one pass."""
        queries = self.queries.expand(len(reading.place), -1, -1)
        hidden = go_on(vlm, reading, queries, causal=False)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.out(hidden)

    def loss(self, vlm, reading, actions, valid):
        """Return the mean absolute error."""
        return (self.act(vlm, reading).float() - actions)[valid].abs().mean()


class Flow(Head):
    """Noise becomes a chunk in ten steps along a learned field, as in pi0.

    The actions are tokens of the backbone itself; pi0 gives them weights of their own, which would
    be more parameters than the other heads have.
    """

    def __init__(self, width: int, spec: Spec):
        super().__init__(width, spec)
        self.into = nn.Linear(spec.dimensions, width)
        self.timed = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))
        self.out = nn.Linear(width, spec.dimensions)

    def field(
        self, vlm: Any, reading: Reading, noisy: torch.Tensor, time: torch.Tensor
    ) -> torch.Tensor:
        """Return the field (B, H, D) at noisy chunks (B, H, D) and times (B,); 1 is noise."""
        half = self.width // 2
        periods = torch.logspace(np.log10(4e-3), np.log10(4.0), half, device=time.device)
        angles = 2 * torch.pi * time[:, None] / periods
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1)[:, None]
        tokens = self.into(noisy)
        tokens = self.timed(torch.cat([tokens, waves.expand_as(tokens)], dim=-1))
        return self.out(go_on(vlm, reading, tokens, causal=False))

    def loss(self, vlm, reading, actions, valid):
        """Return the mean squared error of the field at one random time a row."""
        time = torch.distributions.Beta(1.5, 1.0).sample((len(actions),)).to(actions) * 0.999 + 1e-3
        noise = torch.randn_like(actions)
        share = time[:, None, None]
        given = self.field(vlm, reading, share * noise + (1 - share) * actions, time)
        return (given.float() - (noise - actions))[valid].square().mean()

    def act(self, vlm, reading):
        """Follow the field from noise."""
        rows, known = len(reading.place), reading.cache.get_seq_length()
        chunk = torch.randn(rows, self.steps, self.dimensions, device=reading.last.device)
        for step in range(EULER_STEPS):
            time = torch.full((rows,), 1 - step / EULER_STEPS, device=chunk.device)
            chunk = chunk - self.field(vlm, reading, chunk, time) / EULER_STEPS
            reading.cache.crop(known)
        return chunk


HEADS: dict[str, type[Head]] = {"bins": Bins, "regression": Regression, "flow": Flow}


class Headed(nn.Module):
    """A backbone with a head.

    Args:
        vlm: A Qwen2.5-VL.
        head: Its end.
    """

    def __init__(self, vlm: Any, head: Head):
        super().__init__()
        self.vlm, self.head = vlm, head

    def forward(self, actions: torch.Tensor, valid: torch.Tensor, **inputs: torch.Tensor):
        """Return the loss of a batch."""
        return self.head.loss(self.vlm, read(self.vlm, inputs), actions, valid)


class HeadTrainer(VLA0Trainer):
    """The trainer of the text, with a head's loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the head's loss."""
        return model(**inputs)


def collate(drawn: Sequence[Drawn], prompt: Prompt) -> dict[str, torch.Tensor]:
    """Collate rows: the prompts without answers, and the chunks between -1 and 1."""
    batch = prompt.gather([prompt.see(sample.observation) for sample, _, _ in drawn])
    chunks = np.stack([scaled(sample.actions, prompt.spec) for sample, _, _ in drawn])
    valid = torch.from_numpy(np.stack([sample.valid for sample, _, _ in drawn]))
    return {**batch, "actions": torch.from_numpy(chunks), "valid": valid}


def scaled(actions: np.ndarray, spec: Spec) -> np.ndarray:
    """Return (..., D) actions between -1 and 1, by the bounds of the text; clipped as there."""
    low, high = np.array(spec.low), np.array(spec.high)
    span = np.where(high > low, high - low, 1.0)
    return (2 * (np.clip(actions, low, high) - low) / span - 1).astype(np.float32)


def unscaled(chunks: np.ndarray, spec: Spec) -> np.ndarray:
    """Undo `scaled`; what lies outside is clipped, as text cannot say it."""
    low, high = np.array(spec.low), np.array(spec.high)
    return (low + (np.clip(chunks, -1, 1) + 1) / 2 * (high - low)).astype(np.float32)


def built(config: TrainConfig, kind: str) -> tuple[Headed, Prompt, Samples]:
    """Build the backbone of a config with a head, its prompt, and the rows to train on.

    Raises:
        InputError: When the config asks for what only text has a meaning for here.
    """
    sources = sources_of(config.data)
    (source,) = sources.values()
    spec = spec_of(config, source)
    if spec.relative_dims or spec.crop != 1 or any(config.augmentation.jitter):
        got = "a config with relative actions, crop or jitter"
        raise InputError("a config without them, to compare heads", got, "leave them out")
    vlm, processor = tiny_of(config, dict.fromkeys(sources, spec), sources)
    set_seed(config.training.seed)
    head = HEADS[kind](vlm.config.get_text_config().hidden_size, spec)
    return Headed(vlm, head), Prompt(spec, processor), Samples(source, spec, config.training.seed)


def train(config: TrainConfig, kind: str) -> Path:
    """Train a head as a config trains text, and return the folder of the run.

    A run that has ended is not repeated; one that was interrupted begins anew.
    """
    output = Path(config.logging.output_dir)
    if (output / WEIGHTS).is_file():
        return output
    model, prompt, samples = built(config, kind)
    settings = arguments(config, output, config.training.num_steps or 0, 1.0)
    settings.save_strategy = type(settings.save_strategy)("no")
    HeadTrainer(
        model=model, args=settings, train_dataset=samples,
        data_collator=partial(collate, prompt=prompt),
    ).train()  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    save_model(model, str(output / WEIGHTS))
    return output


def load(config: TrainConfig, kind: str) -> tuple[Headed, Prompt]:
    """Load what `train` has trained."""
    model, prompt, _ = built(config, kind)
    load_model(model, str(Path(config.logging.output_dir) / WEIGHTS))
    return model.eval(), prompt


def predictor(model: Headed, prompt: Prompt) -> Callable[[Sequence[Observation]], np.ndarray]:
    """Return what turns B observations into chunks (B, H, D) in the units of the data."""

    @torch.inference_mode()
    def predict(observations: Sequence[Observation]) -> np.ndarray:
        inputs = model_inputs(model.vlm, prompt.observe(observations))
        chunks = model.head.act(model.vlm, read(model.vlm, inputs))
        return unscaled(chunks.float().cpu().numpy(), prompt.spec)

    return predict
