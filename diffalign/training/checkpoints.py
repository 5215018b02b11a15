"""The checkpoints in the folder of a run: which there are, which are whole, and which go."""

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from diffalign.errors import UserError
from diffalign.training import sealing

STATE = "state.json"
REPLACED, DAMAGED = "replaced-", "damaged-"
PARTIAL, DELETED = "partial", "deleted"  # what a process that was killed may leave, under names with a dot


class CheckpointError(UserError):
    """Report a checkpoint that cannot be written, read or resumed from."""


def folders(output_dir: Path) -> list[Path]:
    """List the checkpoints of a run, the oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def fault(path: Path, *, thorough: bool = True) -> str | None:
    """Say in words why a checkpoint is not what was written; None if it is, by sizes and (`thorough`) SHA-256.

    Those before 2026-12 have no manifest; what is broken in them shows when they are read.
    """
    try:
        state = json.loads((path / STATE).read_text(encoding="utf8"))
        step, sealed = state["step"], state.get("manifest") is not None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{STATE} cannot be read ({type(error).__name__})"
    if type(step) is not int or step < 0:
        return f"{STATE} says step {step!r}"
    if sealed or sealing.is_sealed(path):
        found = sealing.fault(path, thorough=thorough)
        if found is not None:
            return found
        if sealing.said(path, "step") != step:
            return f"{STATE} says step {step}, {sealing.MANIFEST} step {sealing.said(path, 'step')}"
    named = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return f"it has done {step} steps" if named and int(named[1]) != step else None


def require_whole(path: Path, *, thorough: bool = True) -> None:
    """Raise CheckpointError if a checkpoint is not what was written."""
    found = fault(path, thorough=thorough)
    if found is not None:
        raise CheckpointError(
            f"{path} is damaged: {found}. Resume from an earlier one; --resume latest takes the last that is whole."
        )


def find(output_dir: Path, wanted: str) -> Path | None:
    """Return the checkpoint named by `resume_from_checkpoint`; None if "latest" finds none, for a fresh start.

    "latest" passes over those that are damaged, as far as names and sizes tell.

    Raises:
        CheckpointError: the folder that was named does not exist or is damaged, or all that there are.
    """
    if wanted == "latest":
        existing = folders(output_dir)
        whole = [path for path in existing if fault(path, thorough=False) is None]
        if existing and not whole:
            raise _none_whole(output_dir, {path: str(fault(path, thorough=False)) for path in existing})
        return whole[-1] if whole else None
    for path in (Path(wanted), output_dir / wanted):
        if (path / STATE).is_file() or (path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name)):
            require_whole(path, thorough=False)
            return path
    names = ", ".join(path.name for path in folders(output_dir)) or "none"
    raise CheckpointError(f'There is no checkpoint "{wanted}". Checkpoints in {output_dir}: {names}.')


def verify(output_dir: Path, wanted: str) -> list[str]:
    """Read every byte of what `find` is to return. Damaged ones newer than it are renamed; return what to say of that.

    Raises:
        CheckpointError: the checkpoint that was named is damaged, or all that there are.
    """
    if wanted != "latest":
        require_whole(find(output_dir, wanted))
        return []
    faults: dict[Path, str] = {}
    for path in reversed(folders(output_dir)):
        found = fault(path)
        if found is None:
            break
        faults[path] = found
    else:
        if faults:
            raise _none_whole(output_dir, faults)
    return [_set_damaged_aside(path, found) for path, found in faults.items()]


def _none_whole(output_dir: Path, faults: Mapping[Path, str]) -> CheckpointError:
    listed = "".join(f"\n  {path.name}: {found}" for path, found in faults.items())
    return CheckpointError(
        f"{output_dir} holds no checkpoint that is whole:{listed}\nPut a copy in place, or start afresh: --overwrite."
    )


def _set_damaged_aside(path: Path, found: str) -> str:
    numbers = ("", *(f"-{number}" for number in range(2, 100)))
    target = next(
        place for number in numbers if not (place := path.with_name(f"{DAMAGED}{path.name}{number}")).exists()
    )
    _rename(path, target)
    return f"Warning: {path} is damaged: {found}. It is now called {target.name}, and is not used."


def _rename(path: Path, target: Path) -> None:
    try:
        path.rename(target)
    except OSError as error:
        raise CheckpointError(f"Cannot rename {path}: {error.strerror}. Name another train.output_dir.") from error


def hidden(path: Path, kind: str) -> Path:
    """Return the name under which a folder is written or deleted: no half of it looks like a checkpoint."""
    return path.with_name(f".{path.name}.{kind}")


def delete(path: Path) -> None:
    """Delete a folder under another name first."""
    target = hidden(path, DELETED)
    shutil.rmtree(target, ignore_errors=True)
    with suppress(OSError):
        path.rename(target)
    shutil.rmtree(target, ignore_errors=True)


def set_aside(output_dir: Path) -> list[str]:
    """Rename the checkpoints of an earlier run, so that a fresh one is never continued from them; return what to say.

    They are deleted when the fresh run has written its own first one.

    Raises:
        CheckpointError: the folder may not be written.
    """
    earlier = folders(output_dir)
    for path in earlier:
        target = path.with_name(REPLACED + path.name)
        delete(target)
        _rename(path, target)
    if not earlier:
        return []
    return [
        f"{output_dir} held {', '.join(path.name for path in earlier)} of an earlier run. They are now called "
        f"{REPLACED}checkpoint-* and go when this run writes its first checkpoint. To continue that run instead: stop, "
        "name them as before, and add --resume latest."
    ]


def superseded(output_dir: Path, step: int, limit: int | None) -> list[Path]:
    """List the checkpoints beyond the limit: those of later steps, left here by another run, go before the oldest.

    Damaged ones do not count, and stay.
    """
    existing = [path for path in folders(output_dir) if fault(path, thorough=False) is None]
    later = [path for path in existing if _step_of(path) > step]
    return [*later, *(path for path in existing if path not in later)][:-limit] if limit else []


def clear(output_dir: Path, step: int, limit: int | None) -> None:
    """Delete what the checkpoint of `step` makes superfluous, and what killed processes left."""
    for path in [*superseded(output_dir, step, limit), *output_dir.glob(f"{REPLACED}checkpoint-*")]:
        delete(path)
    for kind in (PARTIAL, DELETED):
        for path in output_dir.glob(f".*checkpoint-*.{kind}"):
            shutil.rmtree(path, ignore_errors=True)
