"""DCPO (Saeidi et al. 2025, "Dual Caption Preference Optimization for Diffusion Models", 2502.06023)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from diffalign.objectives.base import PairErrors, ScaledMargin


@dataclass(frozen=True, kw_only=True)
class DCPO(ScaledMargin):
    """Condition winner and loser each on a caption of its own.

    L = -log sigmoid( beta/2 * [(reference_w - policy_w) - (reference_l - policy_l)] ),  errors of w given the caption
    z_w, of l given z_l, for policy and reference alike

    The prompt often describes the loser badly; the paper replaces it by captions of the two images (DCPO-c), by a
    perturbed caption for the loser (DCPO-p), or both (DCPO-h, its best). The captions are data: name their columns in
    `data.image_caption_columns`. In the authors' code the SDXL branch ignores the second caption, and an epsilon target
    is forced on a v-prediction model; neither is done here.

    Args:
        beta: strength of the KL anchor, > 0. The default is that of the authors' launcher.

    Raises:
        ConfigError: a hyperparameter is out of range.

    Example: a margin of 0.03 is a logit of 1.5 at beta 100.
        >>> from torch import tensor
        >>> errors = PairErrors(
        ...     policy_w=tensor([0.10]), policy_l=tensor([0.20]),
        ...     reference_w=tensor([0.11]), reference_l=tensor([0.18]),
        ... )
        >>> DCPO(beta=100.0).loss(errors)
        tensor([0.2014])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"reference", "image_captions"})

    beta: float = 500.0

    def loss(self, errors: PairErrors) -> Tensor:
        """Return the loss of every pair [B]."""
        return -F.logsigmoid(self.logit(errors))
