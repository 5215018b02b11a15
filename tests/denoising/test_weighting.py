"""Min-SNR weights against the formula of the paper, written out level by level."""

import pytest
import torch

from diffalign.denoising import DDPMPath, min_snr, zero_terminal_snr

SD = DDPMPath.from_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
TIMESTEPS = torch.tensor([0, 100, 400, 700, 999])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_weights_are_those_of_the_paper(prediction_type, gamma):
    path = DDPMPath(SD.alphas_cumprod, prediction_type)
    weights = min_snr(path, TIMESTEPS, gamma).tolist()
    for t, weight in zip(TIMESTEPS.tolist(), weights, strict=True):
        abar = SD.alphas_cumprod[t].double().item()
        snr = abar / (1 - abar)
        expected = min(snr, gamma) / (snr if prediction_type == "epsilon" else snr + 1)
        assert weight == pytest.approx(expected, rel=1e-4)
    assert len(set(weights)) >= 3


def test_pure_noise_has_a_finite_weight():
    path = DDPMPath(zero_terminal_snr(SD.alphas_cumprod))
    assert min_snr(path, torch.tensor([999]), 5.0).item() == 1.0
    v = DDPMPath(path.alphas_cumprod, "v_prediction")
    assert min_snr(v, torch.tensor([999]), 5.0).item() == 0.0
