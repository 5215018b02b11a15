"""One finished LoRA run and one set of tiny scorers; treat them as read-only."""

import pytest

from tests.jobs.material import write_run, write_scorers


@pytest.fixture(scope="session")
def lora_run(tiny_sdxl, tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "dpo", tiny_sdxl)


@pytest.fixture(scope="session")
def scorer_folders(tmp_path_factory):
    return write_scorers(tmp_path_factory.mktemp("rewards") / "scorers")
