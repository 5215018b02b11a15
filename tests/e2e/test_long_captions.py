"""Captions beyond what CLIP reads: told of before a run, and read in chunks where they are asked to be."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from diffalign import config as configuration
from diffalign.errors import ConfigError
from diffalign.jobs.training.plan import dry_run
from diffalign.jobs.training.precompute import precompute
from diffalign.jobs.training.train import train
from tests.e2e.test_training import distance, variant, weights

LONG = "a red circle " + "very " * 100 + "big on a {} background"


@pytest.fixture
def captions(content, tmp_path):
    """Return the configuration of two steps on pairs with two captions too long and one that is not."""
    table = pq.read_table(f"{content['data']['train_data_dir']}/train.parquet").slice(0, 4)
    texts = [LONG.format("blue"), LONG.format("green"), LONG.format("blue"), "a red circle"]
    table = table.set_column(table.schema.get_field_index("caption"), "caption", pa.array(texts))
    (tmp_path / "captions").mkdir()
    pq.write_table(table, tmp_path / "captions" / "train.parquet")
    own = {"train_data_dir": str(tmp_path / "captions"), "cache_dtype": "float32", "proportion_empty_prompts": 0.3}
    return variant(content, tmp_path, "run", data=own, train={"max_train_steps": 2, "train_batch_size": 2})


def said(job, content):
    """Return what a job prints."""
    console = Console(file=io.StringIO(), width=300)
    job(configuration.check(content), console)
    return " ".join(console.file.getvalue().split())


TOLD = "2 of 3 distinct captions are longer than the 77 tokens that are read, the longest has"


@pytest.mark.parametrize("job", [train, precompute, dry_run], ids=lambda job: job.__name__)
def test_captions_that_are_cut_are_told(captions, job):
    printed = said(job, captions)
    assert TOLD in printed
    assert "what is beyond is cut; data.long_prompts=chunk reads all of them" in printed


def test_chunks_are_trained_on_alike_from_the_cache_and_without(captions, run, tmp_path):
    plain = variant(captions, tmp_path, "plain")
    chunks = variant(captions, tmp_path, "chunks", data={"long_prompts": "chunk"})
    accumulated = {"train_batch_size": 1, "gradient_accumulation_steps": 2}
    online = variant(chunks, tmp_path, "online", data={"cache_latents": False}, train=accumulated)
    assert "in chunks" in said(dry_run, chunks)
    printed = said(train, chunks)
    assert TOLD in printed
    assert "they are read in chunks" in printed
    run(plain)
    run(online)
    assert distance(weights(chunks, 2), weights(online, 2)) < 1e-5
    assert distance(weights(chunks, 2), weights(plain, 2)) > 1e-4


def test_a_run_is_continued_as_it_read(captions, run, tmp_path):
    """What was trained before there was the key is continued; another way of reading is not."""
    run(captions)
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "state.json").read_text())
    assert "long_prompts" not in state["identity"]["data"]
    changed = variant(captions, tmp_path, "run", data={"long_prompts": "chunk"})
    changed["train"] |= {"max_train_steps": 3, "resume_from_checkpoint": "latest"}
    with pytest.raises(Exception, match=r"data\.long_prompts: None there, 'chunk' now"):
        run(changed)


def test_other_families_say_that_it_means_nothing(captions, tiny_sd3, run):
    captions["model"]["pretrained_model_name_or_path"] = str(tiny_sd3)
    captions["data"]["long_prompts"] = "chunk"
    with pytest.raises(ConfigError, match=r'data\.long_prompts: "chunk" means nothing for sd3'):
        run(captions)
