"""Imports run one way, the lowest layers need nothing but torch, and every module can be imported."""

import ast
import graphlib
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the ground up. A module imports its own package and the layers below it, never a neighbour in its layer.
LAYERS = (
    {"errors", "places", "vocabulary"},
    {"text_files"},
    {"yaml_text", "plugins", "pictures", "progress", "interrupts", "folder_lock", "webpages"},
    {"objectives"},
    {"denoising"},
    {"backbones", "data"},
    {"rollout", "training", "evaluation", "filtering", "labelling", "captioning", "shapes"},
    {"config"},
    {"jobs"},
    {"api", "cli"},
    {"__main__"},
)
# The wings of jobs/, from the ground up, by the same rule.
WINGS = (
    {"devices", "sheets", "skipped"},
    {"drawing", "rewards", "captioning"},
    {"scoring"},
    {"training"},
    {"evaluating", "world"},
    {"about", "info", "votes"},
    {"label"},
)
USES_REWARD_MODELS = (
    "diffalign.rollout",
    "diffalign.filtering",
    "diffalign.evaluation",
    "diffalign.shapes",
    "diffalign.jobs",
    "diffalign.cli",
)
TORCH_ONLY = ("objectives", "denoising")
HEAVY = {
    "torch",
    "numpy",
    "pandas",
    "pydantic",
    "rich",
    "yaml",
    "PIL",
    "typer",
    "diffusers",
    "transformers",
    "accelerate",
}
OPTIONAL = {  # imported on demand, where they are installed
    "diffalign.denoising.kernels.triton_kernels": {"triton"},
    "diffalign.denoising.kernels.triton_activations": {"triton"},
    "diffalign.denoising.acceleration": {"torchao"},
}


def module_name(path: Path) -> str:
    """Return the dotted name of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_of(package: str) -> dict[str, Path]:
    """Return the source files of a top-level package by dotted name."""
    return {module_name(path): path for path in sorted((ROOT / package).rglob("*.py"))}


class ForTypeCheckers(ast.NodeTransformer):
    """Drop what only type checkers see: the blocks of `if TYPE_CHECKING`."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


def imports_of(path: Path, executed: bool = False) -> set[str]:
    """Return the dotted names a file imports anywhere, in functions too; with `executed` not for type checkers only."""
    package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    found, tree = set(), ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(ForTypeCheckers().visit(tree) if executed else tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # `from diffalign import errors` names a module, `from torch import Tensor` does not: keep both spellings.
            found |= {source} | {f"{source}.{alias.name}" for alias in node.names}
    return found


def within(name: str, package: str) -> bool:
    """Tell whether a dotted name is a package or lies in it."""
    return name == package or name.startswith(f"{package}.")


def height_of(part: str, layers: tuple[set[str], ...]) -> int:
    """Return which of `layers` a package or module belongs to."""
    for height, members in enumerate(layers):
        if part in members:
            return height
    raise AssertionError(f'"{part}" has no layer: enter it in LAYERS or WINGS of {Path(__file__).name}')


def upward_imports(name: str, path: Path, root: str = "diffalign", layers: tuple[set[str], ...] = LAYERS) -> list[str]:
    """Return the imports of a module below the package `root` that go up or sideways among its `layers`."""
    depth = root.count(".") + 1
    own = name.split(".")[depth]
    parts = {imported.split(".")[depth] for imported in imports_of(path) if imported.startswith(f"{root}.")}
    known = parts & set().union(*layers)
    return sorted(part for part in known - {own} if height_of(part, layers) >= height_of(own, layers))


DIFFALIGN = modules_of("diffalign")
REWARD_MODELS = modules_of("reward_models")
LAYERED = {name: path for name, path in DIFFALIGN.items() if name != "diffalign"}


@pytest.mark.parametrize("name", LAYERED)
def test_imports_run_one_way(name):
    assert upward_imports(name, LAYERED[name]) == []


@pytest.mark.parametrize("name", [name for name in LAYERED if name.startswith("diffalign.jobs.")])
def test_wings_import_the_wings_below_them(name):
    assert upward_imports(name, LAYERED[name], "diffalign.jobs", WINGS) == []


def test_no_modules_import_each_other():
    """In functions neither. A package is left out: its __init__ gathers names for those outside it."""
    graph = {name: imports_of(path) & DIFFALIGN.keys() for name, path in DIFFALIGN.items() if path.stem != "__init__"}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_root_package_imports_no_layer():
    file = DIFFALIGN["diffalign"]
    assert not {name for name in imports_of(file, executed=True) if within(name, "diffalign")}
    seen = {name.rpartition(".")[2] for name in imports_of(file) if within(name, "diffalign.api")}
    assert {"evaluate", "generate", "load_config", "score", "train"} <= seen  # by type checkers


def test_the_names_of_the_root_package_are_found_when_asked_for():
    diffalign = importlib.import_module("diffalign")
    assert dir(diffalign) == diffalign.__all__
    names = [name for name in diffalign.__all__ if name != "__version__"]
    assert [getattr(diffalign, name).__name__.removeprefix("diffalign.") for name in names] == names
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        diffalign.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("code", "said", "allowed"),
    [
        ("import diffalign; print('diffalign', diffalign.__version__)", "diffalign 0.1.0", set()),
        ("runpy.run_module('diffalign', run_name='__main__')", "diffalign 0.1.0", {"rich", "typer"}),
    ],
    ids=["import", "--version"],
)
def test_what_computes_nothing_imports_nothing_heavy(code, said, allowed):
    """Python is ready at once, and so is `diffalign --version`."""
    lines = [
        "import atexit, runpy, sys",
        f"atexit.register(lambda: print(*({HEAVY} & sys.modules.keys())))",
        "sys.argv = ['diffalign', '--version']",
        code,
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    version, loaded = done.stdout.splitlines()
    assert version == said
    assert set(loaded.split()) <= allowed


@pytest.mark.parametrize("name", [name for name in LAYERED if name.split(".")[1] in TORCH_ONLY])
def test_lowest_layers_import_torch_only(name):
    outside = {imported.split(".")[0] for imported in imports_of(LAYERED[name])}
    assert outside - set(sys.stdlib_module_names) <= {"torch", "diffalign"} | OPTIONAL.get(name, set())


@pytest.mark.parametrize("name", REWARD_MODELS)
def test_reward_models_stand_alone(name):
    assert not {imported for imported in imports_of(REWARD_MODELS[name]) if within(imported, "diffalign")}


@pytest.mark.parametrize("name", LAYERED)
def test_reward_models_are_used_where_images_are_judged(name):
    uses = {imported for imported in imports_of(LAYERED[name]) if within(imported, "reward_models")}
    uses = {imported for imported in uses if not within(imported, "reward_models.pictures")}  # opening is no judging
    assert not uses or any(within(name, user) for user in USES_REWARD_MODELS)


@pytest.mark.parametrize("name", [name for name in {**DIFFALIGN, **REWARD_MODELS} if not name.endswith("__main__")])
def test_every_module_imports(name):
    if ".kernels.triton_" in name:
        pytest.importorskip("triton")
    importlib.import_module(name)


@pytest.mark.parametrize("name", ["diffalign.cli.app", "diffalign.jobs.scoring.score"])
def test_what_draws_nothing_starts_without_diffusers(name):
    """It takes seconds to import."""
    code = f"import sys, {name}; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_names_of_the_evaluation_are_found_when_asked_for():
    package = importlib.import_module("diffalign.evaluation")
    assert all(getattr(package, name).__name__ == name for name in package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_an_upward_import_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "diffalign" / "denoising" / "bad.py"
    path.parent.mkdir(parents=True)
    path.write_text("import torch\ndef f():\n    from diffalign import data\n    from ..backbones.sd15 import SD15\n")
    assert upward_imports("diffalign.denoising.bad", path) == ["backbones", "data"]


def test_an_upward_import_among_wings_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "diffalign" / "jobs" / "drawing" / "bad.py"
    path.parent.mkdir(parents=True)
    path.write_text("from diffalign.jobs import devices\ndef f():\n    from diffalign.jobs.scoring import scorers\n")
    assert upward_imports("diffalign.jobs.drawing.bad", path, "diffalign.jobs", WINGS) == ["scoring"]
