"""The CPU's way through the towers gives the numbers of the networks it reads, and steps aside where it cannot."""

import pytest
import torch
from torch import nn

import reward_models
from reward_models import towers
from tests.reward_models.toy import PROMPTS, SIZES

LENGTHS = ["a", PROMPTS[0], " ".join(PROMPTS)]  # the last is cut


def pixels(count=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, SIZES.image_size, SIZES.image_size, generator=generator)


def both_ways(scorer, monkeypatch):
    """Return the embeddings of images and of prompts by `towers`, and by the networks themselves."""
    tokens = scorer.tokenize(LENGTHS)
    with torch.no_grad():
        found = scorer.embed_pixels(pixels()), scorer.embed_tokens(tokens)
        monkeypatch.setattr(towers, "run", None)
        monkeypatch.setattr(towers, "is_usable", lambda *_: False)
        expected = scorer.embed_pixels(pixels()), scorer.embed_tokens(tokens)
    return found, expected


@pytest.mark.parametrize("has_onednn", [True, False])
@pytest.mark.parametrize("name", ["pickscore", "hpsv2", "clip_score_raw"])  # the last has quick_gelu
def test_embeddings_are_those_of_the_networks(scorer_places, name, has_onednn, monkeypatch):
    scorer, calls = reward_models.load(name, scorer_places[name]), []
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_onednn)
    run = towers.run
    monkeypatch.setattr(towers, "run", lambda *args, **kwargs: calls.append(1) or run(*args, **kwargs))
    found, expected = both_ways(scorer, monkeypatch)
    assert len(calls) == 2
    for own, official in zip(found, expected, strict=True):
        torch.testing.assert_close(own, official, atol=1e-5, rtol=1e-5)


def test_new_weights_count_at_once(scorer, monkeypatch):
    with torch.no_grad():
        before = scorer.embed_pixels(pixels()), scorer.embed_tokens(scorer.tokenize(LENGTHS))
        for parameter in scorer.module.parameters():
            parameter.mul_(1.1)
    found, expected = both_ways(scorer, monkeypatch)
    for own, official, old in zip(found, expected, before, strict=True):
        torch.testing.assert_close(own, official, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(own, old, atol=1e-2)


def wrap_a_layer(tower):
    wrapper = nn.Module()
    wrapper.base_layer = nn.Linear(2, 2)
    tower.add_module("adapter", wrapper)


@pytest.mark.parametrize(
    "change",
    [
        lambda tower: tower.register_forward_hook(print),
        lambda tower: next(tower.children()).register_forward_pre_hook(print),
        wrap_a_layer,
        lambda tower: tower.train(),
        lambda tower: tower.to(torch.bfloat16),
    ],
    ids=["hook", "pre-hook", "adapter", "training", "bfloat16"],
)
def test_changed_networks_run_themselves(change):
    tower = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)).eval()
    with torch.no_grad():
        assert towers.is_usable(tower, torch.zeros(1))
        change(tower)
        assert not towers.is_usable(tower, torch.zeros(1))


def test_gradients_and_autocast_take_the_networks(scorer):
    tower = nn.Linear(2, 2).eval()
    assert not towers.is_usable(tower, torch.zeros(1))
    with torch.no_grad(), torch.autocast("cpu"):
        assert not towers.is_usable(tower, torch.zeros(1))
    images = pixels().requires_grad_()
    scorer.embed_pixels(images).sum().backward()
    assert images.grad.abs().sum() > 0


def test_options_of_open_clip_run_as_open_clip_runs_them(tiny_scorer_folders):
    """A tower that pools patches instead of reading the class token."""
    scorer = reward_models.load("hpsv2", tiny_scorer_folders["hpsv2"])
    scorer.module.visual.pool_type = "avg"
    config = {**scorer.config, "vision_cfg": {**scorer.config["vision_cfg"], "pool_type": "avg"}}
    pooled = type(scorer)(scorer.card, scorer.module, scorer.spec, config, scorer.bpe_file, source="test")
    with torch.no_grad():
        torch.testing.assert_close(pooled.embed_pixels(pixels()), scorer.module.encode_image(pixels()))
