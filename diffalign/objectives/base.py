"""What an objective is, and the errors it is a function of.

An error is the mean over C, H, W of (pred - target)^2 of one image, in the prediction space of the backbone. It stands
for a negative log-likelihood: `reference - policy` is the log-ratio of policy to reference up to a positive factor.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

# Given on to the files of objectives, which state in `__post_init__` what their hyperparameters may be.
from diffalign.objectives.hyperparameters import check_choice as check_choice
from diffalign.objectives.hyperparameters import check_number

NO_REFERENCE = "a log-ratio needs the reference errors: declare them in Objective.needs"
NO_PROGRESS = "declare progress in Objective.needs"
SCALARS = ("statistic", "progress")  # fields of a whole batch
LARGEST_EXPONENT = 80.0  # of a ratio: its gradient stays finite in float32


class _Checked:
    """Assert that all tensors of a container agree in shape and are float32 or wider; `statistic` is a scalar."""

    _dimensions: ClassVar[int] = 1

    def __post_init__(self) -> None:
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        for name in SCALARS:
            scalar = tensors.pop(name, None)
            assert scalar is None or scalar.ndim == 0, f"{name} must be a scalar, got {tuple(scalar.shape)}"
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        shape = next(iter(tensors.values())).shape
        assert len(shape) == self._dimensions, f"expected {self._dimensions} dimension(s), got {tuple(shape)}"
        for name, tensor in tensors.items():
            assert tensor.shape == shape, f"{name} has shape {tuple(tensor.shape)}, the others {tuple(shape)}"
            # A bfloat16 error is off by up to 0.4 %: at beta 5000 that moves a logit by more than its own size.
            half = tensor.dtype in (torch.float16, torch.bfloat16)
            assert not half, f"{name} is {tensor.dtype}; reduce errors in float32"


@dataclass(frozen=True, kw_only=True, eq=False)
class PairErrors(_Checked):
    """Hold the errors of B preference pairs."""

    policy_w: Tensor  # [B], with gradient
    policy_l: Tensor  # [B], with gradient
    reference_w: Tensor | None = None  # [B]
    reference_l: Tensor | None = None  # [B]
    preference: Tensor | None = None  # [B] in [0, 1], P(winner preferred), for objectives with soft labels
    drift_w: Tensor | None = None  # [B], mean of (policy - reference)^2, with gradient; needs "drift"
    drift_l: Tensor | None = None  # [B]
    residual_product: Tensor | None = None  # [B], mean of (policy_w - target_w)(policy_l - target_l); needs that name
    progress: Tensor | None = None  # [], share of the run's steps that are done, in [0, 1); needs that name
    statistic: Tensor | None = None  # [], of the whole batch: see Objective.statistic

    @property
    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """Return reference - policy of winner and loser, [B] each: their log-ratios up to a positive factor."""
        assert self.reference_w is not None, NO_REFERENCE
        assert self.reference_l is not None, NO_REFERENCE
        return self.reference_w - self.policy_w, self.reference_l - self.policy_l

    @property
    def margin(self) -> Tensor:
        """Return (reference_w - policy_w) - (reference_l - policy_l) [B]: > 0 where the policy sides with the label."""
        log_ratio_w, log_ratio_l = self.log_ratios
        return log_ratio_w - log_ratio_l

    @property
    def raw_margin(self) -> Tensor:
        """Return policy_l - policy_w [B]: the margin of objectives without a reference."""
        return self.policy_l - self.policy_w

    @property
    def implicit_accuracy(self) -> Tensor:
        """Return 1 for a positive margin, 0 for a negative one and 1/2 for none [B]."""
        return 0.5 + 0.5 * self.margin.detach().sign()


@dataclass(frozen=True, kw_only=True, eq=False)
class SingleErrors(_Checked):
    """Hold the errors of B images, each with its own label or none."""

    policy: Tensor  # [B], with gradient
    reference: Tensor | None = None  # [B]
    desirable: Tensor | None = None  # [B] bool, None where the objective takes every image as desirable
    mismatched_policy: Tensor | None = None  # [B], with another example's prompt, no gradient; needs "mismatched"
    mismatched_reference: Tensor | None = None  # [B]
    progress: Tensor | None = None  # [], share of the run's steps that are done, in [0, 1); needs that name
    statistic: Tensor | None = None  # [], of the whole batch: see Objective.statistic

    @property
    def log_ratio(self) -> Tensor:
        """Return reference - policy [B]: the log-ratio up to a positive factor."""
        assert self.reference is not None, NO_REFERENCE
        return self.reference - self.policy


@dataclass(frozen=True, kw_only=True, eq=False)
class ListErrors(_Checked):
    """Hold the errors of k scored images for each of B prompts."""

    _dimensions: ClassVar[int] = 2

    policy: Tensor  # [B,k], with gradient
    scores: Tensor  # [B,k], higher is better
    reference: Tensor | None = None  # [B,k]
    progress: Tensor | None = None  # [], share of the run's steps that are done, in [0, 1); needs that name
    statistic: Tensor | None = None  # [], of the whole batch: see Objective.statistic


@dataclass(frozen=True, kw_only=True, eq=False)
class Transitions(_Checked):
    """Hold the log-probabilities of B pairs of denoising transitions xt -> x(t-1), or of B single ones (those of w)."""

    log_prob_w: Tensor  # [B], with gradient
    log_prob_l: Tensor | None = None  # [B], with gradient; None: the transitions are no pairs
    reference_log_prob_w: Tensor | None = None  # [B]
    reference_log_prob_l: Tensor | None = None  # [B]
    label: Tensor | None = None  # [B], 1: w is preferred, -1: l is, 0: a tie; None: w always is
    advantages: Tensor | None = None  # [B], of single transitions; needs "advantages"
    behavior_log_prob: Tensor | None = None  # [B], of single transitions under the network that took them
    drift: Tensor | None = None  # [B], mean of (eps - reference's eps)^2, with gradient; of single transitions
    statistic: Tensor | None = None  # [], of the whole batch: see Objective.statistic

    @property
    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """Return log(policy / reference) of winner and loser, [B] each."""
        assert self.log_prob_l is not None, "these transitions are no pairs"
        assert self.reference_log_prob_w is not None, NO_REFERENCE
        assert self.reference_log_prob_l is not None, NO_REFERENCE
        return self.log_prob_w - self.reference_log_prob_w, self.log_prob_l - self.reference_log_prob_l

    @property
    def behavior_ratio(self) -> Tensor:
        """Return p(x_p | x_t) / p_old(x_p | x_t) [B] of single transitions, at most exp(80)."""
        assert self.behavior_log_prob is not None, "declare behavior in Objective.needs"
        return (self.log_prob_w - self.behavior_log_prob).clamp(max=LARGEST_EXPONENT).exp()

    @property
    def margin(self) -> Tensor:
        """Return the log-ratio of the winner minus that of the loser [B]."""
        return torch.subtract(*self.log_ratios)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rewards(_Checked):
    """Hold the rewards of B pictures that the policy drew, differentiable in its weights."""

    reward: Tensor  # [B], with gradient
    statistic: Tensor | None = None  # [], of the whole batch: see Objective.statistic


# What an objective may ask of the engine: frozen passes, more functions of the predictions, more of the data.
NEEDS = frozenset(
    {
        "reference",
        "behavior",
        "mismatched",
        "drift",
        "residual_product",
        "preference",
        "image_captions",
        "advantages",
        "progress",
    }
)

ErrorsT = TypeVar("ErrorsT", PairErrors, SingleErrors, ListErrors, Transitions, Rewards)


# What the examples of a layout are called.
UNITS = {"pair": "pairs", "single": "images", "list": "lists", "transition": "transitions", "reward": "drawn images"}


class Objective(ABC, Generic[ErrorsT]):
    """State one method: the fields are its hyperparameters, `loss` is its equation.

    A subclass is a frozen, keyword-only dataclass in a file of its own. Every field has a default (the docstring says
    whose) and a range checked in `__post_init__`. Objectives that are logistic in a logit also offer `logit(errors)`.
    """

    needs: ClassVar[frozenset[str]]  # what the engine must supply, of NEEDS
    layout: ClassVar[Literal["pair", "single", "list", "transition", "reward"]]  # which container `loss` takes
    chosen_only: ClassVar[bool] = False  # layout "single": of a preference pair, take the winner alone
    noising: ClassVar[str] = "shared"  # how the paper makes (xt, target): of vocabulary.NOISINGS
    rollout: ClassVar[str] = "step_pairs"  # how the paper samples: of ROLLOUTS, or for rewards of BACKPROPAGATIONS

    @abstractmethod
    def loss(self, errors: ErrorsT) -> Tensor:
        """Return the loss of every example [B], unreduced: the trainer takes the mean over the global batch."""

    def statistic(self, errors: ErrorsT) -> Tensor | None:
        """Return a scalar, without gradient, that couples the examples of a batch; None: they are independent.

        The engine averages it over processes and hands it to `loss` as `errors.statistic`; a `loss` called without one
        takes that of the batch it is given.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class ScaledMargin(Objective[PairErrors]):
    """Share what the DPO family has in common: a loss that is a function of logit = beta/2 * margin."""

    needs: ClassVar[frozenset[str]] = frozenset({"reference"})
    layout: ClassVar[Literal["pair", "single", "list", "transition"]] = "pair"

    beta: float = 5000.0  # strength of the KL anchor, > 0; larger stays closer to the reference

    def __post_init__(self) -> None:
        check_number("beta", self.beta, above=0.0)

    def logit(self, errors: PairErrors) -> Tensor:
        """Return beta/2 * margin [B]: the log-odds given to the label, exactly 0 where policy and reference agree."""
        return self.beta / 2 * errors.margin

    def rewards(self, errors: PairErrors) -> tuple[Tensor, Tensor]:
        """Return the implicit rewards beta/2 * (reference - policy) of winner and loser, [B] each."""
        log_ratio_w, log_ratio_l = errors.log_ratios
        return self.beta / 2 * log_ratio_w, self.beta / 2 * log_ratio_l


@dataclass(frozen=True, kw_only=True)
class RawMargin(Objective[PairErrors]):
    """Share what SimPO and CPO have in common: logit = beta/2 * (policy_l - policy_w), and no reference."""

    needs: ClassVar[frozenset[str]] = frozenset()
    layout: ClassVar[Literal["pair", "single", "list", "transition", "reward"]] = "pair"

    beta: float = 500.0  # scale of the errors, > 0

    def __post_init__(self) -> None:
        check_number("beta", self.beta, above=0.0)

    def logit(self, errors: PairErrors) -> Tensor:
        """Return beta/2 * (policy_l - policy_w) [B]."""
        return self.beta / 2 * errors.raw_margin


@dataclass(frozen=True, kw_only=True)
class ClippedRatios(Objective[Transitions]):
    """Share what SPO and D3PO have in common: DPO on single transitions, with ratios clipped as in PPO.

    A side whose ratio has left [1 - ratio_clip, 1 + ratio_clip] gets no gradient.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"reference"})
    layout: ClassVar[Literal["pair", "single", "list", "transition"]] = "transition"

    beta: float = 10.0
    ratio_clip: float = 0.1

    def __post_init__(self) -> None:
        check_number("beta", self.beta, above=0.0)
        check_number("ratio_clip", self.ratio_clip, above=0.0, below=1.0)

    def logit(self, transitions: Transitions) -> Tensor:
        """Return label * beta * (log r_w - log r_l) [B] of the clipped ratios r."""
        # log clamp(exp(d)) = clamp(d): no overflow, and the same gradient.
        low, high = math.log1p(-self.ratio_clip), math.log1p(self.ratio_clip)
        log_ratio_w, log_ratio_l = (ratio.clamp(low, high) for ratio in transitions.log_ratios)
        logit = self.beta * (log_ratio_w - log_ratio_l)
        return logit if transitions.label is None else transitions.label * logit

    def loss(self, transitions: Transitions) -> Tensor:
        """Return -log sigmoid(logit) of every pair [B]."""
        return -F.logsigmoid(self.logit(transitions))
