"""One denoising step: predictions of the networks, and the errors that objectives are functions of."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from diffalign.denoising.frozen import FrozenDenoiser, Predict
from diffalign.denoising.noising import DenoisingBatch
from diffalign.objectives.base import PairErrors, SingleErrors


@dataclass(frozen=True, kw_only=True, eq=False)
class DenoisingOutputs:
    """Hold the predictions for a DenoisingBatch of N, float32."""

    policy: Tensor  # [N,C,H,W], with gradient
    reference: Tensor | None = None  # [N,C,H,W]
    behavior: Tensor | None = None  # [N,C,H,W], of the network that produced the samples


def denoising_step(
    predict: Predict, denoiser: nn.Module, batch: DenoisingBatch, cond: Any, reference: FrozenDenoiser | None = None
) -> DenoisingOutputs:
    """Predict with the policy, and with the reference if there is one; `cond` holds the conditioning of all N.

    The reference comes first: during its pass no activations of the policy are kept for the backward pass, so the peak
    of memory is that of the policy alone.
    """
    frozen = reference(batch.xt, batch.timesteps, cond) if reference is not None else None
    return DenoisingOutputs(policy=predict(denoiser, batch.xt, batch.timesteps, cond).float(), reference=frozen)


def errors(outputs: DenoisingOutputs, batch: DenoisingBatch) -> tuple[Tensor, Tensor | None]:
    """Return the policy's and the reference's error of every image: [N] float32, [N] float32 or None."""
    reference = _error(outputs.reference, batch.target) if outputs.reference is not None else None
    return _error(outputs.policy, batch.target), reference


def pair_errors(outputs: DenoisingOutputs, batch: DenoisingBatch, preference: Tensor | None = None) -> PairErrors:
    """Return the errors of B pairs from a batch of 2B; `preference` [B] is handed on."""
    policy, reference = errors(outputs, batch)
    policy_w, policy_l = policy.chunk(2)
    reference_w, reference_l = reference.chunk(2) if reference is not None else (None, None)
    return PairErrors(
        policy_w=policy_w,
        policy_l=policy_l,
        reference_w=reference_w,
        reference_l=reference_l,
        preference=preference,
    )


def single_errors(outputs: DenoisingOutputs, batch: DenoisingBatch, desirable: Tensor | None = None) -> SingleErrors:
    """Return the errors of N images that belong to no pair; `desirable` [N] bool is handed on."""
    policy, reference = errors(outputs, batch)
    return SingleErrors(policy=policy, reference=reference, desirable=desirable)


def _error(pred: Tensor, target: Tensor) -> Tensor:
    """Return the mean over C, H, W of (pred - target)^2: [N,C,H,W] -> [N].

    float32 from here on: in bfloat16 the squares alone would move a DPO logit at beta 5000 by 0.5.
    """
    return (pred.float() - target).square().flatten(1).mean(1)
