"""What the families share that were trained on DDPM's path, with a UNet or a transformer."""

from diffalign.backbones.base import Backbone
from diffalign.denoising.scheduler_config import is_flow
from diffalign.errors import ModelError


def check_ddpm(backbone: Backbone, instead: str) -> None:
    """Refuse schedules that are not DDPM's, and VAEs that normalise by channel, which such families do not have.

    Nor does a prediction of the noise go with a schedule that ends in pure noise: x0 = (xt - sigma eps) / alpha, and
    alpha is 0 there.

    Raises:
        ModelError: such a part; `instead` says what to use.
    """
    schedule = backbone.scheduler.config
    if (schedule.get("beta_schedule") is None and schedule.get("trained_betas") is None) or is_flow(schedule):
        raise ModelError(
            f'The {type(backbone.scheduler).__name__} of "{backbone.source}" has no DDPM noise schedule (no betas): '
            f"{backbone.family} is trained on that path. EDM and flow-matching schedules do not fit. {instead}"
        )
    if schedule.get("rescale_betas_zero_snr") and schedule.get("prediction_type", "epsilon") == "epsilon":
        raise ModelError(
            f'The scheduler of "{backbone.source}" ends in pure noise (rescale_betas_zero_snr), where an epsilon '
            "prediction says nothing about x0. Set model.prediction_type: v_prediction if the model was trained so, "
            "else correct scheduler/scheduler_config.json."
        )
    if getattr(backbone.vae.config, "latents_mean", None) is not None:
        raise ModelError(
            f'The VAE of "{backbone.source}" normalises each latent channel (latents_mean, as Playground v2.5 does), '
            f"which is not supported. {instead}"
        )
