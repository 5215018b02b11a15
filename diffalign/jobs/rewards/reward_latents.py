"""What LPO's judge learns from: noisy latents of both pictures of a pair (arXiv 2502.01051)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.denoising import draws
from diffalign.denoising.paths import add_noise
from diffalign.errors import ModelError
from diffalign.jobs.rewards.reward_pictures import PairIds, kept_or_made, squares
from diffalign.rollout import LatentReward, judged_levels
from reward_models.checkpoints import read_state_dict
from reward_models.hf_clip import locate
from reward_models.pairs import RewardPair

SD15_CLIP = "openai/clip-vit-large-patch14"  # whose text encoder SD1.5 took, without its projection


class NoisyLatents:
    """Noise both pictures of a pair: xt = alpha x0 + sigma eps at one of `judged_levels`, each with an eps of its own.

    x0 is the mean of the VAE's posterior (the authors draw from it); t and eps are pure functions of seed, visit and
    content of the pair. Each pair is encoded once.

    Args:
        backbone: the base, for its VAE and its noise schedule.
        folder: where the latents are kept, in float16.
        resolution: of the pictures, in pixels.
    """

    def __init__(self, backbone: Backbone, folder: Path, resolution: int, seed: int):
        self.backbone, self.resolution, self.seed = backbone, resolution, seed
        self.folder = folder / f"{backbone.fingerprint()}-{resolution}"
        self._ids = PairIds()

    def to(self, device: torch.device) -> Self:
        """Move the VAE and return self."""
        self.backbone.vae.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self, pairs: Sequence[RewardPair], visit: int, timestep: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return noisy latents [B,C,h,w] of both sides and the timesteps [B]; `timestep` fixes them (validation)."""
        ids = self._ids(pairs)
        files = [self.folder / f"{number:016x}.npy" for number in ids.tolist()]
        x0 = torch.from_numpy(kept_or_made(files, lambda rows: self._encoded([pairs[row] for row in rows]))).float()
        times = self._timesteps(ids, visit) if timestep is None else torch.full_like(ids, timestep)
        noisy = []
        for side in (0, 1):
            noise = draws.normal(self.seed, visit, ids, x0.shape[2:], f"lrm_{side}")
            noisy.append(add_noise(self.backbone.path, x0[:, side], noise, times))
        return *noisy, times

    def _encoded(self, pairs: Sequence[RewardPair]) -> np.ndarray:
        """Return the clean latents [B,2,C,h,w] of pairs."""
        x0, _ = self.backbone.encode_images(squares(pairs, self.resolution).to(self.backbone.vae.device))
        return torch.stack(x0.chunk(2), dim=1).half().cpu().numpy()

    def _timesteps(self, ids: Tensor, visit: int) -> Tensor:
        levels = judged_levels(self.backbone.path)
        return levels[(draws.uniform(self.seed, visit, ids, "lrm_t") * len(levels)).long()]


def start(base: Backbone, init: str | None, seed: int) -> LatentReward:
    """Return the judge that is to be trained, on the CPU; it takes over the networks of `base`.

    Args:
        init: a folder of a judge to go on from; for SD1.5 otherwise the CLIP whose text projection is taken.

    Raises:
        ModelError: `init` is of another family, or of none.
    """
    if init is not None and (Path(init) / "unet").is_dir():
        resolution = base.native_resolution
        return LatentReward.load(Path(init), base, torch.device("cpu"), resolution)
    if base.family == "sdxl":
        if init is not None:
            raise ModelError(f'"{init}" holds no judge of latents: it has no unet/. Leave --init out for a new one.')
        return LatentReward.start(base, None, seed)
    place = init or SD15_CLIP
    projection = read_state_dict(locate(place)[1]).get("text_projection.weight")
    if projection is None:
        raise ModelError(f'"{place}" has no text_projection. Name the CLIP whose text encoder the base has.')
    return LatentReward.start(base, projection, seed)
