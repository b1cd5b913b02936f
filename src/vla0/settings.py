"""What a recipe may say of adapters and of augmentation, apart from what does it: read before anything heavy is imported."""

from dataclasses import dataclass

from vla0.errors import InputError, refuse_idle
from vla0.spec import tupled

JITTER = (0.2, 0.2, 0.2, 0.05)  # brightness, contrast, saturation, hue: the published strengths


@dataclass(frozen=True)
class Lora:
    """LoRA (arXiv 2106.09685) of all linear layers: each weight learns the product of two thin matrices."""

    rank: int = 0  # 0: all weights are trained
    alpha: float | None = None  # the product counts alpha / rank times; None: twice the rank
    dropout: float = 0.0

    def __post_init__(self):
        if self.rank < 0:
            raise InputError("rank >= 0", f"{self.rank}", "0 trains all weights; 16 to 64 are usual")
        if not self.rank:
            refuse_idle({"lora.alpha": self.alpha, "lora.dropout": self.dropout or None}, "lora.rank")
        if self.alpha is not None and not self.alpha > 0:
            raise InputError("alpha > 0", f"{self.alpha}", "leave it out for twice the rank")
        if not 0 <= self.dropout < 1:
            raise InputError("dropout in [0, 1)", f"{self.dropout}", "0 is usual")


@dataclass(frozen=True)
class Augmentation:
    """What training adds at random; acting has none of it."""

    mask: str = "character"  # masked action augmentation by "character" (published), "number", or "none"
    mask_most: float = 0.4  # the share hidden is uniform in 0..mask_most
    mask_none: float = 0.1  # probability that nothing is hidden
    jitter: tuple[float, float, float, float] = JITTER

    def __post_init__(self):
        object.__setattr__(self, "jitter", tupled(self.jitter))
        if self.mask not in ("character", "number", "none"):
            raise InputError("mask: character, number or none", f"'{self.mask}'", "choose one of those")
        if not (0 <= self.mask_most <= 1 and 0 <= self.mask_none <= 1):
            raise InputError("mask_most and mask_none in 0..1", f"{self.mask_most}, {self.mask_none}", "they are shares")
        if len(self.jitter) != 4 or not all(0 <= j <= 1 for j in self.jitter) or self.jitter[3] > 0.5:
            raise InputError("jitter: four strengths in 0..1, hue at most 0.5", f"{self.jitter}", "zeros turn it off")
