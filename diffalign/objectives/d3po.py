"""D3PO (Yang et al. 2024, "Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model").

arXiv 2311.13231.
"""

from dataclasses import dataclass
from typing import ClassVar

from diffalign.objectives.base import ClippedRatios


@dataclass(frozen=True, kw_only=True)
class D3PO(ClippedRatios):
    """DPO on every step of two trajectories, of which the finished pictures were compared.

    L = -log sigmoid( h * beta * (log r_0 - log r_1) ),  r = clamp( p(x_p|x_t) / p_ref(x_p|x_t), 1 - clip, 1 + clip )

    h is 1 or -1 for the trajectory that is better in every reward, 0 (no gradient) if neither is. Both start from the
    same noise, but their later latents differ.

    Args:
        beta: strength of the anchor, > 0. The paper's code: 0.1.
        ratio_clip: ratios further from 1 than this get no gradient, in (0, 1). The paper's code: 0.1.

    Raises:
        ConfigError: a hyperparameter is out of range.

    Example: log-ratios of 0.01 and -0.01 give a logit of 0.002.
        >>> from torch import tensor
        >>> from diffalign.objectives import Transitions
        >>> transitions = Transitions(
        ...     log_prob_w=tensor([-0.30]), log_prob_l=tensor([-0.32]),
        ...     reference_log_prob_w=tensor([-0.31]), reference_log_prob_l=tensor([-0.31]),
        ... )
        >>> D3PO().loss(transitions)
        tensor([0.6921])
    """

    rollout: ClassVar[str] = "trajectory_pairs"

    beta: float = 0.1
