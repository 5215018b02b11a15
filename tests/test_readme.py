"""The front page: its commands parse and plan their runs, its links lead somewhere, and every method has a row."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from rich.console import Console

from diffalign import config as configuration
from diffalign import objectives
from diffalign.cli import app
from diffalign.jobs.training import plan, preflight

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf8")
METHODS = (ROOT / "docs" / "methods" / "README.md").read_text(encoding="utf8")
# Package pages show the README too, where relative links lead nowhere.
OURS = re.compile(
    r"https://(?:github\.com/diffalign/diffalign/(?:blob|tree)|raw\.githubusercontent\.com/diffalign/diffalign)/main/(.+)"
)
GROUP = typer.main.get_command(app)


def commands() -> list[list[str]]:
    """Return the arguments of every diffalign command in a code block."""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE):
        for line in block.splitlines() if not language else []:
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words[:2] == ["accelerate", "launch"]:
                words = ["diffalign", *words[words.index("-m") + 2 :]]
            if words and words[0] == "diffalign":
                found.append(words[1:])
    return found


def parse(words: list[str]):
    """Parse a command without running it; click complains about what it does not know."""
    name, command = words[0], GROUP.commands[words[0]]
    if hasattr(command, "commands"):
        return parse_in(command, words[1:])
    return command.make_context(name, list(words[1:]))


def parse_in(group, words: list[str]):
    return group.commands[words[0]].make_context(words[0], list(words[1:]))


def test_the_readme_has_commands():
    names = {words[0] for words in commands()}
    assert {"train", "grid"} <= names


def test_it_is_a_front_page():
    assert len(README.splitlines()) < 150


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_parse(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert parse(words) is not None


@pytest.mark.parametrize("words", [w for w in commands() if w[0] == "train" and "betta" not in str(w)], ids=" ".join)
def test_training_commands_plan_their_run(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    context = parse(words)
    config = configuration.load(context.params["config"], list(context.params["overrides"] or []))
    console = Console(record=True, width=200)
    plan.show(config, preflight.examine(config), console)
    assert "pairs per optimizer step" in console.export_text()


def test_the_table_lists_every_objective():
    listed = re.findall(r"^\| `(\w+)` \|", METHODS, flags=re.MULTILINE)
    assert sorted(listed) == objectives.built_in()


def test_every_link_is_absolute_and_leads_to_a_file():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(targets) > 20
    for target in targets:
        assert (ROOT / OURS.fullmatch(target)[1]).exists(), target


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.name)
def test_every_link_of_the_docs_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name}" in index, page.name


def test_every_configuration_is_named_in_a_table():
    row = {
        name: line
        for line in METHODS.splitlines()
        for name in objectives.built_in()
        if line.startswith(f"| `{name}` |")
    }
    for folder in ("tiny", "sd15", "sdxl"):
        for path in (ROOT / "configs" / folder).glob("*.yaml"):
            name = configuration.load(path).objective_name
            assert folder in row[name], path
