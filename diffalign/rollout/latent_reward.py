"""LPO's latent reward model (Zhang et al. 2025, arXiv 2502.01051): a judge of noisy latents, without a decoder.

A UNet's encoder with text encoders, fine-tuned from a base model. With the pools p_i (global averages) of the last
layer of each level i before it is downsampled, and m that of the middle block,

    e_image = W [p_1(c), ..., p_L(c), m() + w (m(c) - m())],   e_text = V pooled(c),   w = 7.5, () the empty prompt
    score = exp(logit_scale) * <e_image, e_text> / (|e_image| |e_text|)

The folder is the authors' (Kwai-Kolors/LPO): unet/, text_encoder/ (SDXL: text_encoder_2/ too; where a folder is absent
the base's encoder stands in) and state_dict.pt with visual_projection.weight, logit_scale and, for SD1.5 and SD2.1,
text_projection.weight; SDXL's V is the second encoder's own.
"""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.backbones import loading
from diffalign.backbones.base import Backbone, Conditioning
from diffalign.backbones.files import check_weights, load_errors
from diffalign.errors import ModelError
from diffalign.rollout.prompts import PromptEncoder

HEADS = "state_dict.pt"
GUIDANCE = 7.5  # of the middle block's features, as the authors train it


class LatentReward:
    """Score noisy latents at their timesteps; a `StepScorer` that needs neither predictions nor pictures.

    Args:
        backbone: the base's parts with the reward's own UNet encoder and text encoders.
        heads: visual_projection, and text_projection where the family's text encoder has none.
        logit_scale: its logarithm [].
        resolution: of the pictures, in pixels; SDXL is told.
        batch_size: latents scored at a time.
    """

    reads_prediction = False
    scale = 1.0

    def __init__(self, backbone: Backbone, heads: nn.ModuleDict, logit_scale: Tensor, resolution: int, batch_size: int):
        self.backbone, self.batch_size = backbone, batch_size
        self.heads, self.logit_scale = heads.requires_grad_(False), logit_scale
        backbone.denoiser.requires_grad_(False).eval()
        self._levels = _keep_levels(backbone.denoiser)
        self._encode = PromptEncoder(backbone, resolution)

    @classmethod
    def load(cls, folder: Path, base: Backbone, device: torch.device, resolution: int, batch_size: int = 32) -> Self:
        """Load the authors' folder for a policy that was trained from `base`.

        Raises:
            ModelError: a part is missing, damaged or of another family.
        """
        state = _read_heads(folder / HEADS)
        backbone = type(base)(
            denoiser=_encoder_of(loading.load_unet(folder / "unet", torch.float32)).to(device),
            vae=base.vae,
            tokenizers=base.tokenizers,
            text_encoders=[
                _text_encoder(folder, i, encoder).to(device) for i, encoder in enumerate(base.text_encoders)
            ],
            scheduler=base.scheduler,
            source=str(folder),
            options={"force_zeros_for_empty_prompt": False},  # the authors encode "", for SDXL too
        )
        heads = nn.ModuleDict({name: _linear(weight) for name, weight in state.items() if name != "logit_scale"})
        if wrong := _misfit(backbone, heads):
            raise ModelError(f"{folder} does not fit together: {wrong}. Use a reward model of this base's family.")
        return cls(backbone, heads.to(device), state["logit_scale"].to(device), resolution, batch_size)

    @torch.no_grad()
    def __call__(self, latents: Tensor, prompts: Sequence[str], timesteps: Tensor) -> Tensor:
        """Return scores [1,N] float32 of noisy latents [N,C,h,w] at timesteps [N]."""
        parts = torch.arange(len(latents), device=latents.device).split(self.batch_size)
        scores = [self._score(latents[rows], [prompts[row] for row in rows], timesteps[rows]) for rows in parts]
        return torch.cat(scores)[None]

    def _score(self, latents: Tensor, prompts: list[str], timesteps: Tensor) -> Tensor:
        batch, count = self._encode(prompts, latents.device), len(latents)
        empty = batch.empty.select(torch.zeros(count, dtype=torch.int64, device=latents.device))
        both = type(batch.cond).cat([batch.cond, empty])
        middle = self.backbone.predict(self.backbone.denoiser, torch.cat([latents] * 2), timesteps.repeat(2), both)
        with_prompt, without = _pool(middle).chunk(2)
        features = [*(_pool(level)[:count] for level in self._levels), without + GUIDANCE * (with_prompt - without)]
        self._levels.clear()
        image = F.normalize(self.heads["visual_projection"](torch.cat(features, dim=1)), dim=1)
        text = F.normalize(self._text(prompts, batch.cond), dim=1)
        return self.logit_scale.exp() * (image * text).sum(1)

    def _text(self, prompts: list[str], cond: Conditioning) -> Tensor:
        """Return the text embeddings [N,D], not normalised."""
        if cond.pooled_prompt_embeds is not None:
            return cond.pooled_prompt_embeds.float()
        encoder, tokenizer = self.backbone.text_encoders[0], self.backbone.tokenizers[0]
        length = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
        tokens = tokenizer(prompts, return_tensors="pt", **length).input_ids.to(encoder.device)
        return self.heads["text_projection"](encoder(tokens).pooler_output.float())


def _encoder_of(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Cut a UNet after its middle block: what it returns is that block's features."""
    unet.up_blocks = nn.ModuleList()
    unet.conv_norm_out, unet.conv_out = None, nn.Identity()
    return unet


def _keep_levels(unet: UNet2DConditionModel) -> list[Tensor]:
    """Return a list to which every pass adds the last features of each level before they are downsampled."""
    levels: list[Tensor] = []
    for block in unet.down_blocks:
        last = len(block.resnets) - 1
        block.register_forward_hook(lambda _, __, output, last=last: levels.append(output[1][last]))
    return levels


def _pool(features: Tensor) -> Tensor:
    """Return the averages [N,C] of features [N,C,h,w]."""
    return features.float().mean((2, 3))


def _linear(weight: Tensor) -> nn.Linear:
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    head.weight = nn.Parameter(weight.float())
    return head


def _text_encoder(folder: Path, index: int, base: Any) -> nn.Module:
    """Return the reward's own text encoder, or the base's where it has none."""
    own = folder / ("text_encoder" if index == 0 else f"text_encoder_{index + 1}")
    if not own.is_dir():
        return base
    check_weights(own)
    with load_errors(f"the {own.name}", str(folder)):
        return type(base).from_pretrained(own, use_safetensors=True)


def _read_heads(file: Path) -> dict[str, Tensor]:
    """Return the projections' weights and logit_scale by name."""
    if not file.is_file():
        raise ModelError(
            f"There is no {file}. Name a folder of LPO's reward model with unet/ and {HEADS}, such as casiatao/LRM's."
        )
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        heads = {name: state[name]["weight"] for name in ("visual_projection", "text_projection") if name in state}
        return {"visual_projection": heads["visual_projection"], **heads, "logit_scale": state["logit_scale"].float()}
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{file} holds no heads of a latent reward model ({type(error).__name__}: {reason}). Expected "
            "visual_projection, logit_scale and for SD1.5 text_projection. Download it again."
        ) from error


def _misfit(backbone: Backbone, heads: nn.ModuleDict) -> str | None:
    """Return what does not fit, or None."""
    channels = backbone.denoiser.config.block_out_channels
    found, wanted = heads["visual_projection"].in_features, sum(channels) + channels[-1]
    if found != wanted:
        return f"visual_projection takes {found} features, the UNet's levels {list(channels)} and middle give {wanted}"
    if backbone.family != "sdxl" and "text_projection" not in heads:
        return f"{HEADS} has no text_projection, which {backbone.family} needs"
    return None
