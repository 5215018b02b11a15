"""Supervised fine-tuning on the preferred images: the denoising loss of DDPM (Ho et al. 2020, 2006.11239)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffalign.objectives.base import Objective, SingleErrors


@dataclass(frozen=True, kw_only=True)
class SFT(Objective[SingleErrors]):
    """Learn to denoise the preferred images; the baseline of preference papers and the start of some of them.

    L = policy = mean over C, H, W of (pred - target)^2    Eq. 14 of Ho et al., divided by C * H * W

    The target is the backbone's own (noise, or v). Of a preference data set only the winners are seen, as in the
    `--sft` mode of SalesforceAIResearch/DiffusionDPO, whose paper reports that it helps SD1.5 and hurts SDXL.

    Example: the loss of an image is its error.
        >>> from torch import tensor
        >>> SFT().loss(SingleErrors(policy=tensor([0.10, 0.25])))
        tensor([0.1000, 0.2500])
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    layout: ClassVar = "single"
    chosen_only: ClassVar[bool] = True

    def loss(self, errors: SingleErrors) -> Tensor:
        """Return the denoising loss of every image [B]."""
        return errors.policy
