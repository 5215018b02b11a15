"""SPO's step-aware preference model (Liang et al. 2024, arXiv:2406.04314): PickScore that knows how noisy a step was.

It scores one-step predictions of the clean picture: those of early steps are blurred, and the vision tower is told so.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reward_models.base import ImageLike, Prompts, ScorerCard, ScorerError, listed
from reward_models.checkpoints import read_state_dict, write_folder
from reward_models.hf_clip import HFClipScorer, build, load_spec, load_tokenizer, locate, read_config
from reward_models.preprocess import spm_tensor_noaa
from reward_models.recipes import Recipe

EVALUATED_AT = (0, 251, 501, 701, 951)  # the timesteps the authors report accuracies for
FREQUENCIES = 256  # width of the sinusoidal embedding of a timestep
_SPM = ScorerCard(
    name="step_aware",
    weights="SPO-Diffusion-Models/Step-Aware_Preference_Models/sd-v1-5_step-aware_preference_model.bin",
    preprocessing="spm_tensor_noaa: tensor bicubic without antialiasing, short side 224, centre crop, clamp",
    text_length=77,
    formula="exp(logit_scale) * <e_image(t), e_text>; P(a > b) = sigmoid(a - b)",
    scale="as PickScore, about 100 x cosine",
    usual_range=(17.0, 24.0),
    licence="MIT",
    traps=(
        "Made for x0 predicted in one step from x_t with guidance; t is that of x_t, 0 for finished pictures.",
        "The weights belong to one base model: SD 1.5's and SDXL's predictions differ.",
        "The filter is not antialiased, unlike PickScore's: large pictures alias.",
        "Scores of different prompts or timesteps are not comparable.",
        "The official constructor does not give the identity (init_adaln_paras does later); from_clip does.",
    ),
    source="RockeyCoss/SPO @27a86428",
)


class StepAware(HFClipScorer):
    """Score by exp(logit_scale) * cosine of a CLIP whose vision tower is modulated by the timestep (adaLN).

    t_emb = MLP([cos(t f), sin(t f)]); in every layer, with (shift, scale, gate) x 2 = Linear(SiLU(t_emb)):
    h += gate1 * attention(norm1(h) (1 + scale1) + shift1); h += gate2 * MLP(norm2(h) (1 + scale2) + shift2).
    """

    is_scaled = True
    cards = (
        _SPM,
        dataclasses.replace(_SPM, name="step_aware_sdxl", weights=_SPM.weights.replace("sd-v1-5", "sdxl")),
    )

    @classmethod
    def network(cls, config: Any) -> nn.Module:
        """Build the time-conditioned CLIPModel of a config, with any weights."""
        return _network_class()(config)

    @classmethod
    def from_clip(cls, path_or_id: str | Path, *, card: ScorerCard = _SPM, seed: int = 0) -> Self:
        """Start from a plain CLIP such as PickScore: the result scores like it at every timestep, and can be trained.

        Source: init_adaln_paras. All modulations are zero but the gates, which are one.
        """
        path_or_id = str(path_or_id)
        folder, weights = locate(path_or_id)
        config = read_config(folder, cls.official_config, activation=cls.activation)
        state = read_state_dict(weights)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = identity_modulation(config.vision_config.hidden_size, config.vision_config.num_hidden_layers)
        if present := sorted(set(fresh) & set(state)):
            raise ScorerError(f"{weights} is step-aware already (it holds {present[0]}): load it with load.")
        module = build(lambda: cls.network(config), {**state, **fresh}, weights, torch.float32)
        spec = load_spec(folder, config.vision_config.image_size)
        return cls(card, module, spec, load_tokenizer(folder, config, path_or_id), source=path_or_id)

    @property
    def recipe(self) -> Recipe:
        """Return how the official function makes pixels [3, size, size]."""
        return Recipe("spm_tensor_noaa", self.spec)

    def preprocess_tensor(self, images: Tensor) -> Tensor:
        """Return pixels [N, 3, size, size]; the official function is differentiable itself."""
        return spm_tensor_noaa(images, self.spec)

    def embed_pixels(self, pixels: Tensor, timesteps: Tensor | int = 0) -> Tensor:
        """Return image embeddings [N, D], not normalised, at timesteps [N] or one for all; 0 is a finished picture."""
        times = torch.as_tensor(timesteps, device=pixels.device).expand(len(pixels))
        return self.module.visual_projection(self.module.time_conditioned(pixels, times))

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str], timesteps: Tensor | int = 0) -> Tensor:
        """Return the scores [N] float32 of preprocessed pixels [N, 3, h, w] at their timesteps, differentiably."""
        embeddings = self.embed_pixels(pixels.to(self.device, self.dtype), timesteps)
        return self.score_features(F.normalize(embeddings.float(), dim=-1), prompts)

    @torch.no_grad()
    def score(
        self,
        images: ImageLike | Iterable[ImageLike],
        prompts: Prompts = None,
        timesteps: Tensor | Sequence[int] | int = 0,
    ) -> Tensor:
        """Return the scores [N] float32 on the CPU at timesteps in [0, 1000), [N] or one for all."""
        images = listed(images)
        prompts, times = self._prompts_for(len(images), prompts), self._times_for(len(images), timesteps)
        return self._checked(
            self._batched(
                len(images), lambda part: self.score_pixels(self.pixels(images[part]), prompts[part], times[part])
            ).cpu()
        )

    def score_tensor(
        self, images: Tensor, prompts: Prompts = None, timesteps: Tensor | Sequence[int] | int = 0
    ) -> Tensor:
        """Return the scores [N] float32 of images [N, 3, H, W] in [0, 1] at their timesteps, with gradients to them."""
        pixels = self.preprocess_tensor(self._tensor_images(images))
        times = self._times_for(len(images), timesteps)
        return self.score_pixels(pixels, self._prompts_for(len(images), prompts), times).to(images.device)

    def save_official(self, file: str | Path) -> Path:
        """Write one .bin in the layout of the official releases: all names behind "model."."""
        file = Path(file)
        state = {f"model.{key}": value.detach().cpu() for key, value in self.module.state_dict().items()}
        write_folder(file.parent, lambda folder: torch.save(state, folder / file.name))
        return file

    def _times_for(self, count: int, timesteps: Tensor | Sequence[int] | int) -> Tensor:
        times = torch.as_tensor(timesteps, device=self.device)
        if times.ndim > 1 or (times.ndim == 1 and len(times) != count):
            raise ScorerError(
                f"Got {count} images and timesteps of shape {list(times.shape)}. Give one an image or one."
            )
        if count and not (times.min() >= 0 and times.max() < 1000):
            raise ScorerError(f"Timesteps must be in [0, 1000), got {times.min().item()} to {times.max().item()}.")
        return times.expand(count)


def timestep_embedding(timesteps: Tensor, dim: int = FREQUENCIES) -> Tensor:
    """Return [cos(t f_i), sin(t f_i)] [N, dim] float32 of timesteps [N], f_i = 10000^(-i / (dim / 2))."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10000.0) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def identity_modulation(width: int, layers: int) -> dict[str, Tensor]:
    """Return the weights a plain CLIP lacks, such that it stays the same: gates 1, shifts and scales 0."""
    embedder = {
        "t_embedder.mlp.0.weight": 0.02 * torch.randn(width, FREQUENCIES),
        "t_embedder.mlp.0.bias": torch.zeros(width),
        "t_embedder.mlp.2.weight": 0.02 * torch.randn(width, width),
        "t_embedder.mlp.2.bias": torch.zeros(width),
    }
    gates = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 1.0]).repeat_interleave(width)
    blocks = {f"vision_model.encoder.layers.{index}.": gates for index in range(layers)} | {
        "vision_model.": torch.zeros(2 * width)
    }
    for prefix, bias in blocks.items():
        embedder[f"{prefix}adaLN_modulation.1.weight"] = torch.zeros(len(bias), width)
        embedder[f"{prefix}adaLN_modulation.1.bias"] = bias.clone()
    return embedder


@functools.cache
def _network_class() -> type[nn.Module]:
    """Return the network's class; transformers is imported only when a network is built."""
    from transformers import CLIPModel

    class TimeConditionedCLIP(CLIPModel):
        """CLIPModel with a timestep embedder and modulations, under the official names."""

        def __init__(self, config: Any):
            super().__init__(config)
            width = config.vision_config.hidden_size
            mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
            self.t_embedder = nn.ModuleDict({"mlp": mlp})
            for layer in self.vision_model.encoder.layers:
                layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
            self.vision_model.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

        def time_conditioned(self, pixels: Tensor, timesteps: Tensor) -> Tensor:
            """Return the modulated class token [N, width] of pixels [N, 3, h, w] at timesteps [N]."""
            tower = self.vision_model
            mlp = self.t_embedder["mlp"]
            time = mlp(timestep_embedding(timesteps).to(mlp[0].weight.dtype))
            hidden = tower.pre_layrnorm(tower.embeddings(pixels))
            for layer in tower.encoder.layers:
                hidden = _modulated(layer, hidden, time)
            shift, scale = tower.adaLN_modulation(time).chunk(2, dim=-1)
            return tower.post_layernorm(hidden[:, 0]) * (1 + scale) + shift

    return TimeConditionedCLIP


def _modulated(layer: nn.Module, hidden: Tensor, time: Tensor) -> Tensor:
    chunks = layer.adaLN_modulation(time).unsqueeze(1).chunk(6, dim=-1)
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = chunks
    attended, _ = layer.self_attn(layer.layer_norm1(hidden) * (1 + scale_1) + shift_1, attention_mask=None)
    hidden = hidden + gate_1 * attended
    return hidden + gate_2 * layer.mlp(layer.layer_norm2(hidden) * (1 + scale_2) + shift_2)
