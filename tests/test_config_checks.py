"""Settings that are valid alone and cannot work together are refused, each with its fix."""

from pathlib import Path

import pytest

from diffalign import config as configuration
from diffalign.errors import ConfigError

TINY = Path(__file__).parents[1] / "configs" / "tiny"
REFUSED = {
    "dcpo data.image_caption_columns=null": "image_caption_columns",
    "mapo reference.update=ema": 'needs an objective with a reference, "mapo" has none',
    "mapo loss.anchor_weight=1.0": "loss.anchor_weight needs",
    "kto loss.sft_weight=1.0": "would also learn the undesirable images",
    "kto loss.auto_beta=0.2": "loss.auto_beta needs",
    "mapo denoising.noising=ddim_inversion inversion.network=reference": 'inversion.network "reference" needs',
    "dpo data.positive_ratio=0.8": "data.positive_ratio is for",
    "kto data.scorer=pickscore data.curriculum_stages=3": "both decide which example comes next",
    "mapo reference.cache_draws=1": 'cache_draws cannot be used: "mapo" has no reference',
    "dspo reference.cache_draws=1": '"dspo" needs the predictions of the reference',
    "kto reference.cache_draws=1 objective.baseline=mismatched": '"kto" needs the predictions of the reference',
    "dpo reference.cache_draws=1 loss.anchor_weight=1.0": "loss.anchor_weight needs the predictions",
    "dpo reference.cache_draws=1 reference.update=ema": "with reference.update ema the reference moves",
    "inpo reference.cache_draws=1": "the noisy latents depend on a network",
    "kto reference.cache_draws=1 data.positive_ratio=0.8": "with data.positive_ratio examples are drawn in no epochs",
    "dpo reference.cache_draws=1 data.curriculum_stages=3 data.scorer=pickscore": "with data.curriculum_stages",
    "dpo reference.cache_draws=1 data.cache_latents=false": "set data.cache_latents",
    "dpo denoising.noising=generating data.random_flip=true": "leads to no mirrored one: set data.random_flip: false",
    "spo reference.cache_draws=1": 'reference.cache_draws has no effect on "spo"',
    "spo denoising.timestep_low=500": "timestep_low and timestep_high are for given images and whole trajectories",
    "dpo reference.cache_draws=0": "greater than or equal to 1",
    "dpo loss.auto_beta_limits=[5.0,1.0]": "0 < low <= high",
    "dpo data.preference_from=scores": "data.preference_from: scores needs data.scorer",
    "dpo data.label_source=reward": "data.label_source: reward needs data.scorer",
    "dpo data.curriculum_stages=3": "data.curriculum_stages needs data.scorer",
    "dpo data.score_range=[1.0,0.0]": "min < max",
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_combination_without_sense_is_refused(case):
    name, *overrides = case.split()
    with pytest.raises(ConfigError) as caught:
        configuration.load(TINY / f"{name}.yaml", overrides)
    assert REFUSED[case] in str(caught.value)


@pytest.mark.parametrize("name", [path.stem for path in TINY.glob("*.yaml")])
def test_every_tiny_recipe_is_accepted_and_read_back(name, tmp_path):
    config = configuration.load(TINY / f"{name}.yaml")
    (tmp_path / "again.yaml").write_text(configuration.dump(config))
    assert configuration.load(tmp_path / "again.yaml") == config
