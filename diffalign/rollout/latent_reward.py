"""LPO's latent reward model (Zhang et al. 2025, arXiv 2502.01051): a judge of noisy latents, without a decoder.

A UNet's encoder with text encoders, fine-tuned from a base model. With the pools p_i (global averages) of the last
layer of each level i before it is downsampled, and m that of the middle block,

    e_image = W [p_1(c), ..., p_L(c), m() + w (m(c) - m())],   e_text = V pooled(c),   w = 7.5, () the empty prompt
    score = exp(logit_scale) * <e_image, e_text> / (|e_image| |e_text|)

The folder is the authors' (Kwai-Kolors/LPO): unet/, of which the decoder may be left out, text_encoder/ (SDXL:
text_encoder_2/ too; where a folder is absent the base's encoder stands in) and state_dict.pt or heads.safetensors with
visual_projection.weight, logit_scale and, for SD1.5 and SD2.1, text_projection.weight; SDXL's V is the second encoder's
own. `diffalign reward train lrm` makes one.
"""

import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.backbones.base import Backbone
from diffalign.backbones.conditioning import Conditioning
from diffalign.backbones.files import check_weights, load_errors, write_atomically
from diffalign.backbones.unet_encoder import cut, load_encoder
from diffalign.denoising import NoisePath, ends_in_noise, ladder
from diffalign.errors import ModelError
from diffalign.rollout.prompts import conditioning

HEADS, OFFICIAL_HEADS = "heads.safetensors", "state_dict.pt"
GUIDANCE = 7.5  # of the middle block's features, as the authors train it
INITIAL_LOGIT_SCALE = 2.6592  # CLIP's, log(1 / 0.07)
JUDGED_STEPS = 20  # of the sampler whose latents are judged
VALIDATED = (0, 5, 10, 14, 19)  # of its levels: for SD1.5 and SDXL the timesteps 1, 251, 501, 701 and 951
_NOT_NESTED = (KeyError, TypeError, AttributeError)  # what other contents raise when they are read as heads


class LatentReward:
    """Score noisy latents at their timesteps; a `StepScorer` that needs neither predictions nor pictures.

    Args:
        backbone: the base's parts with the reward's own UNet encoder and text encoders.
        heads: the weights of visual_projection and, where the family's text encoder has none, of text_projection.
        logit_scale: its logarithm [].
        resolution: of the pictures, in pixels; SDXL is told.
        batch_size: latents scored at a time.

    Raises:
        ModelError: the heads do not fit the backbone.
    """

    reads_prediction = False
    scale = 1.0

    def __init__(
        self, backbone: Backbone, heads: Mapping[str, Tensor], logit_scale: Tensor, resolution: int, batch_size: int
    ):
        if wrong := _misfit(backbone, heads):
            raise ModelError(f"{backbone.source} does not fit together: {wrong}. Use parts of one model family.")
        self.backbone, self.resolution, self.batch_size = backbone, resolution, batch_size
        self.validated_at = tuple(judged_levels(backbone.path)[list(VALIDATED)].tolist())
        self.module = nn.Module()  # all that can be trained
        self.module.unet = backbone.denoiser
        self.module.text_encoders = nn.ModuleList(backbone.text_encoders)
        self.module.heads = nn.ModuleDict({name: _linear(weight) for name, weight in heads.items()})
        self.module.logit_scale = nn.Parameter(logit_scale.float().reshape(()))
        self.module.requires_grad_(False).eval()
        self._levels = _keep_levels(backbone.denoiser)

    @classmethod
    def load(cls, folder: Path, base: Backbone, device: torch.device, resolution: int, batch_size: int = 32) -> Self:
        """Load the authors' folder for a policy that was trained from `base`.

        Raises:
            ModelError: a part is missing, damaged or of another family.
        """
        heads = _read_heads(folder)
        logit_scale = heads.pop("logit_scale")
        encoders = [_text_encoder(folder, i, encoder) for i, encoder in enumerate(base.text_encoders)]
        backbone = _with_parts(base, load_encoder(folder / "unet"), encoders, str(folder))
        return cls(backbone, heads, logit_scale, resolution, batch_size).to(device)

    @classmethod
    def start(cls, base: Backbone, text_projection: Tensor | None, seed: int, batch_size: int = 32) -> Self:
        """Begin one from `base`, whose denoiser and text encoders it takes over: the decoder is cut off.

        Source: SD15PreferenceModel and SDXLBasePreferenceModel of Kwai-Kolors/LPO @9c2e8b8.

        Args:
            text_projection: [P,D], for a family whose text encoder has none: that of the CLIP it was taken from.
            seed: of visual_projection, drawn from N(0, 0.02^2).
        """
        resolution = base.native_resolution
        projections = {} if text_projection is None else {"text_projection": text_projection}
        width = base.text_encoders[-1].config.projection_dim if text_projection is None else len(text_projection)
        drawn = torch.randn(width, _features(base.denoiser), generator=torch.Generator().manual_seed(seed))
        backbone = _with_parts(base, cut(base.denoiser), base.text_encoders, base.source)
        scale = torch.tensor(INITIAL_LOGIT_SCALE)
        return cls(backbone, {"visual_projection": 0.02 * drawn, **projections}, scale, resolution, batch_size)

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return self.module.logit_scale.device

    @property
    def logit_scale(self) -> Tensor:
        """Return exp(logit_scale), float32 []."""
        return self.module.logit_scale.float().exp()

    @property
    def source(self) -> str:
        """Return where the weights came from."""
        return self.backbone.source

    def to(self, device: torch.device) -> Self:
        """Move the weights and return self."""
        self.module.to(device)
        return self

    @torch.no_grad()
    def __call__(self, latents: Tensor, prompts: Sequence[str], timesteps: Tensor) -> Tensor:
        """Return scores [1,N] float32 of noisy latents [N,C,h,w] at timesteps [N]."""
        parts = torch.arange(len(latents), device=latents.device).split(self.batch_size)
        scores = [self._score(latents[rows], [prompts[row] for row in rows], timesteps[rows]) for rows in parts]
        return torch.cat(scores)[None]

    def _score(self, latents: Tensor, prompts: list[str], timesteps: Tensor) -> Tensor:
        image, text = self.embed(latents, prompts, timesteps)
        return self.logit_scale * (image * text).sum(1)

    def embed(self, latents: Tensor, prompts: Sequence[str], timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return unit image and text embeddings [N,D] float32 of noisy latents [N,C,h,w], with gradients."""
        count = len(latents)
        told = [*prompts, *[""] * count]  # the authors encode "" for SDXL too
        cond = conditioning(self.backbone, told, self.resolution).to(self.device)
        middle = self.backbone.predict(self.backbone.denoiser, torch.cat([latents] * 2), timesteps.repeat(2), cond)
        with_prompt, without = _pool(middle).chunk(2)
        features = [*(_pool(level)[:count] for level in self._levels), without + GUIDANCE * (with_prompt - without)]
        self._levels.clear()
        image = self.module.heads["visual_projection"](torch.cat(features, dim=1))
        text = self._text(prompts, cond)
        return F.normalize(image.float(), dim=1), F.normalize(text.float(), dim=1)

    def _text(self, prompts: Sequence[str], cond: Conditioning) -> Tensor:
        """Return the text embeddings [N,D], not normalised."""
        if "pooled_prompt_embeds" in cond.columns:
            return cond["pooled_prompt_embeds"][: len(prompts)]
        encoder, tokenizer = self.backbone.text_encoders[0], self.backbone.tokenizers[0]
        length = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
        tokens = tokenizer(list(prompts), return_tensors="pt", **length).input_ids.to(self.device)
        return self.module.heads["text_projection"](encoder(tokens).pooler_output)

    def save(self, directory: Path) -> Path:
        """Write the folder that `load` reads, in the dtype of the weights, and return it."""
        unet = self.module.unet
        _save(unet, unet.save_config, directory / "unet" / "diffusion_pytorch_model.safetensors")
        for index, encoder in enumerate(self.module.text_encoders):
            _save(encoder, encoder.config.save_pretrained, directory / _text_folder(index) / "model.safetensors")
        heads = {f"{name}.weight": head.weight for name, head in self.module.heads.items()}
        heads["logit_scale"] = self.module.logit_scale
        write_atomically(directory / HEADS, lambda file: save_file(_on_cpu(heads), file))
        return directory


def judged_levels(path: NoisePath) -> Tensor:
    """Return the timesteps that such a judge is trained at, the cleanest first: those of 20 sampler steps [20] int64.

    At pure noise, where the last level of some schedules lies, there is nothing to judge: there they are the levels
    that the steps lead to.
    """
    rungs = ladder(path, JUDGED_STEPS)
    return (rungs.previous if ends_in_noise(path) else rungs.timesteps).flip(0)


def _save(module: nn.Module, save_config: Callable[[Path], None], file: Path) -> None:
    """Write a network's folder: its configuration and its weights in one file."""

    def write(folder: Path) -> None:
        save_config(folder)
        save_file(_on_cpu(module.state_dict()), folder / file.name, metadata={"format": "pt"})

    write_atomically(file.parent, write)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def _with_parts(base: Backbone, unet: UNet2DConditionModel, text_encoders: list[nn.Module], source: str) -> Backbone:
    """Return the base's backbone around other networks."""
    parts = {"vae": base.vae, "tokenizers": base.tokenizers, "scheduler": base.scheduler, "options": base.options}
    return type(base)(denoiser=unet, text_encoders=text_encoders, source=source, **parts)


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


def _features(unet: UNet2DConditionModel) -> int:
    """Return how many pooled features the levels and the middle block give."""
    channels = unet.config.block_out_channels
    return sum(channels) + channels[-1]


def _linear(weight: Tensor) -> nn.Linear:
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    head.weight = nn.Parameter(weight.float())
    return head


def _text_folder(index: int) -> str:
    return "text_encoder" if index == 0 else f"text_encoder_{index + 1}"


def _text_encoder(folder: Path, index: int, base: Any) -> nn.Module:
    """Return the reward's own text encoder, or the base's where it has none."""
    own = folder / _text_folder(index)
    if not own.is_dir():
        return base
    check_weights(own)
    with load_errors(f"the {own.name}", str(folder)):
        return type(base).from_pretrained(own, use_safetensors=True, dtype=torch.float32)


def _read_heads(folder: Path) -> dict[str, Tensor]:
    """Return the projections' weights and logit_scale by name."""
    file = folder / (HEADS if (folder / HEADS).is_file() else OFFICIAL_HEADS)
    if not file.is_file():
        raise ModelError(
            f"There is no {file} and no {HEADS}. Name a folder of LPO's reward model with unet/ and one of them, such "
            "as casiatao/LRM's or one that `diffalign reward train lrm` made."
        )
    try:
        state = load_file(file) if file.name == HEADS else _official_heads(file)
        heads = {"visual_projection": state["visual_projection.weight"], "logit_scale": state["logit_scale"]}
        optional = state.get("text_projection.weight")
        return heads if optional is None else heads | {"text_projection": optional}
    except (pickle.UnpicklingError, SafetensorError, EOFError, OSError, RuntimeError, *_NOT_NESTED) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{file} holds no heads of a latent reward model ({type(error).__name__}: {reason}). Expected "
            "visual_projection, logit_scale and for SD1.5 text_projection. Download or make it again."
        ) from error


def _official_heads(file: Path) -> dict[str, Tensor]:
    """Return by name what the authors nest; their logit_scale is a number."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    heads = {f"{name}.weight": state[name]["weight"] for name in state if name.endswith("_projection")}
    return heads | {"logit_scale": torch.as_tensor(state["logit_scale"])}


def _misfit(backbone: Backbone, heads: Mapping[str, Tensor]) -> str | None:
    """Return what does not fit, or None."""
    found, wanted = heads["visual_projection"].shape[1], _features(backbone.denoiser)
    if found != wanted:
        channels = list(backbone.denoiser.config.block_out_channels)
        return f"visual_projection takes {found} features, the UNet's levels {channels} and middle give {wanted}"
    if backbone.family == "sdxl":
        return None
    if "text_projection" not in heads:
        return f"there is no text_projection, which {backbone.family} needs"
    found, wanted = heads["text_projection"].shape[1], backbone.text_encoders[0].config.hidden_size
    return None if found == wanted else f"text_projection takes {found} features, the text encoder gives {wanted}"
