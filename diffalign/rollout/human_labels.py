"""What people said of finished pictures, as the score of the trajectory that made them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class HumanLabels:
    """Look up what the pictures of a prompt are worth; nothing is decoded.

    Args:
        scores: by prompt those of its G pictures, in the order in which they are drawn.
    """

    reads_prediction = True
    scale = 1.0

    def __init__(self, scores: Mapping[str, Sequence[float]]):
        self.scores = scores

    def __call__(self, latents: Tensor, prompts: Sequence[str], timesteps: Tensor) -> Tensor:
        """Return scores [1,G*B] of rows [all prompts, all prompts again, ...]."""
        count = len(prompts) // len(self.scores[prompts[0]])
        found = [self.scores[prompt][row // count] for row, prompt in enumerate(prompts)]
        return torch.tensor([found], device=latents.device)
