"""A tiny run that tests vary: random-weight SDXL, 24 pairs, a handful of steps."""

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

from diffalign import config as configuration
from diffalign.jobs.training.train import train
from tests.e2e.pairs import write_pairs


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory):
    """Return a folder with 24 rows in Pick-a-Pic v2's columns, three of them ties."""
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs", 24)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """Return a folder for latent caches, shared by all runs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def content(tiny_sdxl, pairs_folder, cache_dir, tmp_path):
    """Return the configuration of a tiny DPO run as a dictionary to change."""
    return {
        "model": {"pretrained_model_name_or_path": str(tiny_sdxl)},
        "lora": {"rank": 4},
        "data": {
            "train_data_dir": str(pairs_folder),
            "resolution": 64,
            "proportion_empty_prompts": 0.2,
            "cache_dir": str(cache_dir),
        },
        "objective": {"name": "dpo", "beta": 2000.0},
        "optimizer": {"learning_rate": 1e-3},
        "train": {
            "output_dir": str(tmp_path / "run"),
            "train_batch_size": 4,
            "max_train_steps": 4,
            "checkpointing_steps": 2,
        },
        "logging": {"logging_steps": 1, "report_to": []},
    }


@pytest.fixture
def run():
    """Return a function that trains a configuration; accelerate's process-wide state is reset around it.

    Runs take the place of earlier ones in their folder, unless told not to.
    """

    def start(content, overwrite=True):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        return train(configuration.check(content), overwrite=overwrite)

    yield start
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
