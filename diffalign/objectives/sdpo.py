"""Diffusion-SDPO (Fu et al. 2025, "Safeguarded Direct Preference Optimization for Diffusion Models", 2511.03317)."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.objectives.base import PairErrors, ScaledMargin, check_choice, check_number


@dataclass(frozen=True, kw_only=True)
class SDPO(ScaledMargin):
    """DPO whose loser gradient is shrunk until it cannot raise the winner's error.

    L = -log sigmoid( beta/2 * margin ), with the gradient through policy_l multiplied by
    lambda = min(1, (1 - mu) * |r_w|^2 / <r_w, r_l>) where <r_w, r_l> > 0, else 1;  r = pred - target

    DPO widens the margin by raising both errors, the loser's faster. To first order in the predictions, the winner's
    error does not rise if the loser's gradient is scaled by lambda at mu = 0; mu > 0 leaves a safety margin. The value
    of the loss is DPO's. The authors' code (AIDC-AI/Diffusion-SDPO, `train.py`) takes one lambda for the local batch,
    which is `scope="batch"`; per pair, the guarantee holds for each and no pair depends on another.

    Args:
        beta: strength of the KL anchor, > 0. Ours: DPO's.
        mu: safety margin in [0, 1); 1 would switch the loser off. Authors: 0.9 for SD1.5, 0.6 for SDXL (the default).
        scope: "pair": a lambda for every pair; "batch": one for the local batch, as the authors have it.

    Raises:
        ConfigError: a hyperparameter is out of range.

    Example: residuals with <r_w, r_l> = 0.10 and |r_w|^2 = 0.10 give lambda 0.4; the value is that of DPO.
        >>> from torch import tensor
        >>> errors = PairErrors(
        ...     policy_w=tensor([0.10]), policy_l=tensor([0.20]),
        ...     reference_w=tensor([0.11]), reference_l=tensor([0.18]), residual_product=tensor([0.10]),
        ... )
        >>> SDPO(beta=100.0).loss(errors)
        tensor([0.2014])
        >>> SDPO(beta=100.0).loser_scale(errors)
        tensor([0.4000])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"reference", "residual_product"})

    mu: float = 0.6
    scope: str = "pair"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("mu", self.mu, at_least=0.0, below=1.0)
        check_choice("scope", self.scope, ("pair", "batch"))

    def loser_scale(self, errors: PairErrors) -> Tensor:
        """Return lambda in [0, 1], [B]."""
        assert errors.residual_product is not None, "declare residual_product in Objective.needs"
        winner, product = errors.policy_w.detach(), errors.residual_product.detach()
        if self.scope == "batch":
            winner, product = winner.mean().expand_as(winner), product.mean().expand_as(product)
        aligned = product > 0
        ratio = (1 - self.mu) * winner / torch.where(aligned, product, torch.ones_like(product))
        return torch.where(aligned, ratio.clamp(max=1.0), torch.ones_like(ratio))

    def loss(self, errors: PairErrors) -> Tensor:
        """Return DPO's loss of every pair [B], with the scaled gradient."""
        fixed = errors.policy_l.detach()
        scaled = fixed + self.loser_scale(errors) * (errors.policy_l - fixed)
        return -F.logsigmoid(self.logit(replace(errors, policy_l=scaled)))
