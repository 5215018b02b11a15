"""The sampler under every rollout: guided DDIM steps without gradient, batched over prompts and candidates."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffalign import denoising
from diffalign.backbones.conditioning import Conditioning
from diffalign.denoising import DDPMPath, FrozenDenoiser, StepDistribution
from diffalign.errors import ConfigError
from diffalign.rollout.prompts import PromptBatch


@dataclass
class Evaluations:
    """Count the work of sampling, in latents."""

    predicted: int = 0  # guided predictions; each is two images through the network unless guidance_scale is 1
    decoded: int = 0  # latents through the VAE's decoder


@dataclass(kw_only=True)
class Sampler:
    """Sample with a network as it is, from noise keyed by (seed, step, prompt id, stream).

    Args:
        network: the policy, without gradient and in evaluation mode.
        shape: of a latent, (C,h,w).
        eta: 1 in all published codes; > 0.
        storage_dtype: what latents are rounded to before anything is computed from them.
    """

    path: DDPMPath
    network: FrozenDenoiser
    shape: tuple[int, int, int]
    seed: int
    num_inference_steps: int = 20
    guidance_scale: float = 5.0
    eta: float = 1.0
    storage_dtype: torch.dtype = torch.float32
    evaluations: Evaluations = field(default_factory=Evaluations)

    def __post_init__(self) -> None:
        self.ladder = denoising.ladder(self.path, self.num_inference_steps)

    def steps_within(self, low: int = 0, high: int | None = None) -> list[int]:
        """Return the steps that start at a timestep in [low, high); None: no upper end.

        Raises:
            ConfigError: there is none.
        """
        levels = self.ladder.timesteps.tolist()
        found = [index for index, level in enumerate(levels) if low <= level and (high is None or level < high)]
        if not found:
            raise ConfigError(
                f"No step starts within denoising.timestep_low {low} and timestep_high {high}: the timesteps of "
                f"{self.num_inference_steps} steps are {levels}."
            )
        return found

    def noise(self, prompts: PromptBatch, step: int, stream: str, copies: int = 1) -> Tensor:
        """Draw normal numbers [copies*B,C,h,w]; copy c of a prompt has the stream "<stream>_<c>"."""
        draws = [
            denoising.normal(self.seed, step, prompts.ids, self.shape, f"rollout_{stream}_{copy}")
            for copy in range(copies)
        ]
        return torch.cat(draws)

    def start(self, prompts: PromptBatch, step: int, copies: int = 1) -> Tensor:
        """Return pure noise [copies*B,C,h,w], as it is stored."""
        return self.noise(prompts, step, "start", copies).to(self.storage_dtype).float()

    def predict(self, x: Tensor, index: int, cond: Conditioning, empty: Conditioning) -> Tensor:
        """Return the guided prediction [N,C,h,w] at level `index` of the ladder."""
        self.evaluations.predicted += len(x)
        timesteps = self.at(self.ladder.timesteps, index, x)
        return denoising.guided(self.network, x, timesteps, cond, empty, self.guidance_scale)

    def distribution(self, x: Tensor, pred: Tensor, index: int) -> StepDistribution:
        """Return where a step from level `index` goes."""
        timesteps, previous = (self.at(levels, index, x) for levels in (self.ladder.timesteps, self.ladder.previous))
        return denoising.ddim_step(self.path, x, pred, timesteps, previous, self.eta)

    def move(self, x: Tensor, pred: Tensor, index: int, noise: Tensor) -> Tensor:
        """Return a sample of the next latents [N,C,h,w], as they are stored."""
        return self.distribution(x, pred, index).sample(noise, self.storage_dtype)

    def at(self, levels: Tensor, index: int, x: Tensor) -> Tensor:
        """Return level `index` of the ladder's `timesteps` or `previous` for every latent [N]."""
        return levels[index].to(x.device).expand(len(x))
