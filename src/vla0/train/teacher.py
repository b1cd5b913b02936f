"""Distillation: a model learns from another one's probabilities, beside the recorded actions.

The two may be of different families: what is compared are the probabilities of the twelve symbols,
which every model has, and not of tokens. G. Hinton et al., arXiv 1503.02531.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vla0.checkpoint import io as models
from vla0.checkpoint.location import locate
from vla0.core.prompt import IGNORE, Prompt
from vla0.core.spec import Spec
from vla0.errors import InputError
from vla0.train.loss import answered

INPUT = "teacher."  # prefix of the teacher's inputs in a batch
SHARE = 0.5  # of the loss, where training.teacher_weight does not say
# What must be the same for the same text to stand for the same actions.
SAME = (
    "chunk_size",
    "bins",
    "low",
    "high",
    "relative_dims",
    "periodic",
    "fps",
    "state",
    "history",
    "depth",
)


@dataclass(frozen=True)
class Teacher:
    """A trained model whose probabilities another one learns.

    Args:
        model: The model; it is not trained.
        prompts: Its prompts, one for each dataset of a mixture.
    """

    model: Any
    prompts: Sequence[Prompt]

    @torch.no_grad()
    def probabilities(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the probabilities (B, n, 12) of the symbols at the answers of its batch."""
        _, logits, _ = answered(self.model, inputs)
        return torch.softmax(logits[..., self.prompts[0].symbol_ids].float(), -1)


def load_teacher(name: str, specs: Mapping[str, Spec], dtype: torch.dtype) -> Teacher:
    """Load a teacher for students of these Specs.

    Args:
        name: Its checkpoint folder, or its Hub id.
        specs: {embodiment: the student's Spec}.
        dtype: Type of its weights, which are not on a GPU yet.

    Raises:
        InputError: When it has no such embodiment, or writes actions in another way.
    """
    folder = locate(name)
    own = {embodiment: Spec.load(folder, embodiment) for embodiment in specs}
    for embodiment, spec in specs.items():
        for key in SAME:
            given, expected = getattr(own[embodiment], key), getattr(spec, key)
            if given != expected:
                raise InputError(
                    f"a teacher whose {key} is that of the run, {expected}",
                    f"{given} in '{name}'",
                    "train on the data that it was trained on, with its action settings",
                )
        if missing := set(own[embodiment].cameras) - set(spec.cameras):
            raise InputError(
                f"cameras {own[embodiment].cameras} for the teacher",
                f"no {', '.join(sorted(missing))}",
                "name them in data.cameras as the teacher knows them",
            )
    model, processor = models.load(folder, "cpu", dtype)
    model.requires_grad_(False)
    return Teacher(model, [Prompt(spec, processor) for spec in own.values()])


def divergence(
    logits: torch.Tensor, targets: torch.Tensor, probabilities: torch.Tensor
) -> torch.Tensor:
    """Return the Kullback-Leibler divergence from a teacher, summed over the labelled tokens.

    Args:
        logits: (B, n, 12) of the student, at the symbols.
        targets: (B, n) labels, IGNORE where nothing is learned.
        probabilities: (B, n, 12) of the teacher.

    Returns:
        (B,), in fp32.
    """
    student = torch.log_softmax(logits.float(), -1)
    apart = torch.nn.functional.kl_div(student, probabilities, reduction="none").sum(-1)
    return (apart * (targets != IGNORE)).sum(1)
