"""Code of users' own: `module:Name`, `file.py:Name`, or a short name that an installed package publishes.

Objectives, scorers and the judges of protocols are all found here; what each must offer is checked where it is used.
A plug-in is loaded once a process, with the current folder importable, and hashed as it was loaded: a file that is
edited while a run goes on changes nothing of that run.
"""

import functools
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from diffalign.errors import ConfigError, UserError, suggestion

OBJECTIVES, SCORERS = "diffalign.objectives", "diffalign.scorers"  # groups of entry points
PAGE = "docs/plugins.md"


@dataclass(frozen=True)
class Plugin:
    """Hold what an address names, and the code that it comes from."""

    address: str
    value: Any
    file: Path
    source: str  # hash of the file, and of the one that defines the class if that is another


@functools.cache
def load(address: str) -> Plugin:
    """Return what `module:Name` or `path/to/file.py:Name` names.

    Raises:
        ConfigError: no such file, module or name, or the code fails: then its own words and line.
    """
    place, _, name = address.rpartition(":")
    if not place or not name:
        raise ConfigError(f'"{address}" must be MODULE:NAME or FILE.py:NAME, such as my_losses:DPOP. See {PAGE}.')
    module = _of_file(Path(place).expanduser()) if _is_file(place) else _of_module(place)
    if name not in vars(module):
        raise ConfigError(f'{_where(module)} has no "{name}".{_near(name, module)}')
    value = vars(module)[name]
    files = [module.__file__]
    if isinstance(value, type):
        files.append(getattr(sys.modules.get(value.__module__), "__file__", None))
    content = b"".join(Path(file).read_bytes() for file in dict.fromkeys(files) if file)
    return Plugin(address, value, Path(module.__file__), hashlib.blake2b(content, digest_size=8).hexdigest())


def address(name: str, group: str, built_in: Container[str]) -> str | None:
    """Return the address of a plug-in that is named by it or by its published name; None for any other name.

    Raises:
        ConfigError: a published name that is built in, or that two packages publish.
    """
    if ":" in name:
        return name
    entries = published(group).get(name, ())
    if entries and (name in built_in or len(entries) > 1):
        others = "is built in" if name in built_in else f"{package(entries[1])} publishes too"
        raise ConfigError(
            f'{package(entries[0])} publishes "{name}" in {group}, a name that {others}. Uninstall the package or '
            f"rename its entry point; by its address, {_address_of(entries[0])}, it can be used as it is."
        )
    return _address_of(entries[0]) if entries else None


@functools.cache
def published(group: str) -> dict[str, tuple[EntryPoint, ...]]:
    """Return by name the entry points of installed packages, sorted by name."""
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for entry in sorted(entry_points(group=group), key=lambda entry: entry.name):
        found[entry.name] = (*found.get(entry.name, ()), entry)
    return found


def package(entry: EntryPoint) -> str:
    """Return the package of an entry point, with its version."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value


def listed(group: str, built_in: Container[str]) -> Iterator[tuple[str, str]]:
    """Yield name and description of what installed packages publish; one that cannot be used says why."""
    for name, entries in published(group).items():
        try:
            about = summary(load(address(name, group, built_in) or "").value)
        except ConfigError as error:
            about = f"cannot be used: {error}"
        yield name, f"{about} ({', '.join(map(package, entries))})"


def summary(value: Any) -> str:
    """Return the first line of a docstring."""
    return (value.__doc__ or "").strip().partition("\n")[0]


@contextmanager
def told(what: str, folder: Path) -> Iterator[None]:
    """Word an exception of a plug-in in one line, with the last line of code in `folder` that it passed through.

    Raises:
        ConfigError: for any exception that is no UserError.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # code of others raises what it likes
        words = (error.msg if isinstance(error, SyntaxError) else str(error)).partition("\n")[0]
        raise ConfigError(f"{what}: {type(error).__name__}: {words} ({_line_of(error, folder)})") from error


def _line_of(error: Exception, folder: Path) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(folder)]
    frame = (own or frames)[-1]
    return f"{frame.filename}, line {frame.lineno}"


def _is_file(place: str) -> bool:
    return place.endswith(".py")


def _of_file(file: Path) -> ModuleType:
    """Load a file under a name that its path alone decides, so that files of one name do not meet."""
    path = file.resolve()
    if not path.is_file():
        beside = [other.name for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ConfigError(f"There is no file {file}.{suggestion(file.name, beside)} Paths start at {Path.cwd()}.")
    name = f"{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up the module of their class
    try:
        with told(f"{file} cannot be loaded", path.parent), _importable_folder():
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _of_module(name: str) -> ModuleType:
    with told(f'The module "{name}" cannot be loaded', Path.cwd()), _importable_folder():
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # what it imports is missing
            here = [file.stem for file in Path.cwd().glob("*.py")]
            raise ConfigError(
                f'There is no module "{name}", neither in {Path.cwd()} nor installed.{suggestion(name, here)}'
            ) from None


@contextmanager
def _importable_folder() -> Iterator[None]:
    """Let the current folder be imported from, as `python -m` does and an installed command does not."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    importlib.invalidate_caches()  # a file may be younger than what the finder remembers
    try:
        yield
    finally:
        sys.path.remove(folder)


def _address_of(entry: EntryPoint) -> str:
    return f"{entry.module}:{entry.attr}"


def _where(module: ModuleType) -> str:
    return module.__file__ or module.__name__


def _near(name: str, module: ModuleType) -> str:
    own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return suggestion(name, own) or (f" It defines {', '.join(own)}." if own else " It defines nothing.")
