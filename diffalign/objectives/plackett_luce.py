"""Diffusion-LPO (Bai et al. 2025, "Towards Better Optimization For Listwise Preference ...", 2510.01540)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.objectives.base import NO_REFERENCE, ListErrors, Objective, check_number


@dataclass(frozen=True, kw_only=True)
class PlackettLuce(Objective[ListErrors]):
    """Raise the likelihood of a whole ranking: each image is drawn first among itself and those ranked below it.

    L = -sum over i of ( g_i - log sum over j in {i} and all below i of exp g_j ),  g = beta/2 * (reference - policy)

    There is no public code; the equation is the paper's in our words. The conventions are DPO's: errors are means over
    C, H, W, the factor 1/2 is kept, T * omega(lambda_t) is folded into `beta`. Two images are Diffusion-DPO exactly.
    The sum over images is not averaged, so the loss grows with k; where policy and reference agree it is log k!
    without ties. Only the order of the scores is read, not their distance: for that see `rankdpo`.

    Ours: images with equal scores do not compete with each other (as ties are left out of DPO), where the model itself
    knows no ties; and the images of a list share their noise, as in DPO's code.

    Args:
        beta: strength of the KL anchor, > 0; larger stays closer to the reference. Ours: DPO's.

    Raises:
        ConfigError: a hyperparameter is out of range.

    Example: g = 0.5 and -1 are DPO's 0.2014. With a third of g = 0, ranked last, the first image has the loss
        log(1 + exp(-1.5) + exp(-0.5)) = 0.6041 and the second log(1 + exp(1)) = 1.3133.
        >>> from torch import tensor
        >>> errors = ListErrors(
        ...     policy=tensor([[0.10, 0.20]]), reference=tensor([[0.11, 0.18]]), scores=tensor([[1.0, 0.0]])
        ... )
        >>> PlackettLuce(beta=100.0).loss(errors)
        tensor([0.2014])
        >>> errors = ListErrors(
        ...     policy=tensor([[0.10, 0.20, 0.30]]), reference=tensor([[0.11, 0.18, 0.30]]),
        ...     scores=tensor([[3.0, 2.0, 1.0]]),
        ... )
        >>> PlackettLuce(beta=100.0).loss(errors)
        tensor([1.9174])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"reference"})
    layout: ClassVar = "list"

    beta: float = 5000.0

    def __post_init__(self) -> None:
        check_number("beta", self.beta, above=0.0)

    def loss(self, errors: ListErrors) -> Tensor:
        """Return the negative log-likelihood of every ranking [B]."""
        assert errors.reference is not None, NO_REFERENCE
        reward = self.beta / 2 * (errors.reference - errors.policy)
        ahead = reward[:, None] - reward[:, :, None]  # [B,k,k]: g_j - g_i, 0 for j = i
        below = errors.scores[:, None] < errors.scores[:, :, None]
        own = torch.eye(reward.shape[1], dtype=torch.bool, device=reward.device)
        return ahead.masked_fill(~(below | own), -torch.inf).logsumexp(dim=2).sum(dim=1)
