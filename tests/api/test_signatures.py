"""The functions have the options of the commands, with their defaults, and all of them."""

import inspect
from pathlib import Path

import pytest
import typer

import diffalign
from diffalign.cli import app

ROOT = Path(__file__).parents[2]
GROUP = typer.main.get_command(app)
OF_NOTEBOOKS = {"quiet"}
# A function keeps files where it is told to, a command always does. Lists of words, text or None of one are the same.
DIFFERENT = {"out"}
ELSEWHERE = {
    # A dry run prints, and Python sweeps in a loop.
    "train": {"config", "overrides", "dry_run", "gpu_memory", "full", "sweep", "prompts", "scorers"},
    "generate": {"model", "prompts", "prompt"},
    "score": {"images", "scorers", "prompts", "prompt", "pairs", "skip_broken", "shard"},
    "evaluate": {"models", "prompts", "scorers"},
}


def defaults(name: str) -> dict[str, object]:
    """Return the options of a function by name."""
    parameters = inspect.signature(getattr(diffalign, name)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_options_and_defaults_are_those_of_the_command(name):
    command = {option.name: option.default for option in GROUP.commands[name].params if option.name != "help"}
    function = defaults(name)
    for option in function.keys() & command.keys() - DIFFERENT - ELSEWHERE[name]:
        assert function[option] == command[option], option
    assert function.keys() - ELSEWHERE[name] - OF_NOTEBOOKS == command.keys() - ELSEWHERE[name]


@pytest.mark.parametrize("name", [*ELSEWHERE, "load_config"])
def test_every_argument_is_explained(name):
    """Those of `load_config` are explained there."""
    function = getattr(diffalign, name)
    about = inspect.getdoc(function)
    missing = [p for p in inspect.signature(function).parameters if f"{p}:" not in about and f"`{p}`" not in about]
    passed_on = {
        "guidance_scale",
        "negative_prompt",
        "long_prompts",
        "height",
        "width",
        "batch_size",
        "dtype",
        "device",
    }
    assert set(missing) <= (passed_on if name == "evaluate" else set())
    assert "Example:" in about


@pytest.mark.parametrize("package", ["diffalign", "reward_models"])
def test_type_checkers_are_told_to_look(package):
    assert (ROOT / package / "py.typed").is_file()
