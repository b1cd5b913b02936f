"""Run the vision tower for images of known sizes.

What depends on the sizes alone is computed once, by the tower itself.
"""

from typing import Any

import torch
from torch.nn.functional import linear

from vla0.decode.window_attention import Ends


class VisionTower:
    """The forward pass of a tower for images of these sizes.

    It is a function of tensors alone, so that it can be captured as a CUDA graph. The order in
    which the tower sees patches, and the windows and angles that it passes to its blocks, are
    recorded from its own forward pass. Nothing of this is computed in a second way here.

    Args:
        tower: The vision tower of the model. It is not changed.
        grids: (1, rows, columns) of patches of each image.
        device: Where the tower computes.
        compiled: Compile the blocks with torch.compile.
    """

    def __init__(
        self,
        tower: Any,
        grids: tuple[tuple[int, ...], ...],
        device: torch.device,
        compiled: bool = False,
    ):
        self.tower = tower
        self.told: list[dict[str, Any]] = [{} for _ in tower.blocks]  # arguments of each block
        self.order = torch.empty(0)  # of patches
        self.ends: dict[torch.Tensor, Ends] = {}  # tensors are compared by identity
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
        """Return a hook that records a block's arguments, and at block 0 the order of patches.

        Block 0 then holds the numbers of the patches in place of their features.
        """

        def hook(_: Any, inputs: tuple[torch.Tensor, ...], arguments: dict[str, Any]):
            (hidden,) = inputs
            if number == 0:
                self.order, hidden = hidden[:, 0].long(), torch.zeros_like(hidden, dtype=dtype)
            ends = arguments["cu_seqlens"]
            if ends not in self.ends:
                self.ends[ends] = Ends(ends, hidden.device)
            self.told[number] = {**arguments, "cu_seqlens": self.ends[ends]}
            return (hidden,), arguments

        return hook

    def __call__(self, patches: torch.Tensor) -> torch.Tensor:
        """Compute the features of images, as `get_image_features` does.

        Args:
            patches: (N, pixels), the images one after another.

        Returns:
            (tokens, width), the images one after another.
        """
        tower = self.tower
        # A convolution whose stride equals its kernel is a matrix product, and faster as one.
        hidden = linear(patches, tower.patch_embed.proj.weight.flatten(1))[self.order]
        for block, arguments in zip(tower.blocks, self.told, strict=True):
            hidden = self.block(block, hidden, arguments)
        return tower.merger(hidden)[self.back]


def _block(block: Any, hidden: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """Call a block; this function is what torch.compile compiles."""
    return block(hidden, **arguments)


def _numbered(rows: int, width: int, device: torch.device) -> torch.Tensor:
    """Return (rows, width) float32 whose rows hold their number, to follow a permutation."""
    return (
        torch.arange(rows, dtype=torch.float32, device=device)[:, None]
        .expand(rows, width)
        .contiguous()
    )
