"""SPO (Liang et al. 2024, "Aesthetic Post-Training Diffusion Models from Generic Preferences", arXiv 2406.04314)."""

from dataclasses import dataclass

from diffalign.objectives.base import ClippedRatios


@dataclass(frozen=True, kw_only=True)
class SPO(ClippedRatios):
    """Step by step: DPO on two candidates for the next latent, drawn from the same one.

    L = -log sigmoid( beta * (log r_w - log r_l) ),  r = clamp( p(x_p | x_t) / p_ref(x_p | x_t), 1 - clip, 1 + clip )

    A candidate is judged by a preference model on the clean picture that one step predicts from it. The logarithms of p
    are averaged over C, H, W, so beta is in units of the average; r stays near 1. LPO is the same with beta 500.

    Args:
        beta: strength of the anchor, > 0. The paper's code: 10.
        ratio_clip: ratios further from 1 than this get no gradient, in (0, 1). The paper's code: 0.1.

    Raises:
        ConfigError: a hyperparameter is out of range.

    Example: log-ratios of 0.01 and -0.01 give a logit of 0.2.
        >>> from torch import tensor
        >>> from diffalign.objectives import Transitions
        >>> transitions = Transitions(
        ...     log_prob_w=tensor([-0.30]), log_prob_l=tensor([-0.32]),
        ...     reference_log_prob_w=tensor([-0.31]), reference_log_prob_l=tensor([-0.31]),
        ... )
        >>> SPO().loss(transitions)
        tensor([0.5981])
    """
