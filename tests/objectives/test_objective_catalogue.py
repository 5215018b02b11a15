"""Finding objectives by file, what is read of them without importing them, and what a mistake is answered with."""

import dataclasses
import math
from pathlib import Path

import pytest

import diffalign.objectives
from diffalign.errors import ConfigError
from diffalign.objectives import catalogue, entry, fields, load, names, objective_class

VALUES = (-1, 0, 1e-3, 0.5, 1.5, 1e4, math.nan, math.inf, "word", None, (1,))


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


@pytest.mark.parametrize("name", names())
class TestReadWithoutImporting:
    def test_it_agrees_with_the_class(self, name):
        read, imported = catalogue.read(name), catalogue.describe(name, objective_class(name))
        assert list(read.hyperparameters) == list(imported.hyperparameters)
        for key, known in read.hyperparameters.items():
            other = imported.hyperparameters[key]
            assert (known.default, known.meaning) == (other.default, other.meaning)
            assert known.type.partition("[")[0] == other.type
        rest = [field.name for field in dataclasses.fields(read) if field.name not in ("hyperparameters", "complete")]
        assert {key: getattr(read, key) for key in rest} == {key: getattr(imported, key) for key in rest}

    def test_it_refuses_what_the_class_refuses_and_nothing_else(self, name):
        known, build = catalogue.read(name), objective_class(name)
        assert known.complete
        for key, hyperparameter in known.hyperparameters.items():
            said = {given: refusal(known.check, {key: given}) for given in (*VALUES, *(hyperparameter.choices or ()))}
            assert said == {given: refusal(lambda it: build(**it), {key: given}) for given in said}
            assert None in said.values()
            assert len(set(said.values())) > 1

    def test_it_fills_in_the_defaults(self, name):
        assert entry(name).filled({}) == dataclasses.asdict(load(name))


def refusal(function, given):
    try:
        function(given)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "change",
    [
        ("beta: float = 5000.0", "beta: float = 5 * 1000.0"),
        ("class Plain(ScaledMargin):", "class Plain(Mixin, ScaledMargin):"),
        ("beta: float = 5000.0", "beta = 5000.0"),
    ],
)
def test_what_is_written_in_another_way_is_unreadable(tmp_path, monkeypatch, change):
    text = """from diffalign.objectives.base import ScaledMargin, check_number

@dataclass(frozen=True, kw_only=True)
class Plain(ScaledMargin):
    beta: float = 5000.0
"""
    for name, source in {"plain": text, "other": text.replace(*change)}.items():
        (tmp_path / f"{name}.py").write_text(source)
    (tmp_path / "base.py").write_text((catalogue.FOLDER / "base.py").read_text(encoding="utf8"), encoding="utf8")
    monkeypatch.setattr(catalogue, "FOLDER", tmp_path)
    catalogue._module.cache_clear()
    try:
        assert catalogue.read.__wrapped__("plain").hyperparameters["beta"].default == 5000.0
        with pytest.raises(catalogue.Unreadable):
            catalogue.read.__wrapped__("other")
    finally:
        catalogue._module.cache_clear()


def test_checks_of_another_kind_leave_the_rest_to_the_class(tmp_path, monkeypatch):
    (tmp_path / "base.py").write_text((catalogue.FOLDER / "base.py").read_text(encoding="utf8"), encoding="utf8")
    (tmp_path / "picky.py").write_text("""from diffalign.objectives.base import ScaledMargin, check_number

@dataclass(frozen=True, kw_only=True)
class Picky(ScaledMargin):
    gamma: float = 1.0
    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("gamma", self.gamma, at_least=0.0)
        if self.gamma > self.beta:
            raise ConfigError("gamma")
""")
    monkeypatch.setattr(catalogue, "FOLDER", tmp_path)
    catalogue._module.cache_clear()
    try:
        read = catalogue.read.__wrapped__("picky")
    finally:
        catalogue._module.cache_clear()
    assert not read.complete
    assert refusal(read.check, {"beta": -1.0}) == refusal(read.check, {"beta": -1.0}) is not None
    assert refusal(read.check, {"gamma": -1.0}) is not None
    assert refusal(read.check, {"gamma": 7000.0}) is None
