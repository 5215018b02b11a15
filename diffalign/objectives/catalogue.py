"""What the objectives are, read from their files without importing them: importing them takes torch, and so seconds.

Their classes are plain dataclasses in a line of inheritance within this package, so their names, hyperparameters and
traits can be read from the syntax. Whatever is written in another way raises `Unreadable`, and is imported instead.
"""

import ast
import dataclasses
import functools
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.errors import ConfigError, suggestion
from diffalign.objectives.hyperparameters import Hyperparameter

FOLDER = Path(__file__).parent
PACKAGE = __name__.rpartition(".")[0]
ROOT = "Objective"
TRAITS = ("needs", "layout", "chosen_only", "noising", "rollout")
_ARGUMENT = re.compile(r"^ {4}(\w+): (.*)")
# check_number with its limits by name, or check_choice with its choices by place.
_CHECK = re.compile(r"check_(?:number\('(\w+)', self\.\1(?:, \w+=[^,]+)*|choice\('(\w+)', self\.\2, [^=]+)\)$", re.S)


class Unreadable(Exception):
    """Report that a file is not written as `read` expects, which is no mistake."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One objective: what may be known of it without building it."""

    name: str
    file: Path
    paper: str  # the first lines of the file
    about: str  # the docstring of the class
    hyperparameters: dict[str, Hyperparameter]
    needs: frozenset[str] | None  # None: it follows from the hyperparameters
    layout: str
    chosen_only: bool
    noising: str
    rollout: str
    complete: bool  # `check` finds whatever building it would

    def check(self, given: dict[str, Any]) -> None:
        """Raise ConfigError for an unknown hyperparameter, or a value that is known to be refused."""
        for key, value in given.items():
            if key not in self.hyperparameters:
                takes = ", ".join(self.hyperparameters) or "no hyperparameters"
                hint = suggestion(str(key), self.hyperparameters)
                raise ConfigError(f'Unknown key "objective.{key}".{hint} "{self.name}" takes: {takes}.')
            self.hyperparameters[key].check(value)

    def filled(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return all hyperparameters, those that are not given at their defaults."""
        return {key: known.normal(given.get(key, known.default)) for key, known in self.hyperparameters.items()}


def describe(name: str, found: type) -> Entry:
    """Return the entry of an objective that is imported already."""
    meanings = _arguments(inspect.getdoc(found) or "")
    fields = {
        field.name: Hyperparameter(
            name=field.name,
            type=getattr(field.type, "__name__", str(field.type)),
            default=field.default,
            meaning=meanings.get(field.name, ""),
        )
        for field in dataclasses.fields(found)
    }
    traits = {trait: getattr(found, trait) for trait in TRAITS}
    if not isinstance(traits["needs"], frozenset):
        traits["needs"] = None  # a property
    return Entry(
        name=name,
        file=Path(inspect.getsourcefile(found)),
        paper=inspect.cleandoc(inspect.getmodule(found).__doc__ or name),
        about=inspect.getdoc(found) or "",
        hyperparameters=fields,
        **traits,
        complete=False,
    )


@functools.cache
def read(name: str) -> Entry:
    """Return the entry of the objective in the file `name` of this package.

    Raises:
        Unreadable: it can only be imported.
    """
    module = _module(name)
    lines = {found: line for found in module.classes if (line := _line(module, found))}
    if len(lines) != 1:
        raise Unreadable(f"{name} defines {len(lines)} objectives")
    ((_, line),) = lines.items()
    found = _Found()
    for node, origin in line:
        found.add(node, origin)
    return Entry(
        name=name,
        file=module.file,
        paper=inspect.cleandoc(ast.get_docstring(module.tree) or name),
        about=ast.get_docstring(line[-1][0]) or "",
        hyperparameters=found.hyperparameters(),
        **{trait: found.trait(trait) for trait in TRAITS},
        complete=found.complete,
    )


@dataclass(frozen=True, eq=False)
class _Module:
    """A file of this package, parsed."""

    file: Path
    tree: ast.Module

    @functools.cached_property
    def classes(self) -> dict[str, ast.ClassDef]:
        """Return the classes by name."""
        return {node.name: node for node in self.tree.body if isinstance(node, ast.ClassDef)}

    @functools.cached_property
    def imported(self) -> dict[str, tuple[str, str]]:
        """Return what is imported from other files of the package: name here -> (file, name there)."""
        froms = [node for node in self.tree.body if isinstance(node, ast.ImportFrom)]
        return {
            alias.asname or alias.name: (node.module.rpartition(".")[2], alias.name)
            for node in froms
            if node.module and node.module.startswith(f"{PACKAGE}.")
            for alias in node.names
        }

    @functools.cached_property
    def constants(self) -> dict[str, ast.expr]:
        """Return the values assigned in the file itself."""
        assigned = [node for node in self.tree.body if isinstance(node, ast.Assign)]
        return {target.id: node.value for node in assigned for target in node.targets if isinstance(target, ast.Name)}


class _Found:
    """Gather what a line of classes says, from the root down: what comes later replaces what was there."""

    def __init__(self) -> None:
        self.types: dict[str, str] = {}
        self.defaults: dict[str, Any] = {}
        self.traits: dict[str, Any] = {}
        self.meanings: dict[str, str] = {}
        self.checks: dict[str, dict[str, Any]] = {}  # by hyperparameter: what `Hyperparameter` calls it
        self.complete = True

    def add(self, node: ast.ClassDef, module: _Module) -> None:
        """Take one class."""
        self.meanings |= _arguments(ast.get_docstring(node) or "")
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                self._declare(statement.target.id, statement, module)
            elif isinstance(statement, ast.FunctionDef) and statement.name == "__post_init__":
                self._check(statement, module)
            elif isinstance(statement, ast.FunctionDef) and statement.name in TRAITS:
                self.traits[statement.name] = None
            elif isinstance(statement, ast.Assign):
                raise Unreadable(f"{node.name} assigns without a type")

    def _declare(self, name: str, statement: ast.AnnAssign, module: _Module) -> None:
        of_the_class = ast.unparse(statement.annotation).startswith(("ClassVar", "typing.ClassVar"))
        if statement.value is None:
            if of_the_class:
                return
            raise Unreadable(f"{name} has no default")
        value = _value(statement.value, module)
        if of_the_class:
            self.traits[name] = value
        else:
            self.types[name], self.defaults[name] = ast.unparse(statement.annotation), value

    def _check(self, function: ast.FunctionDef, module: _Module) -> None:
        """Read the calls of check_number and check_choice; another statement leaves the rest to the class itself."""
        kept, self.checks, complete = self.checks, {}, True
        for statement in function.body:
            text = ast.unparse(statement)
            if text == "super().__post_init__()":
                self.checks |= kept
                complete = complete and self.complete
            elif _CHECK.match(text):
                call = statement.value
                limits = {item.arg: _value(item.value, module) for item in call.keywords}
                checked = {"choices": _value(call.args[2], module)} if len(call.args) > 2 else {"bounds": limits}
                self.checks[call.args[0].value] = checked
            else:
                complete = False
        self.complete = complete

    def trait(self, name: str) -> Any:
        """Return what the classes declare."""
        if name not in self.traits:
            raise Unreadable(f"{name} is not declared")
        return self.traits[name]

    def hyperparameters(self) -> dict[str, Hyperparameter]:
        """Return the fields, in the dataclass's order."""
        return {
            name: Hyperparameter(
                name=name,
                type=self.types[name],
                default=self.defaults[name],
                meaning=self.meanings.get(name, ""),
                **self.checks.get(name, {}),
            )
            for name in self.types
        }


@functools.cache
def _module(name: str) -> _Module:
    file = FOLDER / f"{name}.py"
    if not file.is_file():
        raise Unreadable(f"{name} is no file of this package")
    return _Module(file, ast.parse(file.read_text(encoding="utf8")))


def _line(module: _Module, name: str) -> list[tuple[ast.ClassDef, _Module]]:
    """Return the classes from the root down to `name`, each with its file; none if it is no objective."""
    if name not in module.classes:
        file, there = module.imported.get(name, (None, None))
        return _line(_module(file), there) if file else []
    node = module.classes[name]
    if name == ROOT:
        return [(node, module)]
    bases = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
    lines = [_line(module, base.id) for base in bases if isinstance(base, ast.Name)]
    if not any(lines):
        return []
    if len(bases) != 1:
        raise Unreadable(f"{name} has several bases")
    return [*lines[0], (node, module)]


def _value(node: ast.expr, module: _Module) -> Any:
    """Evaluate a literal, a frozenset of one, or the name of a constant of the file."""
    if isinstance(node, ast.Name) and node.id in module.constants:
        return _value(module.constants[node.id], module)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "frozenset" and not node.keywords:
        return frozenset(*(_value(argument, module) for argument in node.args))
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise Unreadable(f"{ast.unparse(node)} is no literal") from None


def _arguments(docstring: str) -> dict[str, str]:
    """Return the meanings under `Args:` of a cleaned docstring, a line each."""
    found: dict[str, list[str]] = {}
    for line in _block(docstring, "Args:"):
        if match := _ARGUMENT.match(line):
            found[match[1]] = [match[2]]
        elif found:
            found[list(found)[-1]].append(line.strip())
    return {name: " ".join(lines) for name, lines in found.items()}


def _block(docstring: str, title: str) -> Iterator[str]:
    """Yield the indented lines that follow a title."""
    lines = iter(docstring.splitlines())
    if any(line == title for line in lines):
        for line in lines:
            if not line.startswith("    "):
                return
            yield line
