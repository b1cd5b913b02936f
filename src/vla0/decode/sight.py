"""The vision tower for images of known sizes: what depends on sizes alone is computed once."""

from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear


class Sight:
    """A tower's forward pass for images of these sizes, as a function of tensors alone, so that it can be captured.

    grids: of each image (1, rows, columns) of patches. The blocks ask tensors for the lengths of windows, each block anew, and
    wait for the device; arrays answer at once.
    """

    def __init__(self, tower: Any, grids: tuple[tuple[int, ...], ...], device: torch.device):
        self.tower, grid = tower, torch.tensor(grids)
        window, ends = tower.get_window_index(grid)
        self.windows, self.images = np.unique(ends), np.cumsum([0, *grid.prod(1).tolist()])
        self.order, self.back = window.to(device), torch.argsort(window).to(device)
        turn = self._grouped(tower.rot_pos_emb(grid.to(device)))
        turn = torch.cat([turn, turn], 1)
        self.turn = turn.cos(), turn.sin()

    def __call__(self, patches: torch.Tensor) -> torch.Tensor:
        """(tokens, width) of patches (N, pixels): what `get_image_features` gives, the images one after another."""
        tower = self.tower
        # A convolution whose stride is its kernel is a product of matrices, and faster as one.
        hidden = self._grouped(linear(patches, tower.patch_embed.proj.weight.flatten(1)))
        for layer, block in enumerate(tower.blocks):
            ends = self.images if layer in tower.fullatt_block_indexes else self.windows
            hidden = block(hidden, cu_seqlens=ends, position_embeddings=self.turn)
        return tower.merger(hidden)[self.back]

    def _grouped(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (N, width) of patches in the order of the windows."""
        groups = rows.reshape(len(self.order), self.tower.spatial_merge_unit, -1)
        return groups[self.order].flatten(0, 1)
