"""The next-token loss: logits only where there are labels, in fp32 and a row at a time."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from vla0.core.prompt import IGNORE


def answered(
    model: Any, inputs: Mapping[str, torch.Tensor]
) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Run a model on a batch with labels, with logits only for the answers.

    Args:
        model: The model that is trained.
        inputs: The batch, with (B, L) `labels`. Rows must be padded on the left.

    Returns:
        The model's output, the logits (B, n, V) of the answers, and their targets (B, n).
    """
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    # Rows end together (left padding), so the answers are the last `kept` columns.
    labelled = (labels != IGNORE).any(dim=0)
    kept = labels.shape[1] - int(labelled.int().argmax()) if labelled.any() else 1
    outputs = model(**inputs, logits_to_keep=kept + 1, use_cache=False)
    # Models that do not know that argument give the logits of all tokens.
    return outputs, outputs.logits[:, -kept - 1 : -1], labels[:, -kept:]


def summed(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy, summed over the labelled tokens of each row: (B,)."""
    # It is computed in fp32 for one row at a time, and again in the backward pass: fp32 logits of
    # 150,000 words would take gigabytes.
    rows: Any = [
        checkpoint(_summed, *pair, use_reentrant=False)
        for pair in zip(logits, targets, strict=True)
    ]
    return torch.stack(rows)


def _summed(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the summed cross-entropy of one row, in fp32."""
    return torch.nn.functional.cross_entropy(
        logits.float(), targets, ignore_index=IGNORE, reduction="sum"
    )
