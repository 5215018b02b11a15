"""The reference's errors of every (example, draw), computed once: for later epochs, sweeps and other objectives."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from diffalign.data.cache_store import exclusive, write_json
from diffalign.data.fingerprints import digest_bytes
from diffalign.data.visits import Visit
from diffalign.errors import DataError

FORMAT = 1  # raise it whenever the file, or the way errors or draws are computed, changes
ERRORS, IDENTITY = "errors.npy", "identity.json"


class ReferenceCache:
    """Keep one float32 for each draw, example and image in a memory-mapped file [K,P,k]; NaN is not yet known.

    The file lies in a folder named after a hash of all the errors depend on, so it cannot be out of date. Errors are
    without min-SNR weights. Several processes may fill one file: an element is written as a whole, and whoever writes
    it writes the same number. What was written survives the process.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._errors = np.load(folder / ERRORS, mmap_mode="r+")

    @classmethod
    def open(
        cls,
        directory: str | Path,
        identity: dict[str, Any],
        shape: tuple[int, int, int],
        report: Callable[[str], Any] = print,
    ) -> Self:
        """Open the cache of this identity, or make an empty one. A file that is torn is made anew, and reported.

        Args:
            directory: where caches lie, each in a folder of its own.
            identity: what the errors depend on, as JSON.
            shape: [K,P,k], how many draws, examples and images an example.
            report: told in words if a file had to be thrown away.

        Raises:
            DataError: the file cannot be written.
        """
        identity = {"format": FORMAT, "shape": list(shape), **identity}
        key = digest_bytes(json.dumps(identity, sort_keys=True).encode()).hex()[:16]
        folder = Path(directory) / f"reference-{key}"
        with exclusive(folder):  # every process asks; one makes the file while the others wait
            fault = _fault(folder / ERRORS, shape)
            if fault is not None:
                if (folder / ERRORS).exists():
                    report(f"{folder / ERRORS} {fault}: its errors are computed again.")
                _create(folder, identity, shape)
        return cls(folder)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return [K,P,k]."""
        return self._errors.shape

    @property
    def complete(self) -> bool:
        """Tell whether all errors are known: then no reference network is needed."""
        return not np.isnan(self._errors).any()

    def unknown(self) -> list[Visit]:
        """Return the examples and draws of which some error is not known."""
        draws, examples = np.isnan(self._errors).any(axis=2).nonzero()
        return [Visit(example, draw) for draw, example in zip(draws.tolist(), examples.tolist(), strict=True)]

    def errors(
        self, visits: Sequence[Visit], evaluate: Callable[[Tensor], Tensor], device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Return the errors [N] of B visits and the share [B] of them that was known, float32 on `device`.

        N = k*B rows come in the order of a batch: [first images, second images, ...]. `evaluate` is given the rows [M]
        whose error is not known, and returns it [M]; it is not called if there are none.
        """
        places = [visit.draw for visit in visits], [int(visit) for visit in visits]
        known = np.asarray(self._errors[places])  # [B,k], a copy
        hits, rows = ~np.isnan(known), known.T.reshape(-1)
        missing = np.flatnonzero(np.isnan(rows))
        if len(missing):
            rows[missing] = evaluate(torch.from_numpy(missing)).detach().cpu().numpy()
            # An overflow is not worth keeping: NaN stays "not known".
            self._errors[places] = np.where(np.isfinite(rows), rows, np.nan).reshape(known.shape[::-1]).T
        found = torch.from_numpy(rows).to(device, non_blocking=True)
        return found, torch.from_numpy(hits.mean(axis=1, dtype=np.float32)).to(device, non_blocking=True)


def _fault(file: Path, shape: tuple[int, ...]) -> str | None:
    """Say what is wrong with a file, None if it is whole."""
    try:
        errors = np.load(file, mmap_mode="r")
    except FileNotFoundError:
        return "is missing"
    except (ValueError, EOFError, OSError):
        return "is torn"
    if errors.shape != shape or errors.dtype != np.float32:
        return f"holds {errors.dtype} {list(errors.shape)}, not float32 {list(shape)}"
    size, expected = file.stat().st_size, errors.offset + errors.nbytes
    return None if size == expected else f"has {size} bytes, expected {expected}"


def _create(folder: Path, identity: dict[str, Any], shape: tuple[int, ...]) -> None:
    """Write a file in which nothing is known, in one step. All of it: a full disk shows here, not while training."""
    partial = folder / f"{ERRORS}.partial"
    try:
        with open(partial, "wb") as file:
            np.save(file, np.full(shape, np.nan, dtype=np.float32))
            file.flush()
            os.fsync(file.fileno())
        write_json(folder / IDENTITY, identity)
        os.replace(partial, folder / ERRORS)
    except OSError as error:
        raise DataError(
            f"Cannot write {folder / ERRORS}: {error.strerror}. Make room, choose another data.cache_dir, or set "
            "reference.cache_draws to a smaller number or null."
        ) from error
