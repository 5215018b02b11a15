"""RankDPO (Karthik et al. 2024, "Scalable Ranked Preference Optimization for Text-to-Image Generation", 2410.18013)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.objectives.base import ListErrors, Objective, check_choice, check_number


@dataclass(frozen=True, kw_only=True)
class RankDPO(Objective[ListErrors]):
    """Rank k images of a prompt, pairs that matter more to the ranking counting more.

    L = -sum over i, j with phi_i > phi_j of Delta_ij * log sigmoid( -beta/2 * (s_i - s_j) ),  s = policy - reference
    Delta_ij = |2^phi_i - 2^phi_j| * |1/D_i - 1/D_j|,  D_i = log(1 + rank_i)    Algorithm 2

    phi in [0, 1] is the aggregated score of an image; ranks count from 1 for the largest phi, equal ones by position.
    There is no public code. Version 2 of the paper has the difference of inverses in Eq. 6 and in the algorithm; a
    transcription in circulation has |D_i - D_j|, kept as `discount="plain"`. The scale of beta and the normalisation of
    the sum are not given: for two images and Delta 1 this is Diffusion-DPO.

    Args:
        beta: strength of the KL anchor, > 0. Ours: DPO's.
        discount: "inverse" or "plain".

    Raises:
        ConfigError: a hyperparameter is out of range.

    Example: phi 1 and 0: Delta = 1 * (1/log 2 - 1/log 3) = 0.5325, times DPO's 0.2014 at a logit of 1.5.
        >>> from torch import tensor
        >>> errors = ListErrors(
        ...     policy=tensor([[0.10, 0.20]]), reference=tensor([[0.11, 0.18]]), scores=tensor([[1.0, 0.0]])
        ... )
        >>> RankDPO(beta=100.0).loss(errors)
        tensor([0.1072])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"reference"})
    layout: ClassVar = "list"
    noising: ClassVar[str] = "independent"

    beta: float = 5000.0
    discount: str = "inverse"

    def __post_init__(self) -> None:
        check_number("beta", self.beta, above=0.0)
        check_choice("discount", self.discount, ("inverse", "plain"))

    def weights(self, scores: Tensor) -> Tensor:
        """Return Delta_ij where phi_i > phi_j, else 0: [B,k] -> [B,k,k]."""
        order = scores.argsort(dim=1, descending=True, stable=True)
        discount = torch.log1p(order.argsort(dim=1) + 1.0)
        discount = 1 / discount if self.discount == "inverse" else discount
        gain = scores.exp2()
        importance = (gain[:, :, None] - gain[:, None]).abs() * (discount[:, :, None] - discount[:, None]).abs()
        return importance * (scores[:, :, None] > scores[:, None])

    def loss(self, errors: ListErrors) -> Tensor:
        """Return the loss of every list [B]."""
        lost = errors.policy - errors.reference
        logit = -self.beta / 2 * (lost[:, :, None] - lost[:, None])
        return -(self.weights(errors.scores) * F.logsigmoid(logit)).sum(dim=(1, 2))
