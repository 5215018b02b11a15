"""Diffusion-DPO (Wallace et al. 2023, "Diffusion Model Alignment Using Direct Preference Optimization", 2311.12908)."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from diffalign.objectives.base import PairErrors, ScaledMargin, check_number


@dataclass(frozen=True, kw_only=True)
class DPO(ScaledMargin):
    """Raise the winner's denoising likelihood over the loser's, relative to the reference.

    L = -log sigmoid( beta/2 * [(reference_w - policy_w) - (reference_l - policy_l)] )    Eq. 14

    Three conventions of the authors' code (SalesforceAIResearch/DiffusionDPO, `train.py`) differ from Eq. 14 and are
    followed here: errors are means over C, H, W where the paper has squared norms, so `beta` does not grow with the
    resolution; T * omega(lambda_t) is folded into `beta`; the factor 1/2 is kept, so `beta` equals their `--beta_dpo`.
    The diffusers SD1.5 script has no 1/2: its `--beta_dpo 2500` is `beta=5000` here. Whether winner and loser share
    their noise (the authors' code) or not (Eq. 14) is a property of the noising, not of this loss.

    `label_smoothing` is not part of the paper. It is conservative DPO (Mitchell 2023, "A note on DPO with noisy
    preferences & relationship to IPO"): (1 - label_smoothing) * L(logit) + label_smoothing * L(-logit).
    `errors.preference` is not read.

    Args:
        beta: strength of the KL anchor, > 0; larger stays closer to the reference. The default is that of the authors'
            launchers for SD1.5 and SDXL; the paper's text gives 2000 for SD1.5.
        label_smoothing: probability in [0, 0.5) that a label is wrong. The paper has 0.

    Raises:
        ConfigError: a hyperparameter is out of range.

    Example: a margin of (0.11 - 0.10) - (0.18 - 0.20) = 0.03 is a logit of 1.5, and log(1 + exp(-1.5)) = 0.2014.
        >>> from torch import tensor
        >>> errors = PairErrors(
        ...     policy_w=tensor([0.10]), policy_l=tensor([0.20]),
        ...     reference_w=tensor([0.11]), reference_l=tensor([0.18]),
        ... )
        >>> DPO(beta=100.0).loss(errors)
        tensor([0.2014])
        >>> DPO(beta=100.0, label_smoothing=0.1).loss(errors)  # 0.9 * 0.2014 + 0.1 * (0.2014 + 1.5)
        tensor([0.3514])
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("label_smoothing", self.label_smoothing, at_least=0.0, below=0.5)

    def loss(self, errors: PairErrors) -> Tensor:
        """Return Eq. 14 for every pair [B]."""
        logit = self.logit(errors)
        # -log sigmoid(-z) = -log sigmoid(z) + z, so smoothing adds label_smoothing * z.
        return -F.logsigmoid(logit) + self.label_smoothing * logit
