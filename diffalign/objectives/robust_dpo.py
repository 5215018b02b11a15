"""Robust DPO (Chowdhury et al. 2024, "Provably Robust DPO: Aligning Language Models with Noisy Feedback").

arXiv:2403.00409
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from diffalign.objectives.base import PairErrors, ScaledMargin, check_number


@dataclass(frozen=True, kw_only=True)
class RobustDPO(ScaledMargin):
    """Correct DPO for labels that are flipped with a known probability.

    L = ( (1 - e) * l(logit) - e * l(-logit) ) / (1 - 2 * e),  l(z) = -log sigmoid(z),  e = label_smoothing

    In expectation over flips this is the DPO loss under the true labels. Unlike conservative DPO (`dpo` with
    `label_smoothing`), the loss is not bounded below: a pair that is fitted well keeps being pushed.

    Args:
        beta: strength of the KL anchor, > 0. Ours: DPO's.
        label_smoothing: probability e in [0, 0.5) that a label is flipped; 0 is DPO. Ours: 0.1.

    Raises:
        ConfigError: a hyperparameter is out of range.

    Example: a logit of 1.5, l = 0.2014 and l(-1.5) = 1.7014: (0.9 * 0.2014 - 0.1 * 1.7014) / 0.8.
        >>> from torch import tensor
        >>> errors = PairErrors(
        ...     policy_w=tensor([0.10]), policy_l=tensor([0.20]),
        ...     reference_w=tensor([0.11]), reference_l=tensor([0.18]),
        ... )
        >>> RobustDPO(beta=100.0, label_smoothing=0.1).loss(errors)
        tensor([0.0139])
    """

    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("label_smoothing", self.label_smoothing, at_least=0.0, below=0.5)

    def loss(self, errors: PairErrors) -> Tensor:
        """Return the corrected loss of every pair [B]."""
        logit, flip = self.logit(errors), self.label_smoothing
        return ((1 - flip) * -F.logsigmoid(logit) + flip * F.logsigmoid(-logit)) / (1 - 2 * flip)
