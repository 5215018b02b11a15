"""Training steps on a flow path: every objective of given images, alone and in a batch, inverted, cached, recorded.

The network is a UNet of SDXL's kind: it takes any time between 0 and 1000, and what a step does around it is looked at.
"""

import pytest
import torch

from diffalign.data.visits import RepeatedDraws, Visit
from diffalign.denoising import FlowPath
from diffalign.training.reference_cache import ReferenceCache
from diffalign.training.static_step import WARM_UP, StaticStep
from tests.training.micro_steps import OFFLINE, Latents, Parts
from tests.training.tape import Tape


@pytest.fixture(scope="module")
def parts(tiny_sdxl):
    """Return a network on a flow path, which every test leaves as it was."""
    torch.manual_seed(0)  # of the network's weights
    parts = Parts.of(tiny_sdxl)
    parts.backbone.path = FlowPath()
    return parts


@pytest.mark.parametrize("name", OFFLINE)
def test_every_objective_learns_from_velocities(name, parts):
    """Inverted or noised at random: the target is a velocity, and gives the clean latent back."""
    step, network = parts.step(name, snr_gamma=5.0), parts.backbone.denoiser
    network.zero_grad()
    posed = step.prepare([3, 1, 4], 7)
    problem = posed.problem
    assert problem.timesteps.dtype == torch.float32
    torch.testing.assert_close(problem.target, problem.noise - problem.x0)
    back = parts.backbone.path.to_x0(problem.xt, problem.target, problem.timesteps)
    torch.testing.assert_close(back, problem.x0, rtol=0, atol=1e-5)
    losses, _ = step(network, [3, 1, 4], 7)
    losses.mean().backward()
    assert losses.isfinite().all()
    assert len(losses.unique()) > 1  # a hinge may be at rest for two of them
    gradients = [p.grad for p in network.parameters() if p.requires_grad]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("name", ["dpo", "inpo", "smpo"])
def test_a_loss_does_not_depend_on_its_batch(name, parts):
    step, network = parts.step(name, snr_gamma=5.0), parts.backbone.denoiser
    together, _ = step(network, [3, 1, 4], 7)
    alone = torch.cat([step(network, [index], 7)[0] for index in (3, 1, 4)])
    torch.testing.assert_close(alone, together, rtol=1e-3, atol=1e-4)  # at beta 5000


def test_stored_errors_of_the_reference_serve_and_are_recorded(parts, tmp_path):
    """Timesteps are inputs of a recording like any tensor: a replay at others gives the bits of the eager step."""
    network, visits = parts.backbone.denoiser, [[Visit(3, 0), Visit(1, 1)], [Visit(4, 1), Visit(0, 0)]]
    stored = ReferenceCache.open(tmp_path, {}, (2, 5, 2))
    cached = parts.step("dpo", stored=stored, pairs=RepeatedDraws(Latents(2)), snr_gamma=5.0)
    online = parts.step("dpo", pairs=RepeatedDraws(Latents(2)), snr_gamma=5.0)
    recorded = StaticStep(cached.prepare, cached.evaluate, torch.Tensor.backward, Tape())
    for _ in range(WARM_UP + 2):
        for batch in visits:
            eager, _ = online(network, batch, 0)
            replayed, _ = recorded(network, batch, 0)
            torch.testing.assert_close(replayed, eager, rtol=1e-4, atol=1e-5)
    assert len(recorded._recordings) == 1
    assert (cached.prepare(visits[0], 0).hits == 1).all()
