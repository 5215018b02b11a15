"""Scorers of users' own: what they must be, how they are built, and what their scores are kept under."""

import json

import pytest
import torch

from diffalign.errors import UserError
from diffalign.jobs.scoring import scorers
from diffalign.jobs.scoring.run import Options, load_judges
from reward_models.recipes import JoinedRecipe, Recipe
from tests.evaluation.toy import painted
from tests.jobs.material import PROMPTS
from tests.plugged import forget

SCORE = "def score(self, images, prompts):\n    return [len(prompt) for prompt in prompts]\n"
NETWORK = """
from reward_models import ScorerCard
from reward_models.pickscore import PickScore
from dataclasses import replace


class Network(PickScore):
    cards = (replace(PickScore.cards[0], name="network"),)
"""


def write(folder, body, name="mine"):
    text = f"class {name.title()}:\n    name = '{name}'\n" + "".join(f"    {line}\n" for line in body.splitlines())
    (folder / f"{name}.py").write_text(text)


def judge(wanted):
    (found,) = load_judges([wanted], Options(device="cpu"))
    return found


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("pass", "mine:Mine is no scorer: it lacks score(images, prompts) -> [N]"),
        ("def score(self, images):\n    return []", "score must take (images, prompts), got score(self, images)"),
        ("name = None\n" + SCORE, 'it lacks a name of its own, written in the class: name = "brightness"'),
        ("name = 'pickscore'\n" + SCORE, 'mine:Mine calls itself "pickscore", as a built-in scorer is called'),
        ("name = 'oracle'\n" + SCORE, 'mine:Mine calls itself "oracle", as a built-in scorer is called'),
    ],
)
def test_what_is_no_scorer_is_refused(own_folder, body, message):
    write(own_folder, body)
    with pytest.raises(UserError) as caught:
        scorers.parse("mine:Mine")
    assert message in str(caught.value)


def test_only_classes_are_scorers(own_folder):
    write(own_folder, SCORE)
    (own_folder / "mine.py").open("a").write("\nit = Mine()\n")
    with pytest.raises(UserError, match="it must be a class, got Mine"):
        scorers.parse("mine:it")


def test_two_scorers_of_one_name_are_refused(own_folder):
    write(own_folder, SCORE)
    with pytest.raises(UserError, match=r'Several scorers are called "mine": mine:Mine, mine\.py:Mine'):
        scorers.parse("mine:Mine,mine.py:Mine")


def test_a_file_without_a_class_asks_for_one(own_folder):
    with pytest.raises(UserError, match=r'"./mine.py" is a file: say which class of it, ./mine.py:NAME'):
        scorers.parse("./mine.py")


def test_it_may_stand_beside_others(own_folder, scorer_folders):
    write(own_folder, SCORE)
    loaded = scorers.load(f"oracle,mine.py:Mine,pickscore={scorer_folders['pickscore']}", "cpu")
    assert [scorer.name for scorer in loaded] == ["oracle", "mine", "pickscore"]


def test_weights_go_to_the_constructor(own_folder):
    init = "def __init__(self, weights):\n    self.weights = weights\ndef to(self, device):\n    self.device = device\n"
    write(own_folder, f"{init}    return self\n{SCORE}")
    (scorer,) = scorers.load("mine:Mine=some/where", "cpu")
    assert (scorer.weights, scorer.device) == ("some/where", torch.device("cpu"))
    with pytest.raises(UserError, match="mine:Mine needs weights: write mine:Mine=WEIGHTS"):
        scorers.load("mine:Mine")


def test_weights_that_are_not_taken_are_refused(own_folder):
    write(own_folder, SCORE)
    with pytest.raises(UserError, match="mine:Mine takes no weights: write it alone"):
        scorers.load("mine:Mine=some/where")


def test_a_constructor_that_fails_is_told_with_its_line(own_folder):
    write(own_folder, f"def __init__(self):\n    self.table = {{}}['x']\n{SCORE}")
    with pytest.raises(UserError, match=r"mine:Mine cannot be built: KeyError: 'x' \(.*mine.py, line 4\)"):
        scorers.load("mine:Mine")


def test_scores_are_kept_under_code_weights_and_identity(own_folder):
    weights = own_folder / "weights.txt"
    seen = set()
    for code, content, own in (("", "a", 1), ("# other", "a", 1), ("", "b", 1), ("", "a", 2)):
        init = f"def __init__(self, weights):\n    self.identity = open(weights).read() and '{own}'\n"
        write(own_folder, init + SCORE + code)
        weights.write_text(content)
        seen.add(judge("mine:Mine=weights.txt").identity)
        forget(own_folder)
    assert len(seen) == 4
    assert {identity.scorer for identity in seen} == {"mine"}


def test_a_scorer_of_the_wrong_shape_is_told(own_folder, tmp_path, diffalign):
    write(own_folder, "def score(self, images, prompts):\n    return [0.5]\n")
    for name in ("a", "b"):
        painted(100, 32, 0).save(own_folder / f"{name}.png")
    code, told = diffalign("score", "a.png", "b.png", "--prompt", "x", "--with", "mine:Mine", "--out", "s.csv")
    assert code == 2
    assert 'Scorer "mine" gave [0.5]... for 2 pictures' in told


class TestRewardModel:
    """A class that derives from reward_models.Scorer."""

    @pytest.fixture
    def network(self, own_folder, scorer_folders):
        (own_folder / "network.py").write_text(NETWORK)
        return f"network.py:Network={scorer_folders['pickscore']}"

    def test_it_scores_as_what_it_derives_from(self, network, scorer_folders):
        own, theirs = judge(network), judge(f"pickscore={scorer_folders['pickscore']}")
        images = [painted(100, 32, 0), painted(200, 32, 1)]
        assert torch.equal(own.scorer.score(images, PROMPTS), theirs.scorer.score(images, PROMPTS))
        assert own.identity.scorer == "network"
        assert isinstance(own.recipe, Recipe)  # workers make its pixels
        assert scorers.reads_prompt("network.py:Network")

    def test_a_recipe_of_its_own_is_left_to_it(self, network, own_folder):
        """A spawned worker could not import it."""
        own = (
            "\n    @property\n    def recipe(self):\n        return lambda image: PickScore.recipe.fget(self)(image)\n"
        )
        (own_folder / "network.py").open("a").write(own)
        found = judge(network)
        assert found.recipe is None
        assert torch.isfinite(found.scorer.score([painted(100, 32, 0)], PROMPTS[:1])).all()

    def test_a_composite_may_name_it(self, network, own_folder, scorer_folders):
        address, weights = network.split("=")
        parts = [
            {"name": address, "path": weights, "weight": 2.0},
            {"name": "hpsv2", "path": str(scorer_folders["hpsv2"])},
        ]
        (own_folder / "mix.json").write_text(json.dumps({"scorers": parts}))
        before = judge("composite=mix.json")
        assert isinstance(before.recipe, JoinedRecipe)
        image, text = [painted(100, 32, 0)], PROMPTS[:1]
        alone = [judge(part).scorer.score(image, text) for part in (network, f"hpsv2={scorer_folders['hpsv2']}")]
        torch.testing.assert_close(before.scorer.score(image, text), 2 * alone[0] + alone[1])
        (own_folder / "network.py").open("a").write("# edited\n")
        forget(own_folder)
        assert judge("composite=mix.json").identity.weights != before.identity.weights

    def test_a_scorer_of_pictures_is_no_part(self, own_folder):
        write(own_folder, SCORE)
        (own_folder / "mix.json").write_text(json.dumps({"scorers": [{"name": "mine:Mine"}]}))
        with pytest.raises(UserError, match="mine:Mine takes pictures; a part of a composite must derive from"):
            scorers.load("composite=mix.json")

    def test_what_it_lacks_is_said(self, own_folder):
        text = "from reward_models import Scorer\n\n\nclass Bare(Scorer):\n    pass\n"
        (own_folder / "bare.py").write_text(text)
        with pytest.raises(UserError, match=r"it lacks from_pretrained; .*it lacks score_features; it lacks cards"):
            scorers.parse("bare:Bare")
