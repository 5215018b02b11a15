"""Advantages: what a reward is worth compared with others."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def normalised(rewards: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Return (rewards - mean) / (std + epsilon) over the batch [N]; DDPO without statistics per prompt."""
    return (rewards - rewards.mean()) / (rewards.std(correction=0) + epsilon)


def grouped(prompts: Sequence[str], rewards: Tensor, epsilon: float = 1e-4) -> Tensor:
    """Return (reward - mean) / (std + epsilon) [N] over the rewards of the same prompt in this batch (GRPO)."""
    advantages = torch.zeros_like(rewards)
    for prompt in dict.fromkeys(prompts):
        rows = torch.tensor([index for index, other in enumerate(prompts) if other == prompt])
        advantages[rows] = normalised(rewards[rows], epsilon)
    return advantages


class PerPromptTracker:
    """Normalise by the rewards that a prompt has had lately (DDPO).

    Args:
        buffer_size: rewards remembered of a prompt.
        min_count: with fewer, mean and std of the batch are taken.
    """

    def __init__(self, buffer_size: int = 16, min_count: int = 16):
        self.buffer_size, self.min_count = buffer_size, min_count
        self._rewards: dict[str, deque[float]] = {}

    def update(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        """Remember rewards [N] and return their advantages [N], in the order given."""
        advantages = torch.zeros_like(rewards)
        for prompt in dict.fromkeys(prompts):
            rows = torch.tensor([index for index, other in enumerate(prompts) if other == prompt])
            seen = self._rewards.setdefault(prompt, deque(maxlen=self.buffer_size))
            seen.extend(rewards[rows].tolist())
            enough = len(seen) >= self.min_count
            among = torch.tensor(list(seen), dtype=rewards.dtype) if enough else rewards
            advantages[rows] = (rewards[rows] - among.mean()) / (among.std(correction=0) + 1e-6)
        return advantages

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"rewards": {prompt: list(rewards) for prompt, rewards in self._rewards.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._rewards = {prompt: deque(values, maxlen=self.buffer_size) for prompt, values in state["rewards"].items()}
