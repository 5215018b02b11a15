"""What an objective of a user's own must be, told before a model is loaded."""

import pytest

from diffalign import objectives
from diffalign.errors import ConfigError
from diffalign.objectives import plugged

HEAD = """
from dataclasses import dataclass
from diffalign.objectives.base import Objective, PairErrors, ScaledMargin

@dataclass(frozen=True, kw_only=True)
class Mine({base}):
"""


def write(folder, body, base="ScaledMargin", head=HEAD):
    text = head.format(base=base) + "".join(f"    {line}\n" for line in body.splitlines())
    (folder / "mine.py").write_text(text)


@pytest.mark.parametrize("name", objectives.built_in())
def test_every_built_in_objective_would_pass(name):
    found = objectives.objective_class(name)
    assert plugged.objective_class(f"{found.__module__}:{found.__name__}") is found


def test_annotations_may_be_text(own_folder):
    """`from __future__ import annotations`: the class is looked up by its module, and beta=500 still means 500.0."""
    body = "scale: float = 2.0\ndef loss(self, errors: PairErrors):\n    return -self.scale * errors.margin"
    write(own_folder, body, head="from __future__ import annotations\n" + HEAD)
    assert objectives.fields("mine.py:Mine").keys() == {"beta", "scale"}
    assert objectives.load("mine.py:Mine", scale=3.0).scale == 3.0


LOSS = "def loss(self, errors):\n    return {}"
FREE = "layout = 'pair'\nneeds = frozenset()\n"


@pytest.mark.parametrize(
    ("base", "body", "message"),
    [
        ("object", "pass", "it must be a class that derives from diffalign.objectives.Objective"),
        ("Objective", FREE, "mine:Mine is no objective: it lacks loss()"),
        ("ScaledMargin", "zeta: float\n" + LOSS.format("errors.margin"), "zeta needs a default"),
        ("Objective", "layout = 'pairs'\nneeds = frozenset()\n" + LOSS.format(0), "layout must be one of pair, single"),
        ("Objective", "layout = 'pair'\n" + LOSS.format(0), "needs must be a frozenset of advantages"),
        ("Objective", "layout = 'pair'\nneeds = frozenset({'ref'})\n" + LOSS.format(0), "got frozenset({'ref'})"),
        ("Objective", "layout = 'reward'\nneeds = frozenset()\n" + LOSS.format(0), "rollout must be one of one_step"),
        ("ScaledMargin", LOSS.format("errors.margin.mean()"), "For 2 examples it is [], expected [2]"),
        ("ScaledMargin", LOSS.format("errors.margin.detach()"), "[2] without gradient, expected [2]"),
        ("ScaledMargin", LOSS.format("0.0"), "For 2 examples it is float, expected [2]"),
        ("ScaledMargin", LOSS.format("errors.marign"), "AttributeError: 'PairErrors' object has no attribute 'marign'"),
        ("Objective", FREE + LOSS.format("errors.margin"), "declare them in Objective.needs ("),
        (
            "ScaledMargin",
            "def __post_init__(self):\n    raise ValueError('never')\n" + LOSS.format("errors.margin"),
            "mine:Mine does not take its defaults: ValueError: never (",
        ),
    ],
)  # fmt: skip
def test_what_is_no_objective_is_refused(own_folder, base, body, message):
    write(own_folder, body, base)
    with pytest.raises(ConfigError) as caught:
        objectives.load("mine:Mine")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_class_that_forgot_to_be_a_dataclass_is_refused(own_folder):
    write(own_folder, LOSS.format("errors.margin"), head=HEAD.replace("@dataclass(frozen=True, kw_only=True)\n", ""))
    with pytest.raises(ConfigError, match="must be decorated with @dataclass"):
        objectives.objective_class("mine:Mine")


def test_hyperparameters_are_checked_as_those_of_built_in_ones(own_folder):
    write(own_folder, "k: int = 3\n" + LOSS.format("errors.margin * self.k"))
    with pytest.raises(
        ConfigError, match=r'Unknown key "objective.kk"\. Did you mean "k"\? "mine:Mine" takes: beta, k'
    ):
        objectives.load("mine:Mine", kk=1)
    with pytest.raises(ConfigError, match=r'"objective.beta" must be a finite number > 0'):
        objectives.load("mine:Mine", beta=-1.0)


def test_a_file_without_a_class_asks_for_one():
    with pytest.raises(ConfigError, match=r'"mine.py" is a file: say which class of it, mine.py:NAME'):
        objectives.load("mine.py")
