"""Read and write weights without running anybody's code, and say plainly what is wrong with a file."""

import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from reward_models.errors import ScorerError

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
WRAPPERS = ("state_dict", "model")  # keys that hold the weights in published checkpoints
PREFIXES = ("module.", "model.")  # left by DataParallel and by trainers that wrap the network


def read_state_dict(file: str | Path) -> dict[str, Tensor]:
    """Return the weights in a .safetensors or pickled state-dict file, without wrappers and prefixes.

    Pickles are read with `weights_only=True`. Raises ScorerError for a missing or truncated file, for a pickle
    that contains anything but tensors, and for an unknown suffix.
    """
    file = Path(file)
    if not file.is_file():
        raise ScorerError(f"There is no weights file {file}. Check the path.")
    if file.suffix == ".safetensors":
        state = _read_safetensors(file)
    elif file.suffix in PICKLE_SUFFIXES:
        state = _read_pickle(file)
    else:
        raise ScorerError(f"{file}: unknown kind of weights. Expected .safetensors or {', '.join(PICKLE_SUFFIXES)}.")
    return _without_wrappers(state, file)


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ScorerError(f"{_broken(file)} ({error})") from None


def _read_pickle(file: Path) -> object:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower() and "Unsupported" not in str(error):
            raise ScorerError(f"{_broken(file)} ({error})") from None
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "class" in line), "")
        raise ScorerError(_not_only_tensors(file, reason)) from None
    except (EOFError, OSError, RuntimeError, ValueError) as error:
        if "TorchScript" in str(error):
            raise ScorerError(_not_only_tensors(file, "it is a TorchScript archive")) from None
        first_line = str(error).partition("\n")[0]
        raise ScorerError(f"{_broken(file)} ({type(error).__name__}: {first_line})") from None


def _broken(file: Path) -> str:
    return f"{file} ({file.stat().st_size} bytes) is truncated or damaged. Download or copy it again."


def _not_only_tensors(file: Path, reason: str) -> str:
    return (
        f"{file} holds more than tensors, and loading it would run code stored in the file"
        f"{f' ({reason.strip()})' if reason else ''}. If you trust its origin, convert it once where its classes are "
        f'installed: model = torch.load("{file.name}", weights_only=False); '
        f'safetensors.torch.save_file(model.state_dict(), "{file.stem}.safetensors"); then load that file.'
    )


def _without_wrappers(state: object, file: Path) -> dict[str, Tensor]:
    for key in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        kind = f"keys {sorted(map(str, state))[:5]}" if isinstance(state, Mapping) else type(state).__name__
        raise ScorerError(f'{file} is no state dict: expected tensors by name, bare or under "state_dict", got {kind}.')
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy `state` into `module`; raise ScorerError unless names and shapes agree exactly."""
    expected = module.state_dict()
    # position_ids are constants that older libraries stored
    state = {key: value for key, value in state.items() if key in expected or not key.endswith("position_ids")}
    problems = {
        "missing": [key for key in expected if key not in state],
        "not part of the network": [key for key in state if key not in expected],
        "of another shape": [
            f"{key} {list(state[key].shape)} instead of {list(value.shape)}"
            for key, value in expected.items()
            if key in state and state[key].shape != value.shape
        ],
    }
    found = [f"{len(keys)} {what} (first: {', '.join(keys[:3])})" for what, keys in problems.items() if keys]
    if found:
        raise ScorerError(
            f"{source} does not fit the network: {'; '.join(found)}. "
            "Check that the file belongs to this scorer and that the config beside it describes the same sizes."
        )
    module.load_state_dict(state)


class _SkipRandomInit(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            # zeros, not what lay in memory: trunc_normal_ draws again until all values are in range
            with torch.no_grad():
                return (args[0] if args else kwargs["tensor"]).zero_()
        return func(*args, **(kwargs or {}))


@contextmanager
def skip_random_init() -> Iterator[None]:
    """Build modules without drawing weights that are about to be overwritten: seconds for a ViT-H."""
    with _SkipRandomInit():
        yield


def first_existing(folder: Path, names: Sequence[str]) -> Path:
    """Return the first of `names` in `folder`; raise ScorerError that lists what is there instead."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    present = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
    raise ScorerError(f"{folder} has no weights: expected one of {', '.join(names)}; it holds {present}.")


def is_hub_id(path_or_id: str) -> bool:
    """Tell "owner/name" and "owner/name/file" from a path; what exists on disk is always a path."""
    path = Path(path_or_id)
    starts_local = path.is_absolute() or path_or_id.startswith((".", "~")) or Path(*path.parts[:1]).is_dir()
    if path.exists() or starts_local:
        return False
    slashes = path_or_id.count("/")
    return slashes == 2 or (slashes == 1 and path.suffix not in (".safetensors", *PICKLE_SUFFIXES))


def from_hub(repository: str, *, file: str | None = None, patterns: Sequence[str] = ()) -> Path:
    """Return the local path of one hub file, or of a snapshot with the files that match `patterns`."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if file:
            return Path(huggingface_hub.hf_hub_download(repository, file))
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ScorerError(
            f"There is no local {repository}, and the Hugging Face hub does not give it "
            f"({type(error).__name__}). Check the name and the network, or give the path of a local copy."
        ) from None


def write_folder(directory: str | Path, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a temporary folder, then move its files into `directory`; a crash leaves old files intact."""
    directory = Path(directory)
    temporary = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
        write(temporary)
        directory.mkdir(exist_ok=True)
        for file in sorted(temporary.iterdir()):
            os.replace(file, directory / file.name)
    except OSError as error:
        reason = error.strerror or error
        raise ScorerError(f"Cannot write {directory} ({reason}). The files already there are intact.") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return directory


def save_safetensors(state: Mapping[str, Tensor], file: Path) -> None:
    """Write a state dict as .safetensors, marked so that transformers accepts it."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    save_file(tensors, file, metadata={"format": "pt"})
