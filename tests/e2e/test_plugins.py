"""The blocks of docs/plugins.md, taken as they stand into an empty folder, train and score there."""

import copy
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from diffalign import config as configuration
from diffalign import objectives
from diffalign.errors import UserError
from diffalign.jobs.scoring import scorers
from diffalign.rollout.scoring import pictures
from diffalign.training import metrics
from tests.e2e.test_methods import ASSETS, ROLLOUT
from tests.jobs.material import png
from tests.plugged import forget, publish

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "plugins.md").read_text(encoding="utf8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def page(own_folder):
    """Return the folder with the page's two files."""
    for name, text in zip(("my_losses.py", "my_judges.py"), blocks("python"), strict=True):
        (own_folder / name).write_text(text, encoding="utf8")
    (own_folder / "pictures").mkdir()
    for level in (20, 120, 220):
        (own_folder / "pictures" / f"{level}.png").write_bytes(png(level))
    return own_folder


@pytest.fixture
def drawing(content):
    """Return the configuration of two steps of an objective that draws, judged by the page's scorer."""
    content["data"] = {"prompts_file": str(ASSETS / "prompts" / "tiny-train.txt"), "resolution": 64}
    content["rollout"] = ROLLOUT | {"scorer": "my_judges.py:Brightness", "transitions_per_prompt": 2}
    content["train"] |= {"max_train_steps": 2, "checkpointing_steps": 2}
    return content


def edit(file):
    file.write_text(file.read_text() + "\n# another thought\n")
    forget(file.parent)  # as the next command


def resumed(content):
    content = copy.deepcopy(content)
    content["train"] |= {"max_train_steps": 4, "resume_from_checkpoint": "latest"}
    return content


class TestObjective:
    def test_it_trains_and_says_so(self, page, content, run):
        content["objective"] = {"name": "my_losses:DPOP", "penalty": 2}
        content["train"]["max_train_steps"] = 2
        line = run(content)
        output = Path(content["train"]["output_dir"])
        assert metrics.read(output / "metrics.jsonl")[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
        assert line["grad_norm"] > 0
        assert configuration.load(output / "config.yaml").objective == {
            "name": "my_losses:DPOP", "beta": 5000.0, "penalty": 2.0,
        }  # fmt: skip
        card = (output / "README.md").read_text()
        assert "by DPOP in 2 steps" in card
        assert "tags: [text-to-image, diffusers, lora, DPOP, diffalign]" in card

    def test_a_fined_winner_changes_the_gradient(self, page, content, run):
        """Against DPO itself: the fine counts from the second step on, once a winner is less likely."""
        lines = []
        for name in ("my_losses:DPOP", "dpo"):
            content["objective"], content["train"]["output_dir"] = {"name": name}, str(page / name)
            run(content)
            lines.append(metrics.read(page / name / "metrics.jsonl"))
        assert lines[0][0]["loss"] == lines[1][0]["loss"]
        assert lines[0][-1]["loss"] > lines[1][-1]["loss"]

    def test_edited_it_does_not_go_on(self, page, content, run):
        content["objective"] = {"name": "my_losses.py:DPOP"}
        content["train"]["max_train_steps"] = 2
        run(content)
        forget(page)
        run(resumed(content))  # the same code
        content["train"]["max_train_steps"] = 6
        edit(page / "my_losses.py")
        with pytest.raises(UserError, match=r"own_code\.objective: '\w{16}' there, '\w{16}' now"):
            run(resumed(content))

    def test_the_command_line_knows_its_hyperparameters(self, page, content, diffalign):
        (page / "tiny.yaml").write_text(yaml.safe_dump(content | {"objective": {"name": "my_losses:DPOP"}}))
        for key in ("objective.penalti=1", "penalti=1"):
            code, told = diffalign("train", "tiny.yaml", key)
            assert code == 2
            assert 'Did you mean "penalty"?' in told or 'Did you mean "objective.penalty"?' in told
        code, told = diffalign("train", "tiny.yaml", "penalty=-1")
        assert (code, '"objective.penalty" must be a finite number >= 0, got -1' in told) == (2, True)
        code, told = diffalign("show", "objective", "my_losses:DPOP")
        assert code == 0
        assert "penalty = 5.0" in told
        assert "2402.13228" in told
        assert "Code: my_losses.py" in told

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["my_losses:DPOP", "my_losses.py:DPOP"])
    def test_two_processes_find_it(self, page, content, name):
        content["objective"] = {"name": name}
        content["train"] |= {"train_batch_size": 2, "max_train_steps": 2}
        content["data"]["scorer"] = "my_judges.py:Brightness"
        content["data"]["preference_from"] = "scores"
        (page / "tiny.yaml").write_text(yaml.safe_dump(content))
        command = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "configs" / "accelerate" / "ddp.yaml"]
        command += ["--num_processes", "2", "-m", "diffalign", "train", "tiny.yaml"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(metrics.read(Path(content["train"]["output_dir"]) / "metrics.jsonl")) == 2


class TestScorer:
    def test_it_scores_and_scores_again_once_edited(self, page, diffalign):
        command = ["score", "pictures", "--with", "my_judges.py:Brightness", "--out", "scores.csv"]
        code, told = diffalign(*command)
        assert code == 0, told
        table = pd.read_csv("scores.csv").sort_values("score")
        assert set(table["scorer"]) == {"brightness"}
        assert [Path(file).stem for file in table["file"]] == ["20", "120", "220"]
        assert table["score"].between(0, 1).all()
        assert "0 scores computed" in diffalign(*command)[1]
        edit(page / "my_judges.py")
        assert "3 scores computed" in diffalign(*command)[1]

    def test_it_is_explained(self, page, diffalign):
        code, told = diffalign("show", "scorer", "my_judges:Brightness")
        assert code == 0
        assert "Score a picture by its mean luma" in told
        assert "prompts not read gradient yes" in told

    def test_both_of_its_paths_agree(self, page):
        (judge,) = scorers.load("my_judges.py:Brightness")
        images = torch.rand(3, 3, 16, 16, requires_grad=True)
        scores = judge.score_tensor(images, [""] * 3)
        torch.testing.assert_close(scores, judge.score(pictures(images.detach()), [""] * 3), rtol=0, atol=2e-3)
        (gradient,) = torch.autograd.grad(scores.sum(), images)
        assert gradient.sum().item() == pytest.approx(3, rel=1e-5)

    @pytest.mark.parametrize("name", ["spo", "draft"])
    def test_it_judges_what_a_run_draws(self, name, page, drawing, run):
        drawing["objective"] = {"name": name}
        assert run(drawing)["grad_norm"] > 0
        edit(page / "my_judges.py")
        with pytest.raises(UserError, match=r"own_code\.rollout\.scorer my_judges\.py:Brightness: '\w+' there"):
            run(resumed(drawing))

    def test_without_a_gradient_there_is_no_reward_gradient(self, page, drawing, run):
        file = page / "my_judges.py"
        file.write_text(file.read_text().replace("score_tensor", "score_otherwise"))
        drawing["objective"] = {"name": "draft"}
        with pytest.raises(UserError, match=r"score_tensor.*my_judges\.py:Brightness has none"):
            run(drawing)

    def test_it_labels_pairs(self, page, content, run):
        """With an edited scorer pairs are scored again: the cache goes by its code."""
        content["data"] |= {"scorer": "my_judges:Brightness", "label_source": "reward", "cache_dir": str(page / "c")}
        content["train"]["max_train_steps"] = 1
        run(content)
        edit(page / "my_judges.py")
        content["train"]["output_dir"] = str(page / "again")
        run(content)
        assert len(list((page / "c").glob("scores-*.parquet"))) == 2


def test_the_published_names_work(page, diffalign, monkeypatch):
    groups = tomllib.loads(blocks("toml")[0])["project"]["entry-points"]
    lines = [[f"[{group}]", *(f"{name} = {place}" for name, place in names.items())] for group, names in groups.items()]
    installed = page / "site-packages"
    publish(installed, "\n".join(line for group in lines for line in group), "my-alignment")
    for file in ("my_losses.py", "my_judges.py"):
        (page / file).rename(installed / file)
    monkeypatch.syspath_prepend(str(installed))
    forget(page)
    assert type(objectives.load("dpop", penalty=1.0)).__name__ == "DPOP"
    assert objectives.names()[-1] == "dpop"
    code, told = diffalign("list", "objectives")
    assert code == 0
    assert "(my-alignment 0.1)" in told
    assert told.index("sppo") < told.index("dpop")
    assert "Score a picture by its mean luma" in diffalign("list", "scorers")[1]
    code, told = diffalign("score", "pictures", "--with", "brightness", "--out", "scores.csv")
    assert code == 0, told
    assert set(pd.read_csv("scores.csv")["scorer"]) == {"brightness"}
