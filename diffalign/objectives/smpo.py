"""SmPO (Lu et al. 2025, "Smoothed Preference Optimization via ReNoise Inversion", 2506.02698)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from diffalign.errors import ConfigError
from diffalign.objectives.base import PairErrors, ScaledMargin, check_number


@dataclass(frozen=True, kw_only=True)
class SmPO(ScaledMargin):
    """Weigh every pair by how sure a reward model is of it.

    L = -log sigmoid( gamma * (2p - 1) * beta/2 * margin ),  p = P(winner preferred)

    p is the softmax over the pair of a reward model's score after min-max normalisation over the data set, so equal
    scores give log 2 and no gradient. As in the authors' code (JaydenLyh/SmPO, `train.py`), gamma = 10; p stays below
    0.7311, and gamma * (2p - 1) is typically 0.3 to 0.9. xt comes from ReNoise inversion. Theirs takes p from the first
    pair of a batch, here every pair has its own.

    Args:
        beta: strength of the KL anchor, > 0. The authors' launchers: 5000 for SDXL (the default here), 2000 for SD1.5.
        gamma: sum of the exponents of the smoothed distribution, > 0. Authors' value.

    Raises:
        ConfigError: a hyperparameter is out of range; data without P(winner preferred).

    Example: p = 0.55 multiplies the logit of 1.5 by 10 * 0.1.
        >>> from torch import tensor
        >>> errors = PairErrors(
        ...     policy_w=tensor([0.10]), policy_l=tensor([0.20]),
        ...     reference_w=tensor([0.11]), reference_l=tensor([0.18]), preference=tensor([0.55]),
        ... )
        >>> SmPO(beta=100.0).loss(errors)
        tensor([0.2014])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"reference", "preference"})
    noising: ClassVar[str] = "renoise_inversion"

    gamma: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("gamma", self.gamma, above=0.0)

    def logit(self, errors: PairErrors) -> Tensor:
        """Return gamma * (2p - 1) * beta/2 * margin [B]."""
        if errors.preference is None:
            raise ConfigError(
                "P(winner preferred) of every pair is needed. Set data.preference_from: scores with data.scorer (or "
                "data.annotations_file), or use data with soft labels."
            )
        return self.gamma * (2 * errors.preference - 1) * super().logit(errors)

    def loss(self, errors: PairErrors) -> Tensor:
        """Return the loss of every pair [B]."""
        return -F.logsigmoid(self.logit(errors))
