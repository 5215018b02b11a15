"""Latents as tokens, as FLUX.1 packs them and families after it: a token is 2 x 2 latents of all channels."""

import torch
from torch import Tensor

SIDE = 2  # latents that a token is high and wide


def packed(latents: Tensor) -> Tensor:
    """Return tokens [N,h/2*w/2,4C] of latents [N,C,h,w], row by row; a token's channels are ordered c, dy, dx."""
    n, channels, height, width = latents.shape
    parts = latents.reshape(n, channels, height // SIDE, SIDE, width // SIDE, SIDE)
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(n, -1, channels * SIDE**2)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return the latents [N,C,height,width] of their tokens: the inverse of `packed`."""
    parts = tokens.reshape(len(tokens), height // SIDE, width // SIDE, -1, SIDE, SIDE)
    return parts.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, height, width)


def image_ids(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Return the positions [h/2*w/2,3] float32 of the tokens of latents h x w: 0, row, column."""
    rows, columns = torch.arange(height // SIDE, device=device), torch.arange(width // SIDE, device=device)
    places = torch.cartesian_prod(rows, columns).float()
    return torch.cat([torch.zeros_like(places[:, :1]), places], dim=1)
