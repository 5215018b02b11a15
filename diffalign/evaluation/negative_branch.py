"""Diffusion-NPO at sampling time: another network evaluates the unconditional branch of guidance.

eps       = eps_neg(xt, empty) + guidance_scale * (eps_pos(xt, prompt) - eps_neg(xt, empty))
theta_neg = theta_0 + policy_scale * (theta_pos - theta_0) + negative_scale * (theta_npo - theta_0)

Wang et al. 2025, arXiv:2505.11245; the scales are its alpha and beta (`1 - merge_weight` and 1 in the authors' code).
The pipeline does the first line as ever: its denoiser (UNet or transformer) is replaced by one that sends each half of
the batch to its network, or each call, where the pipeline evaluates one branch after the other. Of flow models eps is
the velocity.

Memory: a LoRA costs its own weights, as both networks are one whose adapters are switched between the halves. Only a
full negative network, or a full policy with a policy_scale other than 1, takes a second one.
"""

import copy
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from diffalign.backbones.adapters import activate, active_adapters, adapter_mix
from diffalign.backbones.base import TEXT_ENCODERS, present
from diffalign.backbones.export import load_adapter_into
from diffalign.backbones.families import PIPELINES, denoiser_of, has_unconditional_branch, pipeline_kind, with_denoiser
from diffalign.errors import ModelError, UserError

Load = Callable[[DiffusionPipeline, str], DiffusionPipeline]


class NegativeBranch(nn.Module):
    """Stand in for a pipeline's denoiser: half of the batch goes to the negative network, the rest to the own.

    Everything else that a pipeline asks of its denoiser (config, dtype, ...) is answered by the positive network.
    """

    def __init__(
        self,
        positive: nn.Module,
        negative: nn.Module,
        positive_adapters: dict[str, float],
        negative_adapters: dict[str, float],
        pipeline: DiffusionPipeline,
    ):
        """Take networks, which may be one, the factor of each adapter that acts in a branch, and who will call."""
        super().__init__()
        self.networks = nn.ModuleList([positive] if negative is positive else [positive, negative])
        branches = (
            (negative, adapter_mix(negative, negative_adapters)),
            (positive, adapter_mix(positive, positive_adapters)),
        )
        self._branches = branches[::-1] if PIPELINES[type(pipeline).__name__].prompt_first else branches
        self._negative, self._positive = branches
        kind = pipeline_kind(pipeline)
        self._separate, self._silent = kind.separate_branches, kind.silent_guidance
        self._timestep: Tensor | None = None  # of a call with the prompt, after which one without it is due
        self._pipeline = weakref.ref(pipeline)
        self._context: str | None = None
        self._last = ""  # the branch that was asked for last

    def __getattr__(self, name: str) -> Any:
        """Answer for the positive network."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "networks":
                raise
            return getattr(self.networks[0], name)

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Take what is asked inside for one branch: pipelines that ask for each apart call them "cond", "uncond".

        Raises:
            ModelError: the branch without the prompt was left out after the one with it.
        """
        if self._separate and name == self._last == "cond":
            self._last = ""
            raise _no_guidance("1 or less")
        before, self._context, self._last = self._context, name, name
        try:
            with self.networks[0].cache_context(name):
                yield
        except BaseException:
            self._last = ""
            raise
        finally:
            self._context = before

    def forward(self, *args: Any, return_dict: bool = True, **options: Any) -> UNet2DConditionOutput | tuple[Tensor]:
        """Return the prediction [2N,C,h,w] for latents [2N,C,h,w], the halves in the order of the family's pipeline.

        Lists of 2N latents become lists of 2N predictions. Of pipelines that ask for each branch apart, these are N of
        the branch that the context says.

        Latents are the first argument, or the first by name: `sample` of UNets, `hidden_states` of transformers.

        Raises:
            ModelError: the pipeline does not guide, so that there is no half to be evaluated by the negative network.
        """
        latents = next(iter([*args, *options.values()]))
        prompted = self._has_prompt(options.get("timestep"), latents)
        if prompted is not None:
            network, mixed = self._positive if prompted else self._negative
            with mixed():
                return network(*args, **options, return_dict=return_dict)
        size = len(latents)
        predictions = []
        for half, (network, mixed) in enumerate(self._branches):
            with mixed():
                inputs = _half(args, half, size), _half(options, half, size)
                predictions.append(network(*inputs[0], **inputs[1], return_dict=False)[0])
        listed = isinstance(predictions[0], list)
        prediction = [entry for half in predictions for entry in half] if listed else torch.cat(predictions)
        return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)

    def _has_prompt(self, timestep: Tensor | None, latents: Tensor | list[Tensor]) -> bool | None:
        """Tell whether a call is of the prompts alone, None if of both branches.

        The pipeline says so, or of the two calls at a timestep it is the first.

        Raises:
            ModelError: the pipeline does not guide: it says so, or its latents are not there twice.
        """
        pipeline = self._pipeline()
        if not getattr(pipeline, "do_classifier_free_guidance", True):  # Qwen-Image's and PixArt's do not tell
            raise _no_guidance(pipeline.guidance_scale)
        if self._context in ("cond", "uncond"):
            return self._context == "cond"
        if self._separate:
            first = timestep is not self._timestep
            self._timestep = timestep if first else None
            return first
        if self._silent and (len(latents) % 2 or not torch.equal(*latents.chunk(2))):
            raise _no_guidance("1 or less")
        return None


def with_negative_branch(
    pipeline: DiffusionPipeline,
    source: str | Path,
    *,
    negative_scale: float = 1.0,
    policy_scale: float = 1.0,
    base: nn.Module | None = None,
    source_base: Callable[[], nn.Module] | None = None,
    load: Load = load_adapter_into,
) -> DiffusionPipeline:
    """Return a pipeline that draws as `pipeline` does, guided away from the network trained to prefer the worse.

    It shares all modules with `pipeline`, which goes on drawing as before.

    Args:
        pipeline: of any family; its denoiser is theta_pos, with or without LoRAs.
        source: theta_npo, a LoRA or a denoiser as `load` takes it.
        negative_scale: beta >= 0, of what NPO has learnt.
        policy_scale: alpha >= 0, of what the policy has learnt.
        base: theta_0 of a policy that was trained as a whole; by default the policy without its LoRAs.
        source_base: returns what a full network in `source` was trained from, if not `base`; a LoRA goes on any model.
        load: puts `source` into a pipeline and returns it.

    Raises:
        UserError: a scale that is no number from 0 up.
        ModelError: `source` cannot be loaded, does not fit, or trains text encoders, which both branches share; or the
            pipeline has no unconditional branch.
    """
    check_scales(negative_scale=negative_scale, policy_scale=policy_scale)
    if not has_unconditional_branch(pipeline):
        raise ModelError(
            f"A {type(pipeline).__name__} is told its guidance_scale and predicts nothing without a prompt: there is "
            "no branch for a negative network. Leave --negative-lora out."
        )
    policy = denoiser_of(pipeline)
    if isinstance(policy, NegativeBranch):
        raise ModelError("This pipeline has a negative branch already. Start from the pipeline it was made from.")
    own = active_adapters(policy)
    npo, new = _load(pipeline, source, load)
    negative = policy
    base = policy if base is None else base
    if npo is not None or (base is not policy and policy_scale != 1):
        other = None if npo is None else (npo, base if source_base is None else source_base())
        negative = _merged(policy, base, other, policy_scale, negative_scale)
    mix = dict.fromkeys(own, policy_scale) | dict.fromkeys(new, negative_scale)
    result = copy.copy(pipeline)
    branch = NegativeBranch(policy, negative, dict.fromkeys(own, 1.0), mix, result)
    return with_denoiser(result, branch.eval().requires_grad_(False))


def negative_weights(
    policy: Tensor, base: Tensor, npo: Tensor, npo_base: Tensor, policy_scale: float, negative_scale: float
) -> Tensor:
    """Return theta_neg, float32: base + policy_scale * (policy - base) + negative_scale * (npo - npo_base).

    Summed from `policy`, so that scales of 1 and 0, or differences of 0, give `policy` to the last bit.
    """
    policy, base, npo, npo_base = policy.float(), base.float(), npo.float(), npo_base.float()
    return policy + (policy_scale - 1) * (policy - base) + negative_scale * (npo - npo_base)


def _no_guidance(scale: object) -> ModelError:
    return ModelError(
        f"The negative branch needs guidance: guidance_scale must be above 1, got {scale}. 5 to 7.5 is usual."
    )


def check_scales(**scales: float) -> None:
    """Raise UserError for scales no network can be made with."""
    for name, value in scales.items():
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"{name} must be a number of at least 0, got {value}. 1 is usual, 0 leaves the part out.")


def _load(pipeline: DiffusionPipeline, source: str | Path, load: Load) -> tuple[nn.Module | None, list[str]]:
    """Return a full network, or None and the names of new adapters in the pipeline's, which do not act there yet."""
    policy = denoiser_of(pipeline)
    encoders = present(pipeline.components, TEXT_ENCODERS)
    own, before, before_encoders = active_adapters(policy), _adapters(policy), _adapters(*encoders)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second LoRA is what we want
        npo = denoiser_of(load(pipeline, str(source)))
    with_denoiser(pipeline, policy)
    activate(policy, own)
    if new := _adapters(*encoders) - before_encoders:
        pipeline.delete_adapters(sorted(new))
        raise ModelError(
            f'The LoRA "{source}" trains text encoders, which both branches share. Give one of the denoiser only.'
        )
    return (None, sorted(_adapters(policy) - before)) if npo is policy else (npo, [])


def _adapters(*modules: nn.Module | None) -> set[str]:
    return {name for module in modules for name in getattr(module, "peft_config", {})}


def _merged(
    policy: nn.Module,
    base: nn.Module,
    other: tuple[nn.Module, nn.Module] | None,
    policy_scale: float,
    negative_scale: float,
) -> nn.Module:
    """Return a copy of `policy`, adapters included, whose own weights are those of theta_neg."""
    bases = _own_weights(base)
    npo, npo_bases = (_own_weights(network) for network in other) if other else (bases, bases)
    merged = copy.deepcopy(policy)
    for name, weight in _own_weights(merged).items():
        parts = (source[name].detach().to(weight.device) for source in (bases, npo, npo_bases))
        weight.data.copy_(negative_weights(weight.detach(), *parts, policy_scale, negative_scale))
    return merged


def _own_weights(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are no adapter's, under the names they have without adapters."""
    named = network.named_parameters()
    return {name.replace(".base_layer.", "."): weight for name, weight in named if ".lora_" not in name}


def _half(value: Any, half: int, size: int) -> Any:
    """Return the entries of one half wherever `value` has one for each of the `size` in the batch."""
    if isinstance(value, Tensor):
        return value.chunk(2)[half] if value.ndim and len(value) == size else value
    if isinstance(value, list) and len(value) == size:
        return value[half * size // 2 : (half + 1) * size // 2]
    if isinstance(value, dict):
        return {key: _half(entry, half, size) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_half(entry, half, size) for entry in value)
    return value
