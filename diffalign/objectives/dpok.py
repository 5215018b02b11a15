"""DPOK (Fan et al. 2023, "DPOK: Reinforcement Learning for Fine-tuning Text-to-Image Diffusion Models", 2305.16381)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from diffalign.objectives.base import Objective, Transitions, check_number


@dataclass(frozen=True, kw_only=True)
class DPOK(Objective[Transitions]):
    """Policy gradient on every step of a trajectory, held back by the distance to the reference.

    L = -w A clamp(r, 1 - clip, 1 + clip) + kl_weight * mean (eps - eps_ref)^2,  r = p(x_p | x_t) / p_old(x_p | x_t)

    The clamp is a plain one, not PPO's: outside the clip only the second term has a gradient. That term is the KL
    divergence of the steps up to a factor of the noise level, as in the authors' code; eps are the guided predictions,
    of a v model v.

    Args:
        reward_weight: w, of the clipped advantage term, > 0. The authors' code: 100.
        clip_range: ratios are clipped to within this of 1, in (0, 1). The authors' code: 1e-4.
        kl_weight: of the distance to the reference, >= 0. The authors' code: 0.01.

    Raises:
        ConfigError: a hyperparameter is out of range.

    Example: the second has left the clip; its drift alone can move it.
        >>> from torch import tensor
        >>> transitions = Transitions(
        ...     log_prob_w=tensor([-0.30, -0.30]), behavior_log_prob=tensor([-0.30, -0.31]),
        ...     advantages=tensor([0.5, 0.5]), drift=tensor([0.0, 0.2]),
        ... )
        >>> DPOK().loss(transitions)
        tensor([-50.0000, -50.0030])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"reference", "behavior", "advantages", "drift"})
    layout: ClassVar[Literal["pair", "single", "list", "transition"]] = "transition"
    rollout: ClassVar[str] = "trajectories"

    reward_weight: float = 100.0
    clip_range: float = 1e-4
    kl_weight: float = 0.01

    def __post_init__(self) -> None:
        check_number("reward_weight", self.reward_weight, above=0.0)
        check_number("clip_range", self.clip_range, above=0.0, below=1.0)
        check_number("kl_weight", self.kl_weight, at_least=0.0)

    def loss(self, transitions: Transitions) -> Tensor:
        """Return the loss of every transition [B]."""
        assert transitions.advantages is not None, "declare advantages in Objective.needs"
        assert transitions.drift is not None, "declare drift in Objective.needs"
        clipped = transitions.behavior_ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        return self.kl_weight * transitions.drift - self.reward_weight * transitions.advantages * clipped
