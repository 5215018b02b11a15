"""Shifts: noise levels s of a flow path moved up, because a larger picture needs more noise to be destroyed.

Every shift in use is s' = k s / (1 + (k - 1) s), of Esser et al. 2024 (SD3, 2403.03206), with one factor k:

    static       k = shift                    SD3 3, Lumina2 and Z-Image 6, SANA and Z-Image-Turbo 3
    exponential  k = e^mu                     Flux, FLUX.2, Qwen-Image
    linear       k = mu                       diffusers' other `time_shift_type`

where mu follows the number of image tokens, in FLUX.2 that of sampling steps too. Scheduler configs of diffusers say
which; a static one does not look at the picture. Qwen-Image then stretches its ladder to a smallest level ("terminal").
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import Tensor

from diffalign.denoising.scheduler_config import check_choice
from diffalign.errors import ConfigError

Level = TypeVar("Level", float, Tensor)  # of noise, in [0, 1]: 1 is noise alone

TIME_SHIFT_TYPES = ("exponential", "linear")


def shifted(level: Level, factor: float) -> Level:
    """Return k s / (1 + (k - 1) s): 0 and 1 stay where they are, k > 1 moves the others up."""
    return factor * level / (1 + (factor - 1) * level)


def stretched(level: Level, terminal: float, last: float = 0.0) -> Level:
    """Return 1 - (1 - s) (1 - terminal) / (1 - last): 1 stays where it is, and `last` comes to `terminal`.

    `last` is the smallest level of a ladder before it is stretched; 0 is that of infinitely many steps.
    """
    return 1 - (1 - level) * ((1 - terminal) / (1 - last))


def mu_by_tokens(
    tokens: int, base_tokens: int = 256, max_tokens: int = 4096, base_shift: float = 0.5, max_shift: float = 1.15
) -> float:
    """Return mu on the line through (base_tokens, base_shift) and (max_tokens, max_shift), which goes on beyond them.

    `calculate_shift` of diffusers' Flux pipeline. The pipeline of Lumina2 gives it the number of latent channels.
    """
    return base_shift + (tokens - base_tokens) * (max_shift - base_shift) / (max_tokens - base_tokens)


def flux2_mu(tokens: int, num_steps: int) -> float:
    """Return the mu that FLUX.2 was found to like: `compute_empirical_mu` of diffusers' Flux2 pipelines.

    Above 4,300 tokens a line in them; below, a line in the steps between the values for 10 and for 200 of them.
    """
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    return at_200 + (num_steps - 200) * (at_200 - at_10) / 190


@dataclass(frozen=True)
class Shift:
    """Move levels by a factor, then stretch them to a smallest level.

    Args:
        factor: k > 0; 1 moves nothing, 3 is SD3's.
        terminal: the smallest level, in [0, 1). Training draws from all levels, not from a ladder of some steps: it
            stretches as a ladder of infinitely many.

    Raises:
        ConfigError: a value out of range.
    """

    factor: float = 1.0
    terminal: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.factor < math.inf and 0 <= self.terminal < 1):
            raise ConfigError(
                "A shift of noise levels needs a finite factor > 0 (1 moves nothing, 3 is that of SD3) and a terminal "
                f"level in [0, 1), got {self.factor} and {self.terminal}."
            )

    def __call__(self, level: Level) -> Level:
        """Return where levels go: [0, 1] -> [terminal, 1], increasing."""
        return stretched(shifted(level, self.factor), self.terminal)

    def inverse(self, level: float) -> float:
        """Return the level that comes to `level`, 0 if that is below the terminal level."""
        unstretched = 1 - (1 - level) / (1 - self.terminal)
        return shifted(unstretched, 1 / self.factor) if unstretched > 0 else 0.0

    @property
    def mu(self) -> float:
        """Return the logarithm of the factor, what papers and schedulers call mu."""
        return math.log(self.factor)

    def __str__(self) -> str:
        moved = "no shift" if self.factor == 1 else f"shift {self.factor:.4g} (mu {self.mu:.4g})"
        return moved + (f", from level {self.terminal:g} on" if self.terminal else "")


def shift_of(
    config: Mapping[str, Any],
    tokens: int | None = None,
    *,
    mu_rule: Literal["tokens", "flux2"] = "tokens",
    num_steps: int = 50,
) -> Shift:
    """Return the shift of a diffusers scheduler config for a picture: what sampling does, so what training meets.

    Reads `use_dynamic_shifting`, `time_shift_type`, `base_shift`, `max_shift`, `base_image_seq_len`,
    `max_image_seq_len`, `shift` (or `flow_shift`, of multistep solvers) and `shift_terminal`.

    Args:
        config: missing entries get the defaults of diffusers.
        tokens: image tokens the transformer sees, height/16 * width/16 for Flux; only dynamic shifting asks for them.
        mu_rule: "flux2" for the families whose pipeline has the rule of `flux2_mu`: no scheduler config says so.
        num_steps: of sampling, which the mu of FLUX.2 depends on; 50 is its pipelines' default.

    Raises:
        ConfigError: dynamic shifting without `tokens`, an unknown type, or a shift out of range.
    """
    terminal = config.get("shift_terminal") or 0.0
    if not config.get("use_dynamic_shifting"):
        static = config["flow_shift"] if config.get("flow_shift") is not None else config.get("shift")
        return Shift(1.0 if static is None else static, terminal)
    kind = config.get("time_shift_type", "exponential")
    check_choice("time_shift_type", kind, TIME_SHIFT_TYPES)
    if tokens is None:
        raise ConfigError(
            "This model's scheduler shifts noise levels by the picture's size (use_dynamic_shifting): the number of "
            "image tokens is needed. Give the resolution, or a shift of your own."
        )
    mu = flux2_mu(tokens, num_steps) if mu_rule == "flux2" else mu_by_tokens(tokens, *_anchors(config))
    return Shift(math.exp(mu) if kind == "exponential" else mu, terminal)


def _anchors(config: Mapping[str, Any]) -> tuple[int, int, float, float]:
    """Return the two points that the line of mu goes through, as `mu_by_tokens` takes them."""
    tokens = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    return *tokens, config.get("base_shift", 0.5), config.get("max_shift", 1.15)
