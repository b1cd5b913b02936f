"""The vision tower for images of known sizes: what depends on sizes alone is asked of the tower
once.
"""

from typing import Any

import torch
from torch.nn.functional import linear

from vla0.decode.window_attention import Ends


class VisionTower:
    """A tower's forward pass for images of these sizes, as a function of tensors alone, so that it
    can be captured.

    grids: of each image (1, rows, columns) of patches. In which order the tower sees patches, and
    what it tells each of its blocks of windows and angles, is recorded from its own forward pass:
    nothing of it is computed a second way here.
    """

    def __init__(
        self,
        tower: Any,
        grids: tuple[tuple[int, ...], ...],
        device: torch.device,
        compiled: bool = False,
    ):
        self.tower = tower
        self.told: list[dict[str, Any]] = [{} for _ in tower.blocks]
        self.order = torch.empty(0)  # of patches
        self.ends: dict[torch.Tensor, Ends] = {}  # tensors are told apart as objects
        self.block = (
            _block if not compiled else torch.compile(_block, fullgraph=True, dynamic=False)
        )
        weight = tower.patch_embed.proj.weight
        grid = torch.tensor(grids, device=device)
        patches = int(grid.prod(1).sum())
        hooks = [
            tower.patch_embed.register_forward_hook(
                lambda *_: _numbered(patches, len(weight), device)
            ),
            tower.merger.register_forward_hook(
                lambda _, __, out: _numbered(len(out), out.shape[1], device)
            ),
        ]
        for number, block in enumerate(tower.blocks):
            hooks.append(
                block.register_forward_pre_hook(
                    self._listen(number, weight.dtype), with_kwargs=True
                )
            )
        try:
            with torch.inference_mode():
                self.back = (
                    tower(weight.new_zeros(patches, weight[0].numel()), grid)
                    .pooler_output[:, 0]
                    .long()
                )
        finally:
            for hook in hooks:
                hook.remove()

    def _listen(self, number: int, dtype: torch.dtype):
        """Records what a block is told; of the first also the patches' order, which stands in their
        place.
        """

        def hook(_: Any, given: tuple[torch.Tensor, ...], told: dict[str, Any]):
            (hidden,) = given
            if number == 0:
                self.order, hidden = hidden[:, 0].long(), torch.zeros_like(hidden, dtype=dtype)
            ends = told["cu_seqlens"]
            if ends not in self.ends:
                self.ends[ends] = Ends(ends, hidden.device)
            self.told[number] = {**told, "cu_seqlens": self.ends[ends]}
            return (hidden,), told

        return hook

    def __call__(self, patches: torch.Tensor) -> torch.Tensor:
        """(tokens, width) of patches (N, pixels): what `get_image_features` gives, the images one
        after another.
        """
        tower = self.tower
        # A convolution whose stride is its kernel is a product of matrices, and faster as one.
        hidden = linear(patches, tower.patch_embed.proj.weight.flatten(1))[self.order]
        for block, told in zip(tower.blocks, self.told, strict=True):
            hidden = self.block(block, hidden, told)
        return tower.merger(hidden)[self.back]


def _block(block: Any, hidden: torch.Tensor, told: dict[str, Any]) -> torch.Tensor:
    return block(hidden, **told)


def _numbered(rows: int, width: int, device: torch.device) -> torch.Tensor:
    """(rows, width) float32: each row its own number, to follow it through a permutation."""
    return (
        torch.arange(rows, dtype=torch.float32, device=device)[:, None]
        .expand(rows, width)
        .contiguous()
    )
