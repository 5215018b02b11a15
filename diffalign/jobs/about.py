"""`diffalign info`, `list` and `show`: what is installed, what there is to use, and what it means."""

import inspect
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import takewhile
from pathlib import Path

import torch
from huggingface_hub import constants as hub
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import diffalign
import reward_models
from diffalign import config as configuration
from diffalign import objectives
from diffalign.errors import ConfigError, UserError, suggestion
from diffalign.jobs.scoring import scorers
from diffalign.shapes import oracle

PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "datasets", "open_clip_torch")
# What an optional package is for, and how to get it.
OPTIONAL = {
    "xformers": ("attention kernels", "diffalign[xformers]"),
    "bitsandbytes": ("optimizer.name adamw_8bit", "diffalign[gpu]"),
    "torchao": ("low-precision frozen passes", "diffalign[gpu]"),
    "wandb": ("logging.report_to wandb", "diffalign[wandb]"),
    "ipywidgets": ("progress bars in notebooks", "diffalign[notebook]"),
}
KINDS = ("objectives", "scorers", "configs")
CHECKOUT = Path(diffalign.__file__).parent.parent


def info(console: Console) -> dict[str, dict[str, str]]:
    """Print and return versions, devices, optional parts and cache folders: what a bug report should hold."""
    sections = {
        "Versions": _versions(),
        "Devices": _devices(),
        "Optional parts": {name: _optional(name, *about) for name, about in OPTIONAL.items()},
        "Hub": _hub(),
    }
    for title, entries in sections.items():
        table = _sheet(title)
        for name, value in entries.items():
            table.add_row(name, Text(value))
        console.print(table)
    return sections


def list_kind(kind: str, console: Console) -> None:
    """Print what there is of a kind, a line each.

    Raises:
        UserError: an unknown kind.
    """
    rows: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
        "objectives": _objectives,
        "scorers": _scorers,
        "configs": _configs,
    }
    plural = kind if kind.endswith("s") else f"{kind}s"
    if plural not in rows:
        raise UserError(f'Cannot list "{kind}".{suggestion(kind, KINDS)} Expected {", ".join(KINDS)}.')
    table = _sheet()
    for name, line in rows[plural]():
        table.add_row(name, Text(line))
    console.print(table)


def show(kind: str, name: str, overrides: list[str], console: Console) -> None:
    """Print one objective, scorer or resolved configuration.

    Raises:
        UserError: an unknown kind or name.
    """
    showers: dict[str, Callable[[], str]] = {
        "objective": lambda: describe_objective(name),
        "scorer": lambda: describe_scorer(name),
        "config": lambda: configuration.dump(configuration.load(find_config(name), overrides)).rstrip(),
    }
    single = kind.removesuffix("s")
    if single not in showers:
        raise UserError(f'Cannot show "{kind}".{suggestion(kind, showers)} Expected {", ".join(showers)}.')
    if overrides and single != "config":
        raise UserError(f'"{overrides[0]}" has no effect: only a config takes KEY=VALUE.')
    console.print(showers[single](), markup=False, highlight=False, soft_wrap=True)


def describe_objective(name: str) -> str:
    """Return paper, equation, hyperparameters with their defaults, and what the objective needs."""
    found = objectives.objective_class(name)
    module = inspect.getmodule(found)
    fields = objectives.fields(name)
    lines = [f"  {key} = {field.default!r}" for key, field in fields.items()] or ["  none"]
    needs = ", ".join(sorted(found.needs)) or "nothing"
    kinds = {"pair": "pairs", "transition": "steps that it samples", "reward": "images that it draws"}
    trains_on = "the chosen images of pairs" if found.chosen_only else kinds.get(found.layout, found.layout)
    return "\n".join(
        [
            f"{name}: {inspect.cleandoc(module.__doc__)}",
            "",
            inspect.cleandoc(found.__doc__),
            "",
            "Hyperparameters (objective.KEY in a config):",
            *lines,
            "",
            f"Frozen passes: {needs}. Trains on: {trains_on}.",
            f"Code: {_relative(Path(inspect.getsourcefile(found)))}",
        ]
    )


def describe_scorer(name: str) -> str:
    """Return the card of a scorer: weights, preprocessing, formula, scale, licence, traps."""
    if name == scorers.ORACLE:
        about = inspect.cleandoc(oracle.__doc__)
        return (
            f"{name}: {about}\n\nscale         [0, 1], higher is better\nattributes    {', '.join(oracle.ATTRIBUTES)}"
        )
    if name == scorers.IMPLICIT:
        from diffalign.jobs.scoring.implicit import CARD  # with all of diffusers

        return CARD
    scorers.parse(name)
    card = reward_models.card(name)
    low, high = card.usual_range
    rows = {
        "weights": card.weights,
        "preprocessing": card.preprocessing,
        "prompt length": "not read" if card.text_length is None else f"{card.text_length} tokens, then cut",
        "formula": card.formula,
        "scale": card.scale,
        "usual range": f"{low:g} to {high:g}",
        "licence": card.licence,
        "checked with": card.source,
    }
    traps = [f"  - {trap}" for trap in card.traps]
    return "\n".join([card.name, *(f"{key:<14}{value}" for key, value in rows.items()), "traps", *traps])


def find_config(name: str) -> Path:
    """Return the configuration file `name`: a path, or one of the shipped ones such as tiny/dpo.

    Raises:
        ConfigError: there is none.
    """
    inside = f"{name.removeprefix('configs/').removesuffix('.yaml')}.yaml"
    candidates = [Path(name), *(root / inside for root in _config_roots())]
    for path in candidates:
        if path.is_file():
            return path
    known = [str(_relative(file)) for file in _config_files()]
    near = suggestion(f"configs/{inside}", known)
    raise ConfigError(f'There is no configuration "{name}".{near} Shipped: {", ".join(known) or "none"}.')


def _versions() -> dict[str, str]:
    found = {"diffalign": diffalign.__version__, "python": platform.python_version(), "system": platform.platform()}
    return found | {name: _installed(name) or "not installed" for name in PACKAGES}


def _devices() -> dict[str, str]:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    entries = {"CPU": f"{platform.machine()}, {cpus} cores, {torch.get_num_threads()} torch threads"}
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        return entries | {"CUDA": f"no device (torch is {built})", "bf16": "on the CPU only, slowly"}
    entries["CUDA"] = str(torch.version.cuda)
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = f"sm_{device.major}{device.minor}"
        entries[f"cuda:{index}"] = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {capability}"
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return entries | {"bf16": "yes" if has_bf16 else "no: use fp16 (train.mixed_precision) or float32"}


def _optional(name: str, purpose: str, extra: str) -> str:
    found = _installed(name)
    return f"{found}, for {purpose}" if found else f'not installed; for {purpose}: pip install "{extra}"'


def _hub() -> dict[str, str]:
    offline = "set: nothing is downloaded" if hub.HF_HUB_OFFLINE else "not set: models may be downloaded"
    free = _free(Path(hub.HF_HUB_CACHE))
    return {
        "HF_HUB_OFFLINE": offline,
        "models": f"{hub.HF_HUB_CACHE} ({free})",
        "latents": "data.cache_dir of a config",
    }


def _free(folder: Path) -> str:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return f"{shutil.disk_usage(existing).free / 2**30:.0f} GiB free"


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _objectives() -> Iterator[tuple[str, str]]:
    for name in objectives.names():
        module = inspect.getmodule(objectives.objective_class(name))
        yield name, inspect.cleandoc(module.__doc__).partition("\n")[0]


def _scorers() -> Iterator[tuple[str, str]]:
    for name in scorers.names():
        if name == scorers.ORACLE:
            yield name, "Measures pictures of the embedded world exactly; needs no weights."
        elif name == scorers.IMPLICIT:
            yield name, "DPO's implicit reward of a trained model against its base: implicit=runs/demo."
        else:
            card = reward_models.card(name)
            yield name, f"{card.weights}, {card.scale}, {card.licence}"


def _configs() -> Iterator[tuple[str, str]]:
    for file in _config_files():
        lines = takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf8").splitlines())
        comment = " ".join(line.lstrip("# ") for line in lines)
        yield str(_relative(file)), re.split(r"(?<=[.:]) ", comment)[0].rstrip(".:")


def _config_files() -> list[Path]:
    """Return the configurations of this folder and the shipped ones; accelerate's own are not among them."""
    files: dict[Path, Path] = {}
    for root in _config_roots():
        for file in root.rglob("*.yaml"):
            if file.parent.name != "accelerate":
                files.setdefault(file.relative_to(root), file)
    return [files[key] for key in sorted(files)]


def _config_roots() -> list[Path]:
    roots = (Path("configs"), CHECKOUT / "configs")
    return list(dict.fromkeys(path.resolve() for path in roots if path.is_dir()))


def _relative(path: Path) -> Path:
    """Return the path as one would type it here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _sheet(title: str | None = None) -> Table:
    table = Table(title=title, box=box.SIMPLE, show_header=False, title_justify="left", title_style="bold")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    return table
