"""The section of a configuration that says how an online objective samples and judges."""

from typing import Literal

from pydantic import Field, model_validator

from diffalign.training.settings import Settings
from diffalign.vocabulary import ADVANTAGES, BACKPROPAGATIONS, GUIDANCE_SCHEDULES, ROLLOUTS


class RolloutSettings(Settings):
    """How an objective that draws its images (spo, d3po, ddpo, dpok, refl, draft, alignprop) samples and judges.

    The defaults are SPO's for SD1.5.
    """

    collect: Literal[(*ROLLOUTS, *BACKPROPAGATIONS)] | None = None
    """null: as the objective's paper does. step_pairs: candidates for single steps (SPO); trajectory_pairs: pairs of
    whole trajectories (D3PO); trajectories: single ones with an advantage (DDPO). The reward's gradient flows through
    one_step, whose prediction is judged (ReFL), the last_steps (DRaFT), or random_steps (AlignProp)."""
    scorer: str | None = None
    """Reward model, NAME or NAME=PATH, of decoded pictures; for trajectory_pairs also several, separated by commas.
    NAME may be code of your own, e.g. my_judges.py:Brightness (docs/plugins.md).
    lrm=FOLDER is LPO's, which reads the noisy latents of step_pairs. labels=FOLDER: people's votes on the pictures that
    `diffalign rollout` drew there (trajectory_pairs)."""
    num_inference_steps: int = Field(20, ge=1)
    """Denoising steps of a trajectory."""
    guidance_scale: float = Field(5.0, ge=0)
    """In sampling and in training, with gradient through both branches. 1: no guidance."""
    eta: float = Field(1.0, ge=0)
    """Noise of the DDIM steps; 1 in all published codes. 0 only where no log-probability is taken."""

    num_candidates: int = Field(4, ge=2)
    """Of step_pairs: candidates for the next latent (2 for SDXL)."""
    divert_start_step: int = Field(4, ge=0)
    """Of step_pairs: steps before the first candidates."""
    num_inner_steps: int = Field(0, ge=0)
    """Of step_pairs: steps each candidate goes on alone before it is judged (3 for SDXL)."""
    threshold: float = Field(0.3, ge=0, lt=1)
    """Of step_pairs: smallest P(better) - P(worse) that is learnt from (0.4 for SDXL). 0 keeps all but ties."""
    threshold_high: float | None = Field(None, ge=0, lt=1)
    """The threshold rises with the std of the step from threshold to this (LPO); null: it is constant."""
    timesteps_of: Literal["candidate", "current"] = "candidate"
    """Which timestep a judge of noisy latents is told: the candidate's own, or that of the step it comes from (LPO)."""
    resample: Literal["random", "best"] = "random"
    """Which candidate sampling goes on from."""

    winner_guidance: float = Field(0.0, ge=0)
    """Of step_pairs: zeta of TailorPO-G. Winners move by zeta times the gradient of the reward of the picture that one
    step predicts from them, before anything is learnt from them. 0: they stay. No value of the authors is known."""
    winner_guidance_schedule: Literal[GUIDANCE_SCHEDULES] = "constant"
    """constant: zeta at every step; variance: times the variance of the step."""

    likelihood: Literal["gaussian", "score_matching"] = "gaussian"
    """How likely a network finds a step: by its Gaussian, or by GradSPO's score matching (step_pairs only)."""
    grad_scale: float = Field(0.5, gt=0)
    """Of score_matching: how far the two candidates of a pair are pulled apart along their noise."""
    ema_decay: float | None = Field(None, ge=0, lt=1)
    """Sample with a moving average of the policy (GradSPO: 0.9); null: with the policy itself."""

    samples_per_prompt: int | None = Field(None, ge=1)
    """Trajectories of a prompt; null: 2 of trajectory_pairs, 1 of trajectories."""
    pairs: Literal["all", "best_and_worst"] = "all"
    """Of trajectory_pairs: all pairs of a prompt's trajectories, or the best with the worst: fewer and clearer."""
    shared_noise: bool | None = None
    """Trajectories of a prompt start from the same noise, so that their rewards differ by the steps alone; null: as the
    papers do, true for trajectory_pairs, false for trajectories."""
    advantages: Literal[ADVANTAGES] = "per_prompt"
    """per_prompt: by the prompt's rewards of late (DDPO); group: by its rewards in this rollout; batch: by all."""
    buffer_size: int = Field(16, ge=1)
    """Of per_prompt: rewards remembered of a prompt."""
    min_count: int = Field(16, ge=1)
    """Of per_prompt: with fewer, the mean and std of the rollout are taken."""

    one_step_range: list[int] | None = Field(None, min_length=2, max_length=2)
    """Of one_step: first and last step that may be judged, counted from 0; null: any. ReFL: [30, 39] of 40."""
    backprop_steps: int | None = Field(1, ge=1)
    """Of last_steps: K of DRaFT-K; null: all."""
    last_step_noises: int = Field(0, ge=0)
    """Of last_steps with backprop_steps 1: n of DRaFT-LV, for a gradient of less variance. The finished picture is
    noised again n times and the last step repeated; the reward is the mean over all 1 + n. 2 is usual."""
    random_start: Literal["gaussian", "uniform"] = "gaussian"
    """Of random_steps: where the gradient starts. gaussian: at 84 % of the steps on average, with a deviation of a
    tenth of them (AlignProp); uniform: anywhere."""

    transitions_per_prompt: int | None = Field(None, ge=1)
    """Examples used of a prompt, drawn at random, clear pairs first; null: all."""
    updates: int = Field(1, ge=1)
    """Optimizer steps a rollout serves; each takes its share of the prompt's transitions."""
    latent_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What latents are rounded to before any log-probability is taken of them."""
    sample_batch_size: int = Field(32, ge=1)
    """Images in one pass of the network without gradient."""
    decode_batch_size: int = Field(8, ge=1)
    """Latents decoded and scored at a time, at most."""
    decode_dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of the VAE that decodes for reward models; null: bfloat16 under mixed precision bf16, else its own."""

    @model_validator(mode="after")
    def _sensible(self) -> "RolloutSettings":
        if self.divert_start_step >= self.num_inference_steps:
            raise ValueError(
                "rollout.divert_start_step must be below rollout.num_inference_steps, got "
                f"{self.divert_start_step} and {self.num_inference_steps}"
            )
        if self.threshold_high is not None and self.threshold_high < self.threshold:
            raise ValueError(
                "rollout.threshold_high must not be below rollout.threshold, got "
                f"{self.threshold_high} and {self.threshold}"
            )
        return self
