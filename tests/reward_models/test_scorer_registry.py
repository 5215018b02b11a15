import subprocess
import sys
from pathlib import Path

import pytest

import reward_models
from reward_models.base import UNPUBLISHED, ScorerError


def test_names_are_the_scorers_of_the_package():
    assert {"hpsv2", "hpsv2.1", "pickscore"} <= set(reward_models.names())
    assert reward_models.names() == sorted(reward_models.names())


@pytest.mark.parametrize("name", reward_models.names())
def test_every_card_is_complete(name):
    card = reward_models.card(name)
    assert card.name == name
    assert card.weights == UNPUBLISHED or card.weights.count("/") in (1, 2)
    for text in (card.preprocessing, card.formula, card.scale, card.licence, card.source):
        assert text
    assert card.traps
    low, high = card.usual_range
    assert low < high


def test_versions_of_hpsv2_differ_by_their_weights_only():
    first, second = reward_models.card("hpsv2"), reward_models.card("hpsv2.1")
    assert first.weights != second.weights
    assert first.preprocessing == second.preprocessing


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ScorerError, match=r'"hpsv3".*Did you mean "hpsv2(\.1)?".*Available: .*pickscore'):
        reward_models.load("hpsv3")


def test_both_versions_load_the_same_folder(tiny_scorer_folders):
    scorer = reward_models.load("hpsv2.1", tiny_scorer_folders["hpsv2"])
    assert scorer.name == "hpsv2.1"
    assert scorer.source == str(tiny_scorer_folders["hpsv2"])


@pytest.mark.parametrize(("name", "repository"), [("pickscore", "PickScore_v1"), ("hpsv2.1", "xswu/HPSv2")])
def test_official_weights_without_a_network_say_what_to_do(name, repository, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ScorerError, match=f"{repository}.*path of a local copy"):
        reward_models.load(name)


def test_importing_loads_no_library_and_changes_nothing():
    program = """
import os, random, sys
import numpy, torch, PIL.Image, safetensors.torch
before = dict(os.environ), torch.get_rng_state(), random.getstate(), torch.is_grad_enabled()
import reward_models
assert "pickscore" in reward_models.names()
loaded = {"diffalign", "transformers", "open_clip", "diffusers"} & set(sys.modules)
assert not loaded, loaded
assert dict(os.environ) == before[0]
assert torch.equal(torch.get_rng_state(), before[1])
assert random.getstate() == before[2]
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == result.stderr == ""


@pytest.mark.parametrize("name", reward_models.names())
def test_every_scorer_is_in_the_table_of_the_documentation(name):
    table = (Path(__file__).parents[2] / "docs" / "scorers.md").read_text(encoding="utf-8")
    card = reward_models.card(name)
    row = next(line for line in table.splitlines() if line.startswith(f"| `{name}` |"))
    assert card.weights in row
    if card.weights != UNPUBLISHED:
        assert card.licence in row
        assert "{:g} to {:g}".format(*card.usual_range) in row
