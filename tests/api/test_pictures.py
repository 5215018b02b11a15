"""`generate`, `score` and `evaluate`: what the jobs do, in memory or in files, as the caller wishes."""

import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import diffalign
from diffalign.errors import DataError, UserError
from diffalign.evaluation import Manifest
from tests.jobs.material import PROMPTS, png, write_pairs

QUICK = {"steps": 2, "device": "cpu", "quiet": True}


def pixels(images):
    return np.stack([np.asarray(image) for image in images])


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Work in an empty folder, where files that nobody asked for would be seen."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture(scope="module")
def folder(lora_run, tmp_path_factory):
    """Return a folder of two prompts with two pictures each; treat it as read-only."""
    out = tmp_path_factory.mktemp("drawn") / "out"
    diffalign.generate(lora_run.folder, PROMPTS, seeds=[0, 3], out=out, **QUICK)
    return out


@pytest.fixture(scope="module")
def pictures(lora_run):
    """Return the same pictures, in memory."""
    return diffalign.generate(str(lora_run.folder), PROMPTS, seeds="0,3", **QUICK)


class TestGenerate:
    def test_pictures_know_prompt_and_seed(self, pictures, folder):
        manifest = Manifest.read(folder)
        assert (pictures.prompts, pictures.seeds, pictures.folder) == (manifest.prompts, [0, 3, 0, 3], None)
        assert repr(pictures) == "<4 pictures of 2 prompts>"
        assert pictures[1:3] == pictures.images[1:3]

    def test_files_are_kept_where_it_is_said_and_nowhere_else(self, lora_run, pictures, folder):
        assert not list(Path.cwd().iterdir())
        again = diffalign.generate(lora_run.folder, PROMPTS, seeds=[0, 3], out=folder, **QUICK)
        assert again.folder == folder
        assert len(list(folder.glob("*.png"))) == 4
        assert np.array_equal(pixels(again), pixels(pictures))

    def test_a_prompt_alone_and_a_file_are_prompts_too(self, lora_run, pictures, tmp_path):
        file = tmp_path / "prompts.txt"
        file.write_text("\n".join(PROMPTS))
        alone = diffalign.generate(lora_run.folder, PROMPTS[0], seeds=3, batch_size=1, **QUICK)
        assert np.abs(pixels(alone).astype(int) - pixels(pictures)[1:2]).max() <= 1
        for prompts in (file, str(file)):
            assert diffalign.generate(lora_run.folder, prompts, limit=1, **QUICK).prompts == PROMPTS[:1]

    def test_settings_reach_the_pictures(self, lora_run, pictures):
        others = diffalign.generate(lora_run.folder, PROMPTS, seeds=[0, 3], guidance_scale=1.0, **QUICK)
        assert not np.array_equal(pixels(others), pixels(pictures))

    def test_a_notebook_shows_a_sheet(self, pictures):
        assert pictures.figure().width > 2 * pictures[0].width
        assert pictures._repr_png_().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"seeds": [-1]}, "Seeds are written"),
            ({"seeds": []}, "Seeds are written"),
            ({"seeds": [1, 1]}, "repeat"),
            ({"prompts": []}, "Give the prompts"),
            ({"prompts": "nowhere.txt"}, "nowhere.txt"),
            ({"policy_scale": 2.0}, "no effect"),
            ({"steps": 0}, "at least 1"),
        ],
    )
    def test_mistakes_are_found_before_anything_is_loaded(self, changes, named):
        with pytest.raises(UserError, match=named):
            diffalign.generate("no/model", **{"prompts": PROMPTS, **changes})


class TestScore:
    def test_memory_and_files_have_the_same_scores(self, pictures, folder, scorer_folders):
        scorers = ["oracle", f"pickscore={scorer_folders['pickscore']}"]
        held = diffalign.score(pictures, scorers=scorers, device="cpu", quiet=True)
        stored = diffalign.score(folder, scorers=",".join(scorers), device="cpu", quiet=True)
        keys = ["scorer", "prompt_id", "prompt", "seed"]
        assert held[keys].values.tolist() == stored[keys].values.tolist()
        assert np.allclose(held["score"], stored["score"], atol=1e-5)
        assert held["score"].nunique() > 4
        assert not list(Path.cwd().iterdir())

    def test_prompts_go_with_files_in_the_callers_order(self, folder):
        manifest = Manifest.read(folder)
        backwards = list(reversed(list(zip(manifest.paths, manifest.prompts, strict=True))))
        files, prompts = map(list, zip(*backwards, strict=True))
        right = diffalign.score(folder, scorers="oracle", quiet=True)
        table = diffalign.score(files, prompts, "oracle", quiet=True)
        assert table["file"].tolist() == [str(file) for file in files]
        assert table["score"].tolist() == right["score"].tolist()[::-1]
        in_order = diffalign.score(folder, manifest.prompts, "oracle", quiet=True)
        assert in_order["score"].tolist() == right["score"].tolist()

    def test_one_text_holds_for_all(self, pictures, folder):
        held = diffalign.score(list(pictures), PROMPTS[0], "oracle", quiet=True)
        stored = diffalign.score([folder], PROMPTS[0], "oracle", quiet=True)
        assert held["score"].tolist() == stored["score"].tolist()
        assert set(held["prompt"]) == set(stored["prompt"]) == {PROMPTS[0]}

    def test_scores_are_kept_where_it_is_said(self, pictures, folder):
        for images in (pictures, folder):
            table = diffalign.score(images, scorers="oracle", out="kept/scores.csv", quiet=True)
            assert np.allclose(pd.read_csv("kept/scores.csv")["score"], table["score"])
        assert Path("kept/scores.csv.parts").is_dir()

    def test_broken_pictures_are_told_of(self, folder, tmp_path):
        broken = tmp_path / "some" / "broken.png"
        broken.parent.mkdir()
        broken.write_bytes(b"no picture")
        places = [Manifest.read(folder).paths[0], broken]
        with pytest.warns(UserWarning, match=r"1 pictures cannot be scored[\s\S]*broken.png"):
            assert len(diffalign.score(places, PROMPTS[0], "oracle", quiet=True)) == 1
        with pytest.raises(DataError, match=r"broken.png"):
            diffalign.score(places, PROMPTS[0], "oracle", strict=True, quiet=True)
        with pytest.raises(DataError, match=r"broken.png"):
            diffalign.score(places, [PROMPTS[0]] * 2, "oracle", quiet=True)

    def test_pairs(self, tmp_path):
        file = write_pairs(tmp_path / "pairs.parquet", [(png(40 * i), png(30), i % 2, PROMPTS[0]) for i in range(4)])
        with warnings.catch_warnings(action="error"):
            table = diffalign.score(pairs=file, scorers="oracle", limit=3, quiet=True)
        assert len(table) == 3
        assert {"score_chosen", "score_rejected", "agreement"} <= set(table.columns)
        assert not list(Path.cwd().iterdir())

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ({}, "got neither"),
            ({"images": ["a.png"], "pairs": "b"}, "got both"),
            ({"images": []}, "list is empty"),
            ({"pairs": "b", "prompts": "a red circle"}, "carry their prompts"),
            ({"images": ["a.png"], "limit": 3}, "belong to pairs"),
            ({"images": ["a.png"], "scorers": "orakel"}, 'Did you mean "oracle"'),
            ({"images": ["a.png"], "scorers": ()}, "No scorer is given"),
            ({"images": ["a.png"], "batch_size": 0}, "--batch-size"),
        ],
    )
    def test_mistakes(self, arguments, named):
        with pytest.raises(UserError, match=named):
            diffalign.score(**{"scorers": "oracle", **arguments})

    def test_pictures_alone_do_not_say_what_they_show(self, pictures):
        with pytest.raises(UserError, match="give prompts"):
            diffalign.score(list(pictures), scorers="oracle")
        with pytest.raises(DataError, match="4 pictures but 2 prompts"):
            diffalign.score(pictures, PROMPTS, "oracle", quiet=True)

    def test_processes_do_not_wait_for_each_other(self, folder, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UserError, match="accelerate launch"):
            diffalign.score(folder, scorers="oracle")


class TestEvaluate:
    def test_files_are_kept_where_it_is_said(self, lora_run, tmp_path, capsys):
        what = {"prompts": PROMPTS, "scorers": "oracle", "show_base": True, "seeds": range(2), "resamples": 50}
        result = diffalign.evaluate(lora_run.folder, **what, **QUICK)
        assert not list(Path.cwd().iterdir())
        assert capsys.readouterr().out == ""
        file = tmp_path / "prompts.txt"
        file.write_text("\n".join(PROMPTS))
        kept = diffalign.evaluate([str(lora_run.folder)], **what | {"prompts": file}, out="out", **QUICK)
        assert (Path("out") / "report.html").is_file()
        assert kept.table.equals(result.table)
        assert kept.categories.equals(result.categories)
        summary = json.loads(Path("out/summary.json").read_text())
        assert summary["models"]["dpo"]["scorers"]["oracle"]["win_rate"] == result.table["win_rate"].item()
        assert (summary["bootstrap"]["resamples"], summary["seeds"]) == (50, [0, 1])
        assert result._repr_markdown_() == Path("out/summary.md").read_text()

    def test_pictures_that_were_kept_are_compared(self, folder, lora_run):
        what = {"prompts": PROMPTS, "scorers": "oracle", "seeds": "0,3", "noise": "shared"}
        result = diffalign.evaluate([f"drawn={folder}", f"dpo={lora_run.folder}"], **what, **QUICK)
        assert (result.baseline, result.models) == ("drawn", ["dpo"])
        assert result.table["ties"].item() == 2

    def test_one_model_needs_another(self, lora_run):
        with pytest.raises(UserError, match="--show-base"):
            diffalign.evaluate(lora_run.folder, prompts=PROMPTS, scorers="oracle")


def test_folders_of_pictures_are_compared_without_prompts(tmp_path):
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        for number, prompt in enumerate(PROMPTS):
            (tmp_path / name / f"{number}.png").write_bytes(png(number + 10 * (name == "after")))
            (tmp_path / name / f"{number}.txt").write_text(prompt)
    result = diffalign.evaluate([tmp_path / "before", tmp_path / "after"], scorers="oracle", device="cpu", quiet=True)
    assert result.table["model"].tolist() == ["after"]  # against the first folder
