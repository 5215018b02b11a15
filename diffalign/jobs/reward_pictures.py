"""What a step-aware preference model learns from: one-step predictions of noised pictures (SPO, arXiv:2406.04314)."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.data.fingerprints import stable_id
from diffalign.denoising import draws
from diffalign.denoising.ddim import guided
from diffalign.denoising.paths import add_noise, to_x0
from diffalign.errors import ConfigError
from diffalign.rollout import PromptEncoder
from reward_models.pairs import RewardPair
from reward_models.preprocess import ImageLike, resize, to_rgb, to_tensor

BATCH = 16  # pairs at a time through VAE and UNet


class OneStepPictures:
    """Noise both pictures of a pair alike, predict the clean latents in one step with guidance, decode.

    xt = alpha x0 + sigma eps with the SAME eps and t for both pictures; x0_hat = (xt - sigma eps_hat) / alpha with
    eps_hat = eps(empty) + guidance_scale (eps(prompt) - eps(empty)). t and eps are pure functions of seed, visit and
    content of the pair.

    Args:
        backbone: frozen; the model whose steps are to be judged.
        folder: where pictures are kept, as 8-bit files named after all they depend on; None keeps none.
        guidance_scale: 5 in the official code, whatever the model is sampled with.
        draws: (t, eps) a pair, K: visit k sees draw k mod K; None: a new one every visit, and nothing is kept.
        bf16: autocast of UNet and VAE.

    Raises:
        ConfigError: draws below 1.
    """

    def __init__(
        self,
        backbone: Backbone,
        folder: Path | None = None,
        *,
        guidance_scale: float = 5.0,
        draws: int | None = None,
        seed: int = 0,
        bf16: bool = False,
    ):
        if draws is not None and draws < 1:
            raise ConfigError(f"draws must be at least 1, got {draws}. Leave it out to draw anew at every visit.")
        backbone.denoiser.requires_grad_(False).eval()
        self.backbone, self.guidance_scale, self.draws = backbone, guidance_scale, draws
        self.seed, self.bf16 = seed, bf16
        self.folder = None if folder is None else folder / self._name()

    def to(self, device: torch.device) -> Self:
        """Move the model and return self."""
        self.backbone.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self, pairs: Sequence[RewardPair], visit: int, timestep: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return pictures [B,3,H,W] in [0,1] of both sides and the timesteps [B]; `timestep` fixes them (validation).

        Timestep 0 stands for the pictures as they are: a finished picture is what SPO's loop scores at 0.
        """
        visit = visit if self.draws is None or timestep is not None else visit % self.draws
        files = [self._file(pair, visit, timestep) for pair in pairs]
        missing = [index for index, file in enumerate(files) if file is None or not file.is_file()]
        fresh: dict[int, np.ndarray] = {}
        for start in range(0, len(missing), BATCH):
            part = missing[start : start + BATCH]
            made = self._made([pairs[index] for index in part], visit, timestep)
            fresh.update(zip(part, made, strict=True))
        for index, both in fresh.items():
            _keep(files[index], both)
        kept = np.stack([fresh[i] if i in fresh else np.load(file) for i, file in enumerate(files)])
        both = torch.from_numpy(kept).float().div(255)
        return both[:, 0], both[:, 1], self._timesteps(self._ids(pairs), visit, timestep)

    def _made(self, pairs: Sequence[RewardPair], visit: int, timestep: int | None) -> np.ndarray:
        """Return the pictures of pairs [B,2,3,H,W] uint8."""
        device, count = next(self.backbone.denoiser.parameters()).device, len(pairs)
        side = self.backbone.denoiser.config.sample_size * self.backbone.vae_scale_factor
        pictures = torch.stack([square(pair[place], side) for place in (0, 1) for pair in pairs]).to(device)
        if timestep != 0:
            ids = self._ids(pairs)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16):
                pictures = self._predicted(pictures, [pair.prompt for pair in pairs], ids, visit, timestep)
        both = pictures.view(2, count, *pictures.shape[1:]).transpose(0, 1)
        return (both * 255).round().to(torch.uint8).cpu().numpy()

    def _predicted(self, pictures: Tensor, prompts: list[str], ids: Tensor, visit: int, timestep: int | None) -> Tensor:
        """Return the decoded one-step predictions [2B,3,H,W] of pictures [2B,3,H,W], first sides first."""
        backbone, device = self.backbone, pictures.device
        x0, _ = backbone.encode_images(pictures)
        times = self._timesteps(ids, visit, timestep).repeat(2).to(device)
        noise = draws.normal(self.seed, visit, ids, x0.shape[1:], "step_aware").repeat(2, 1, 1, 1).to(device)
        batch = PromptEncoder(backbone, pictures.shape[-1])(prompts, device)
        cond = batch.cond.select(torch.arange(len(ids), device=device).repeat(2))
        xt = add_noise(backbone.path, x0, noise, times)

        def network(xt: Tensor, timesteps: Tensor, cond: object) -> Tensor:
            return backbone.predict(backbone.denoiser, xt, timesteps, cond)

        pred = guided(network, xt, times, cond, batch.empty, self.guidance_scale)
        return backbone.decode_latents(to_x0(backbone.path, xt, pred, times))

    def _timesteps(self, ids: Tensor, visit: int, timestep: int | None) -> Tensor:
        if timestep is not None:
            return torch.full_like(ids, timestep)
        total = self.backbone.path.num_train_timesteps
        return (draws.uniform(self.seed, visit, ids, "step_aware_t") * total).long()

    @staticmethod
    def _ids(pairs: Sequence[RewardPair]) -> Tensor:
        return torch.tensor([_id(pair) for pair in pairs], dtype=torch.int64)

    def _file(self, pair: RewardPair, visit: int, timestep: int | None) -> Path | None:
        if self.folder is None or (self.draws is None and timestep is None):
            return None
        when = f"{visit}" if timestep is None else f"t{timestep}"
        return self.folder / f"{_id(pair):016x}-{when}.npy"

    def _name(self) -> str:
        backbone = self.backbone
        parts = (backbone.fingerprint(), backbone.denoiser_fingerprint(), self.guidance_scale, self.seed, self.bf16)
        return "one-step-" + hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def square(image: ImageLike, side: int) -> Tensor:
    """Return a picture in any form as [3, side, side] in [0, 1]: short side to `side`, antialiased, centre crop."""
    picture = to_tensor(to_rgb(image))
    scale = side / min(picture.shape[-2:])
    height, width = (max(side, round(length * scale)) for length in picture.shape[-2:])
    picture = resize(picture, (height, width), antialias=True).clamp(0, 1)
    top, left = (height - side) // 2, (width - side) // 2
    return picture[:, top : top + side, left : left + side]


def _id(pair: RewardPair) -> int:
    """Return an id in [0, 2**63) of the content of a pair: draws are keyed by it."""
    digests = (hashlib.blake2b(to_rgb(image).tobytes(), digest_size=16).digest() for image in pair[:2])
    return stable_id(pair.prompt, *digests)


def _keep(file: Path | None, both: np.ndarray) -> None:
    """Write a picture pair whole or not at all; two processes may write the same one."""
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(f".{hash(both.tobytes()) & 0xFFFFFFFF:08x}.part")
    with scratch.open("wb") as stream:
        np.save(stream, both)
    scratch.replace(file)
