"""MaPO (Hong et al. 2024, "Margin-aware Preference Optimization for Aligning Diffusion Models", 2406.06424)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.objectives.base import Objective, PairErrors, check_number

SERIES_BELOW = 0.3  # where four terms of the series are exact to 1e-10


@dataclass(frozen=True, kw_only=True)
class MaPO(Objective[PairErrors]):
    """Learn the winners and widen their margin over the losers, without a reference.

    L = policy_w - beta * log sigmoid( T * (S(policy_w) - S(policy_l)) )
    S(m) = z / (exp(z) - 1),  z = snr_value * m

    S is an odds-like ratio of the "likelihood" exp(-z): S(0) = 1, falling to 0. As in the authors' code (mapo-t2i/mapo,
    `utils.py`), T = num_train_timesteps sits inside the sigmoid and `beta`, their `--beta_mapo`, outside.

    Their float32 `exp(z) - 1` cancels: at an error of 1e-4 the logit carries noise of 0.6, and an error of 0 gives NaN.
    Here 1 - S is computed from its series where z is small, so the logit is exact to float32 everywhere.

    Args:
        beta: weight of the margin term against the denoising loss of the winner, > 0. Authors' default.
        snr_value: scale k of the errors in S, > 0. Authors' default.
        num_train_timesteps: T, > 0. Authors' default, the length of SDXL's schedule.

    Raises:
        ConfigError: a hyperparameter is out of range.

    Example: S(0.10) - S(0.20) = 0.024375, so the logit is 24.4 and only the winner's error is left.
        >>> from torch import tensor
        >>> MaPO().loss(PairErrors(policy_w=tensor([0.10]), policy_l=tensor([0.20])))
        tensor([0.1000])
        >>> MaPO(num_train_timesteps=10).loss(PairErrors(policy_w=tensor([0.10]), policy_l=tensor([0.20])))
        tensor([0.1579])
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    layout: ClassVar = "pair"

    beta: float = 0.1
    snr_value: float = 0.5
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        check_number("beta", self.beta, above=0.0)
        check_number("snr_value", self.snr_value, above=0.0)
        check_number("num_train_timesteps", self.num_train_timesteps, above=0)

    def logit(self, errors: PairErrors) -> Tensor:
        """Return T * (S(policy_w) - S(policy_l)) [B]."""
        lost_w, lost_l = (_one_minus_s(self.snr_value * error) for error in (errors.policy_w, errors.policy_l))
        return self.num_train_timesteps * (lost_l - lost_w)

    def loss(self, errors: PairErrors) -> Tensor:
        """Return the loss of every pair [B]."""
        return errors.policy_w - self.beta * F.logsigmoid(self.logit(errors))


def _one_minus_s(z: Tensor) -> Tensor:
    """Return 1 - z / (exp(z) - 1) [B] for z >= 0 without cancellation, overflow or 0/0, and so its gradient."""
    small = z < SERIES_BELOW
    near = torch.where(small, z, torch.zeros_like(z))
    series = near / 2 - near**2 / 12 + near**4 / 720 - near**6 / 30240
    # Each branch sees only values it can handle: a NaN in the branch not taken would still reach the gradient.
    large = torch.where(small, torch.ones_like(z), z)
    closed = 1 - large * torch.exp(-large) / -torch.expm1(-large)
    return torch.where(small, series, closed)
