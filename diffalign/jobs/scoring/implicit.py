"""The DPO implicit reward: how much better a trained model explains a picture than the model it was trained from."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from diffalign.backbones.families import denoiser_of
from diffalign.denoising import draws
from diffalign.denoising.kernels import squared_errors
from diffalign.denoising.paths import add_noise, target
from diffalign.errors import UserError
from diffalign.jobs.drawing import models
from diffalign.jobs.rewards.reward_pictures import square
from diffalign.rollout import PromptBatch, PromptEncoder
from diffalign.rollout.prompts import prompt_id
from diffalign.yaml_text import read_yaml

NAME = "implicit"
BETA = 5000.0  # of Diffusion-DPO; a run's own is taken where its config.yaml states one
CARD = f"""{NAME}: the DPO implicit reward (Diffusion-DPO, arXiv:2311.12908)

weights         {NAME}=RUN, a diffalign run, its checkpoint or a LoRA; the reference is the base it was trained from
formula         beta / 2 * mean over K draws (t, eps) of (|eps - eps_ref|^2 - |eps - eps_policy|^2), means over C, H, W
P(a > b)        sigmoid(a - b)
draws           K = 16; t stratified over the schedule; both are keyed by the prompt, so pictures of one share them
preprocessing   short side to the model's resolution, centre crop, VAE mean
traps           Noisy: a difference of two large numbers. Compare pictures of one prompt, never of two. beta is only a
                scale. Of pairs the policy was trained on it says what was learnt, not what is true."""


class ImplicitReward:
    """Score by r = beta / 2 * mean_k (e_ref - e_policy), e = mean over C, H, W of (target - prediction)^2.

    The partition function of DPO depends on the prompt alone, so it drops out of every comparison of one prompt.

    Args:
        spec: what `models.resolve` reads; it must be weights that go on a base.
        num_draws: K >= 1.
        batch_size: pictures at a time; each costs 2 K passes of the denoiser.

    Raises:
        UserError: `spec` is a whole model, so there is no reference, or num_draws is below 1.
    """

    name = NAME
    preference_scale = 1.0

    def __init__(
        self,
        spec: str,
        device: str = "auto",
        torch_dtype: str = "auto",
        *,
        num_draws: int = 16,
        seed: int = 0,
        batch_size: int = 16,
    ):
        if num_draws < 1:
            raise UserError(f"num_draws must be at least 1, got {num_draws}. 16 is usual.")
        (model,) = models.resolve([spec])
        if model.weights is None:
            raise UserError(
                f'"{spec}" is a whole model: the implicit reward compares a trained model with the one it came from. '
                f"Name a run or a LoRA, e.g. {NAME}=runs/demo."
            )
        loaded = models.ModelLoader(torch_dtype, device).load(model)
        self.backbone, self.policy = loaded.backbone, denoiser_of(loaded.pipeline)
        self.reference = self.backbone.denoiser.eval()  # the policy itself, adapters off, where a LoRA was put on it
        self.beta = _beta_of(Path(spec))
        self.num_draws, self.seed, self.batch_size = num_draws, seed, batch_size
        self.resolution = self.backbone.native_resolution
        self._encode = PromptEncoder(self.backbone, self.resolution)
        self.identity = self._identity(loaded.identity)

    @torch.no_grad()
    def score(self, images: Sequence[Image.Image | str | Path], prompts: Sequence[str]) -> Tensor:
        """Return the rewards [N] float32 on the CPU; a picture's does not depend on the others'."""
        prompts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
        parts = [
            self._score(images[start : start + self.batch_size], prompts[start : start + self.batch_size])
            for start in range(0, len(images), self.batch_size)
        ]
        return torch.cat(parts) if parts else torch.empty(0)

    def _score(self, images: Sequence, prompts: list[str]) -> Tensor:
        device = self.policy.device
        pictures = torch.stack([square(image, self.resolution) for image in images])
        x0, _ = self.backbone.encode_images(pictures.to(device))
        batch = self._encode(prompts, device)
        ids = torch.tensor([prompt_id(prompt) for prompt in prompts])
        gaps = [self._gap(x0, batch, ids, draw) for draw in range(self.num_draws)]
        return self.beta / 2 * torch.stack(gaps).mean(0).float().cpu()

    def _gap(self, x0: Tensor, batch: PromptBatch, ids: Tensor, draw: int) -> Tensor:
        """Return e_ref - e_policy [N] at one (t, eps) a prompt."""
        path = self.backbone.path
        place = (draw + draws.uniform(self.seed, draw, ids, "implicit_t")) / self.num_draws
        times = path.timesteps_at(place).to(x0.device)
        noise = draws.normal(self.seed, draw, ids, x0.shape[1:], "implicit").to(x0.device)
        xt, wanted = add_noise(path, x0, noise, times), target(path, x0, noise, times)
        policy = self.backbone.predict(self.policy, xt, times, batch.cond)
        with self._adapters_off():
            reference = self.backbone.predict(self.reference, xt, times, batch.cond)
        policy_error, reference_error = squared_errors(policy, wanted, reference)
        return reference_error - policy_error

    @contextmanager
    def _adapters_off(self) -> Iterator[None]:
        if self.reference is not self.policy:
            yield
            return
        self.policy.disable_adapters()
        try:
            yield
        finally:
            self.policy.enable_adapters()

    def _identity(self, policy: str) -> str:
        parts = (policy, self.reference is self.policy or self.backbone.denoiser_fingerprint())
        settings = (self.beta, self.num_draws, self.seed, self.resolution)
        return hashlib.blake2b(repr((parts, settings)).encode(), digest_size=16).hexdigest()


def _beta_of(path: Path) -> float:
    """Return beta of the run that `path` is or lies in, else the paper's."""
    run = models.run_of(path)
    if run is None:
        return BETA
    file = run / models.RUN_FILE
    found = (read_yaml(file).get("objective") or {}).get("beta")
    return float(found) if isinstance(found, int | float) else BETA
