"""Finding objectives by file, and what a user's mistake is answered with."""

from pathlib import Path

import pytest

import diffalign.objectives
from diffalign.errors import ConfigError
from diffalign.objectives import fields, load, names


def test_names_are_the_files():
    files = {path.stem for path in Path(diffalign.objectives.__file__).parent.glob("*.py")}
    assert names() == sorted(files - {"__init__", *diffalign.objectives.NO_OBJECTIVES})
    assert {"dpo", "sft"} <= set(names())


def test_fields_are_typed_and_have_defaults():
    assert fields("dpo")["beta"].type is float
    assert fields("dpo")["beta"].default == 5000.0
    assert fields("sft") == {}


@pytest.mark.parametrize(
    ("name", "hyperparameters", "message"),
    [
        ("dop", {}, 'Unknown objective "dop". Did you mean "dpo"? Available: '),
        ("base", {}, 'Unknown objective "base".'),
        ("dpo", {"betta": 1.0}, 'Unknown key "objective.betta". Did you mean "beta"? "dpo" takes: beta, label_smooth'),
        ("sft", {"zeta": 1.0}, 'Unknown key "objective.zeta". "sft" takes: no hyperparameters.'),
    ],
)
def test_mistakes_are_answered_with_the_fix(name, hyperparameters, message):
    with pytest.raises(ConfigError) as caught:
        load(name, **hyperparameters)
    assert str(caught.value).startswith(message)
