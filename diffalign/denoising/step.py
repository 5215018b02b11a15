"""One denoising step: predictions of the networks, and the errors that objectives are functions of."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from diffalign.denoising.frozen import FrozenDenoiser, Predict
from diffalign.denoising.kernels import squared_errors
from diffalign.denoising.noising import DenoisingBatch
from diffalign.objectives.base import ListErrors, PairErrors, SingleErrors


@dataclass(frozen=True, kw_only=True, eq=False)
class DenoisingOutputs:
    """Hold the predictions for a DenoisingBatch of N, in the dtype their network gives them."""

    policy: Tensor  # [N,C,H,W], with gradient
    reference: Tensor | None = None  # [N,C,H,W]
    reference_error: Tensor | None = None  # [N], unweighted, in the place of `reference` where only errors are known
    behavior: Tensor | None = None  # [N,C,H,W], of the network that produced the samples


def denoising_step(
    predict: Predict, denoiser: nn.Module, batch: DenoisingBatch, cond: Any, reference: FrozenDenoiser | None = None
) -> DenoisingOutputs:
    """Predict with the policy, and with the reference if there is one; `cond` holds the conditioning of all N.

    The reference comes first: during its pass no activations of the policy are kept for the backward pass, so the peak
    of memory is that of the policy alone.
    """
    if reference is None:
        return DenoisingOutputs(policy=predict(denoiser, batch.xt, batch.timesteps, cond))
    frozen = reference(batch.xt, batch.timesteps, cond, share=True)
    with reference.shared():
        return DenoisingOutputs(policy=predict(denoiser, batch.xt, batch.timesteps, cond), reference=frozen)


def errors(
    outputs: DenoisingOutputs, batch: DenoisingBatch, weight: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the policy's and the reference's error of every image: [N] float32, [N] float32 or None.

    `weight` [N] multiplies the errors; objectives see the weighted ones.
    """
    policy, reference = squared_errors(outputs.policy, batch.target, outputs.reference)
    reference = outputs.reference_error if reference is None else reference
    return _weighted(policy, weight), None if reference is None else _weighted(reference, weight)


def pair_errors(
    outputs: DenoisingOutputs,
    batch: DenoisingBatch,
    preference: Tensor | None = None,
    *,
    needs: Collection[str] = (),
    weight: Tensor | None = None,
) -> PairErrors:
    """Return the errors of B pairs from a batch of 2B; `preference` [B] is handed on.

    Of `needs`, "drift" and "residual_product" are computed here.
    """
    policy, reference = errors(outputs, batch, weight)
    policy_w, policy_l = policy.chunk(2)
    reference_w, reference_l = reference.chunk(2) if reference is not None else (None, None)
    drift_w, drift_l = drift(outputs, weight).chunk(2) if "drift" in needs else (None, None)
    product = None
    if "residual_product" in needs:
        product = _weighted(_residual_product(outputs, batch), None if weight is None else weight.chunk(2)[0])
    return PairErrors(
        policy_w=policy_w,
        policy_l=policy_l,
        reference_w=reference_w,
        reference_l=reference_l,
        preference=preference,
        drift_w=drift_w,
        drift_l=drift_l,
        residual_product=product,
    )


def single_errors(
    outputs: DenoisingOutputs,
    batch: DenoisingBatch,
    desirable: Tensor | None = None,
    *,
    mismatched: DenoisingOutputs | None = None,
    weight: Tensor | None = None,
) -> SingleErrors:
    """Return the errors of N images that belong to no pair; `desirable` [N] bool is handed on.

    `mismatched`: predictions under another example's prompt, without gradient.
    """
    policy, reference = errors(outputs, batch, weight)
    swapped = errors(mismatched, batch, weight) if mismatched is not None else (None, None)
    return SingleErrors(
        policy=policy,
        reference=reference,
        desirable=desirable,
        mismatched_policy=swapped[0],
        mismatched_reference=swapped[1],
    )


def list_errors(
    outputs: DenoisingOutputs, batch: DenoisingBatch, scores: Tensor, *, weight: Tensor | None = None
) -> ListErrors:
    """Return the errors of B lists of k images from a batch of k*B; `scores` [B,k] are handed on."""
    policy, reference = errors(outputs, batch, weight)
    images = scores.shape[1]
    by_list = [None if error is None else error.view(images, -1).T for error in (policy, reference)]
    return ListErrors(policy=by_list[0], reference=by_list[1], scores=scores)


def drift(outputs: DenoisingOutputs, weight: Tensor | None = None) -> Tensor:
    """Return the mean of (policy - reference)^2 of every image [N], with gradient to the policy."""
    assert outputs.reference is not None, "drift is measured from the reference: declare it in Objective.needs"
    return _weighted(squared_errors(outputs.policy, outputs.reference)[0], weight)


def _residual_product(outputs: DenoisingOutputs, batch: DenoisingBatch) -> Tensor:
    """Return the mean of (policy_w - target_w)(policy_l - target_l) of B pairs [B] float32, with gradient."""
    residual_w, residual_l = (outputs.policy.float() - batch.target).chunk(2)
    return (residual_w * residual_l).flatten(1).mean(1)


def _weighted(error: Tensor, weight: Tensor | None) -> Tensor:
    return error if weight is None else error * weight
