"""D3PO from what people said: pictures drawn, voted on and put back on their trajectories; the oracle plays a rater."""

import copy
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from rich.console import Console

from diffalign import config as configuration
from diffalign.cli import main
from diffalign.errors import ConfigError, DataError
from diffalign.evaluation import Manifest
from diffalign.jobs.drawing.prompts import read_prompts
from diffalign.jobs.training import human_labels, online
from diffalign.jobs.training.assemble import load_backbone
from diffalign.jobs.training.rollout import rollout
from diffalign.jobs.training.train import build_trainer, make_accelerator
from diffalign.labelling import Votes
from diffalign.labelling.store import pair_tasks
from diffalign.rollout.scoring import pictures
from diffalign.shapes.oracle import Oracle
from tests.e2e.test_methods import ASSETS, ROLLOUT
from tests.e2e.test_training import assert_same_bits, variant, weights

PROMPTS = 4


@pytest.fixture
def d3po(content):
    """Return the configuration of two steps of D3PO on four prompts."""
    changed = copy.deepcopy(content)
    changed["objective"] = {"name": "d3po"}
    prompts = str(ASSETS / "prompts" / "tiny-train.txt")
    changed["data"] = {"prompts_file": prompts, "resolution": 64, "max_train_samples": PROMPTS}
    changed["rollout"] = ROLLOUT | {"transitions_per_prompt": 2}
    changed["train"] |= {"train_batch_size": 4, "max_train_steps": 2, "checkpointing_steps": 1}
    return changed


def judged(content, place):
    """Draw the pictures, let the oracle vote, and return the configuration of a run that learns from the votes."""
    manifests = rollout(configuration.check(content), place, Console(quiet=True))
    oracle, named = Oracle(), []
    for manifest in manifests:
        files = [str(path.resolve()) for path in manifest.paths]
        named.append((manifest.directory.name, manifest.table.assign(file=files)))
    with Votes(place / "votes.sqlite") as votes:
        votes.add(pair_tasks(named))
        for number in range(1, votes.count() + 1):
            task = votes.task(number)
            both = [Image.open(task.file_a), Image.open(task.file_b)]
            first, second = oracle.score(both, [task.prompt] * 2).tolist()
            left = votes.left_of(number, "oracle") == "a"
            votes.vote(number, "oracle", "left" if (first > second) == left else "right")
    return content | {"rollout": content["rollout"] | {"scorer": f"labels={place}"}}


def test_the_run_draws_the_judged_trajectories_again_and_learns_from_the_votes(d3po, run, tmp_path):
    content = judged(d3po, tmp_path / "people")
    config = configuration.check(content)
    trainer, backbone = build_trainer(config, make_accelerator(config), Console(quiet=True))
    texts = read_prompts(config.data.prompts_file, PROMPTS)
    with torch.no_grad():  # as if it had been trained for long
        for parameter in filter(lambda p: p.requires_grad, backbone.denoiser.parameters()):
            parameter.add_(0.1)
    order = [2, 0]  # prompts in another order and number, at a later step
    batch = trainer.loss.collect(order, 7).transitions
    ends = batch.x_prev[-len(order) :]  # of the last step
    for row, latents, label in zip(order, ends, batch.label[-len(order) :], strict=True):
        drawn = pictures(backbone.decode_latents(latents))
        stored = [Image.open(human_labels.folder(tmp_path / "people", copy) / f"{row:05d}-0.png") for copy in (0, 1)]
        for ours, file in zip(drawn, stored, strict=True):
            assert np.abs(np.asarray(ours, dtype=int) - np.asarray(file.convert("RGB"), dtype=int)).max() <= 2
        first, second = Oracle().score([file.convert("RGB") for file in stored], [texts[row]] * 2).tolist()
        assert label == (1.0 if first > second else -1.0)

    straight, halves = (variant(content, tmp_path, name) for name in ("straight", "halves"))
    assert run(straight)["kept"] == 1.0
    halves["train"]["max_train_steps"] = 1
    run(halves)
    halves["train"] |= {"max_train_steps": 2, "resume_from_checkpoint": "latest"}
    run(halves)
    assert_same_bits(weights(straight, 2), weights(halves, 2))
    assert max(tensor.abs().max() for name, tensor in weights(straight, 2).items() if "lora_B" in name) > 0


def test_votes_on_other_pictures_are_refused(d3po, tmp_path):
    content = judged(d3po, tmp_path / "people")
    for section, change, word in (
        ("train", {"seed": 1}, "seed"),
        ("rollout", {"eta": 0.5}, "eta"),
        ("rollout", {"shared_noise": False}, "shared_noise"),
    ):
        config = configuration.check(content | {section: content[section] | change})
        with pytest.raises(DataError, match=f"drawn with another {word} than"):
            online.open_prompts(config, load_backbone(config))
    config = configuration.check(content)
    backbone = load_backbone(config)
    with torch.no_grad():
        next(backbone.denoiser.parameters()).add_(1e-3)
    with pytest.raises(DataError, match="drawn with another model than"):
        online.open_prompts(config, backbone)


def test_what_labels_cannot_judge_is_refused(d3po):
    labelled = d3po | {"rollout": ROLLOUT | {"scorer": "labels=somewhere"}}
    moving = labelled | {"reference": {"update": "ema"}}
    single = labelled | {"objective": {"name": "spo"}}
    for content, word in ((moving, "reference.update"), (single, "Use d3po")):
        with pytest.raises(ConfigError, match=word):
            human_labels.copies(configuration.check(content))
    nowhere = d3po | {"rollout": ROLLOUT | {"scorer": "labels"}}
    with pytest.raises(ConfigError, match="must name one folder"):
        human_labels.place_of(configuration.check(nowhere))


def test_scores_are_shares_of_comparisons_and_every_picture_must_have_some():
    rows = [
        ("a cat", "picture-1", "picture-2", 1.0),
        ("a cat", "picture-1", "picture-2", 0.5),
        ("a cat", "picture-3", "picture-1", 0.0),
        ("a dog", "picture-1", "picture-2", 1.0),
    ]
    votes = pd.DataFrame(rows, columns=["prompt", "model_a", "model_b", "credit"])
    names = ["picture-1", "picture-2", "picture-3"]
    found = human_labels.picture_scores(votes, names)
    assert found == {"a cat": [pytest.approx(2.5 / 3), 0.25, 0.0]}
    with pytest.raises(DataError, match='votes on "picture-3"'):
        human_labels.picture_scores(votes, names[:2])


def test_pictures_are_drawn_once(d3po, tmp_path):
    (first, second) = rollout(configuration.check(d3po), tmp_path, Console(quiet=True))
    gone, kept = first.paths[1], second.paths[0]
    before, stamp = gone.read_bytes(), kept.stat().st_mtime_ns
    gone.unlink()
    again = rollout(configuration.check(d3po), tmp_path, Console(quiet=True))
    assert gone.read_bytes() == before
    assert kept.stat().st_mtime_ns == stamp
    assert Manifest.read(tmp_path / "picture-1").table.equals(again[0].table)


def test_the_command_says_what_it_cannot_draw(monkeypatch, capsys, tmp_path):
    words = ["rollout", str(ASSETS.parent / "configs" / "tiny" / "ddpo.yaml"), "--out", str(tmp_path / "people")]
    monkeypatch.setattr(sys, "argv", ["diffalign", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert 'which "ddpo" does not compare' in capsys.readouterr().err
    assert not (tmp_path / "people").exists()
