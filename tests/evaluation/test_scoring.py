"""Score tables: long, complete, finite."""

import math

import pytest
import torch
from PIL import Image

from diffalign.errors import DataError, UserError
from diffalign.evaluation import attribute_table, score_table
from diffalign.evaluation.scoring import format_score
from tests.evaluation.toy import Brightness, Contrast, painted

IMAGES = [painted(level, seed=level) for level in (10, 100, 200)]
PROMPTS = ["red", "green", "red"]


def test_one_row_per_picture_and_scorer_in_order():
    table = score_table(IMAGES, PROMPTS, [Brightness(), Contrast()], batch_size=2, model="base", seed=[0, 0, 1])
    assert list(table.columns) == ["prompt_id", "prompt", "seed", "model", "scorer", "score"]
    assert table["scorer"].tolist() == ["brightness"] * 3 + ["contrast"] * 3
    assert table["prompt_id"].tolist() == [0, 1, 0] * 2
    assert table["seed"].tolist() == [0, 0, 1] * 2
    expected = Brightness().score(IMAGES, PROMPTS).double().tolist()
    assert table["score"].tolist()[:3] == expected
    assert expected[0] < expected[1] < expected[2]


def test_files_and_pictures_score_alike(tmp_path):
    files = [tmp_path / f"{index}.png" for index in range(3)]
    for image, file in zip(IMAGES, files, strict=True):
        image.save(file)
    assert score_table(files, PROMPTS, [Contrast()]).equals(score_table(IMAGES, PROMPTS, [Contrast()]))


def test_transparent_and_grey_pictures_reach_scorers_as_rgb():
    grey = [IMAGES[0].convert("L"), IMAGES[1].convert("RGBA")]
    assert len(score_table(grey, PROMPTS[:2], [Brightness()])) == 2


def test_attributes_that_a_caption_does_not_mention_have_no_row():
    table = attribute_table(IMAGES, PROMPTS, [Brightness(), Contrast()], batch_size=2, model="base")
    assert table[["prompt", "attribute"]].value_counts().to_dict() == {("red", "red"): 2, ("green", "green"): 1}
    assert attribute_table(IMAGES, PROMPTS, [Contrast()]) is None


class Broken:
    name = "broken"

    def __init__(self, result):
        self.result = result

    def score(self, images, prompts):
        return self.result


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.tensor([1.0, math.nan, 2.0]), "gave nan to a picture of 'green'"),
        (torch.zeros(3, 1), r"shape \[3, 1\] for 3 pictures"),
    ],
)
def test_results_that_are_no_scores(result, message):
    with pytest.raises(DataError, match=message):
        score_table(IMAGES, PROMPTS, [Broken(result)])


def test_pictures_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"gone\.png does not exist"):
        score_table([tmp_path / "gone.png"], ["red"], [Contrast()])
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DataError, match=r"cut\.png cannot be read"):
        score_table([tmp_path / "cut.png"], ["red"], [Contrast()])
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 80).save(whole)
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:1500])
    with pytest.raises(DataError, match=r"half\.png cannot be read"):
        score_table([tmp_path / "half.png"], ["red"], [Contrast()])


def test_requests_that_do_not_fit_together():
    with pytest.raises(DataError, match="3 pictures but 2 prompts"):
        score_table(IMAGES, PROMPTS[:2], [Contrast()])
    with pytest.raises(DataError, match='"seed" has 2 values for 3 pictures'):
        score_table(IMAGES, PROMPTS, [Contrast()], seed=[1, 2])
    with pytest.raises(UserError, match="different names"):
        score_table(IMAGES, PROMPTS, [Contrast(), Contrast()])
    with pytest.raises(UserError, match="no scorer"):
        score_table(IMAGES, PROMPTS, [])


@pytest.mark.parametrize(
    ("value", "largest", "text"),
    [
        (21.4567, None, "21.46"),
        (0.28123, None, "0.281"),
        (0.00512, None, "0.00512"),
        (0.5, 21.0, "0.50"),
        (-1e-9, 1, "0.000"),
    ],
)
def test_scores_show_three_to_four_digits(value, largest, text):
    assert format_score(value, largest) == text
