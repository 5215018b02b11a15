"""What a step-aware preference model learns from: one-step predictions of noised pictures (SPO, arXiv:2406.04314)."""

import hashlib
from collections.abc import Callable, Sequence
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
from diffalign.jobs.rewards.stored_pictures import Stored
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
        self.seed, self.bf16, self._ids = seed, bf16, PairIds()
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
        ids = self._ids(pairs)
        files = [self._file(number, visit, timestep) for number in ids.tolist()]

        def make(rows: list[int]) -> np.ndarray:
            return self._made([pairs[row] for row in rows], ids[rows], visit, timestep)

        both = torch.from_numpy(kept_or_made(files, make)).float().div(255)
        return both[:, 0], both[:, 1], self._timesteps(ids, visit, timestep)

    def _made(self, pairs: Sequence[RewardPair], ids: Tensor, visit: int, timestep: int | None) -> np.ndarray:
        """Return the pictures of pairs [B,2,3,H,W] uint8."""
        device, count = next(self.backbone.denoiser.parameters()).device, len(pairs)
        side = self.backbone.native_resolution
        pictures = squares(pairs, side).to(device)
        if timestep != 0:
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
        return self.backbone.path.timesteps_at(draws.uniform(self.seed, visit, ids, "step_aware_t"))

    def _file(self, number: int, visit: int, timestep: int | None) -> Path | None:
        if self.folder is None or (self.draws is None and timestep is None):
            return None
        when = f"{visit}" if timestep is None else f"t{timestep}"
        return self.folder / f"{number:016x}-{when}.npy"

    def _name(self) -> str:
        backbone = self.backbone
        parts = (backbone.fingerprint(), backbone.denoiser_fingerprint(), self.guidance_scale, self.seed, self.bf16)
        return "one-step-" + hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


class PairIds:
    """Give pairs ids in [0, 2**63) of their content, which key draws and files; files and bytes are read once."""

    def __init__(self):
        self._known: dict[tuple, int] = {}

    def __call__(self, pairs: Sequence[RewardPair]) -> Tensor:
        """Return the ids [B] int64 of pairs."""
        return torch.tensor([self._of(pair) for pair in pairs], dtype=torch.int64)

    def _of(self, pair: RewardPair) -> int:
        if not all(isinstance(image, str | bytes | Path | Stored) for image in pair[:2]):
            return _id(pair)
        if pair[:3] not in self._known:
            self._known[pair[:3]] = _id(pair)
        return self._known[pair[:3]]


def squares(pairs: Sequence[RewardPair], side: int) -> Tensor:
    """Return the pictures [2B,3,side,side] in [0, 1] of pairs, all first sides and then all second ones."""
    return torch.stack([square(pair[place], side) for place in (0, 1) for pair in pairs])


def square(image: ImageLike, side: int) -> Tensor:
    """Return a picture in any form as [3, side, side] in [0, 1]: short side to `side`, antialiased, centre crop."""
    picture = to_tensor(to_rgb(image))
    scale = side / min(picture.shape[-2:])
    height, width = (max(side, round(length * scale)) for length in picture.shape[-2:])
    picture = resize(picture, (height, width), antialias=True).clamp(0, 1)
    top, left = (height - side) // 2, (width - side) // 2
    return picture[:, top : top + side, left : left + side]


def _id(pair: RewardPair) -> int:
    """Return an id in [0, 2**63) of the content of a pair."""
    digests = (hashlib.blake2b(to_rgb(image).tobytes(), digest_size=16).digest() for image in pair[:2])
    return stable_id(pair.prompt, *digests)


def kept_or_made(files: Sequence[Path | None], make: Callable[[list[int]], np.ndarray]) -> np.ndarray:
    """Return the arrays of files, stacked; those that are not there are made, a few rows at a time, and kept."""
    missing = [row for row, file in enumerate(files) if file is None or not file.is_file()]
    fresh: dict[int, np.ndarray] = {}
    for start in range(0, len(missing), BATCH):
        rows = missing[start : start + BATCH]
        # in the memory order that a file gives back: another one runs other kernels, which round otherwise
        fresh.update(zip(rows, np.ascontiguousarray(make(rows)), strict=True))
    for row, array in fresh.items():
        _keep(files[row], array)
    return np.stack([fresh[row] if row in fresh else np.load(file) for row, file in enumerate(files)])


def _keep(file: Path | None, both: np.ndarray) -> None:
    """Write an array whole or not at all; two processes may write the same one."""
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(f".{hash(both.tobytes()) & 0xFFFFFFFF:08x}.part")
    with scratch.open("wb") as stream:
        np.save(stream, both)
    scratch.replace(file)
