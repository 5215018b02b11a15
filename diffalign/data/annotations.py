"""What was found out about pairs after they were judged: scores of reward models and weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diffalign.data.parquet import READ_ERRORS
from diffalign.errors import DataError, suggestion

SCORES = ("score_chosen", "score_rejected")
SCORE_THEM = "diffalign score DATA --out FILE --with pickscore"


@dataclass(frozen=True)
class Annotations:
    """Hold scores and weights of M pairs by example id."""

    name: str  # where they are from, for messages
    ids: np.ndarray  # int64 [M], increasing
    scores: np.ndarray | None = None  # float64 [M,2]: of the chosen and of the rejected image, higher is better
    weights: np.ndarray | None = None  # float64 [M], at least 0

    @classmethod
    def read(cls, file: str | Path, scorer: str | None = None) -> Self:
        """Read a parquet file with a row for each pair, as `diffalign score` on pairs writes it.

        Columns: example_id; score_chosen and score_rejected, and `scorer` where they are of several; and/or weight.

        Args:
            file: the file.
            scorer: whose scores to take; may be None if there are those of one only.

        Raises:
            DataError: no such file, missing columns, an unknown scorer, values that are not finite, negative weights,
                or an example id that stands for different values.
        """
        table = _table(Path(file))
        if "scorer" in table.column_names:
            table = table.filter(pc.equal(table.column("scorer"), _choose(table, scorer, file)))
        ids = _numbers(table, "example_id", file).astype(np.int64)
        has_scores = SCORES[0] in table.column_names
        scores = np.stack([_numbers(table, name, file) for name in SCORES], axis=1) if has_scores else None
        weights = _numbers(table, "weight", file) if "weight" in table.column_names else None
        if weights is not None and weights.min(initial=0) < 0:
            row = int(weights.argmin())
            raise DataError(f"{file}, row {row}: the weight is {weights[row]}, expected a number of at least 0.")
        columns = [x.reshape(len(ids), -1) for x in (scores, weights) if x is not None]
        kept = _unique(ids, np.concatenate(columns, axis=1), file)
        return cls(str(file), *(None if x is None else x[kept] for x in (ids, scores, weights)))

    def rows(self, example_ids: np.ndarray) -> np.ndarray:
        """Return the rows [P] of pairs.

        Raises:
            DataError: some have none; how many, and what to run.
        """
        found = np.minimum(np.searchsorted(self.ids, example_ids), max(0, len(self.ids) - 1))
        known = self.ids[found] == example_ids if len(self.ids) else np.zeros(len(example_ids), dtype=bool)
        if not known.all():
            first = int(np.flatnonzero(~known)[0])
            raise DataError(
                f"{self.name} lacks {int((~known).sum())} of {len(known)} pairs (the first is pair {first}, example_id "
                f"{int(example_ids[first])}). Score the data that is trained on: {SCORE_THEM}"
            )
        return found


def _table(file: Path) -> pa.Table:
    """Read the columns that matter."""
    if not file.is_file():
        raise DataError(f"There is no file {file}. Make it with: {SCORE_THEM}")
    try:
        names = pq.read_schema(file).names
        table = pq.read_table(file, columns=[n for n in ("example_id", "scorer", *SCORES, "weight") if n in names])
    except READ_ERRORS as error:
        raise DataError(f"{file} is no readable parquet file ({error}). Make it with: {SCORE_THEM}") from error
    has = {*names}
    whole = has.issuperset(SCORES) if has.intersection(SCORES) else "weight" in has
    if "example_id" not in has or not whole:
        raise DataError(
            f'{file} needs the columns "example_id" and "score_chosen" with "score_rejected" and/or "weight"; it has '
            f"{', '.join(names)}. Make it with: {SCORE_THEM}"
        )
    return table


def _choose(table: pa.Table, scorer: str | None, file: str | Path) -> str:
    """Return the scorer whose rows are meant."""
    known = sorted(table.column("scorer").unique().drop_null().to_pylist())
    wanted = scorer if scorer is not None or len(known) != 1 else known[0]
    if wanted is None:
        raise DataError(
            f"{file} holds the scores of {', '.join(known) or 'no scorer'}: say with `scorer` which to take."
        )
    if wanted not in known:
        hint = suggestion(wanted, known)
        raise DataError(f'{file} holds no scores of "{wanted}", but of {", ".join(known) or "no scorer"}.{hint}')
    return wanted


def _numbers(table: pa.Table, name: str, file: str | Path) -> np.ndarray:
    """Return a column of finite numbers."""
    column = table.column(name)
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise DataError(f'{file}: column "{name}" holds {column.type}, expected numbers.')
    numbers = column.to_numpy()  # null becomes NaN
    wrong = np.flatnonzero(~np.isfinite(numbers))
    if len(wrong):
        value = column[int(wrong[0])].as_py()
        raise DataError(
            f'{file}, row {int(wrong[0])}: "{name}" is {value}, expected a finite number ({len(wrong)} such rows). '
            "Score again, or remove these pairs."
        )
    return numbers


def _unique(ids: np.ndarray, values: np.ndarray, file: str | Path) -> np.ndarray:
    """Return the rows to keep, by increasing id: pairs that stand twice in the data have two equal rows."""
    order = np.argsort(ids, kind="stable")
    again = ids[order][1:] == ids[order][:-1]
    differs = again & ~np.isclose(values[order][1:], values[order][:-1], rtol=1e-4, atol=1e-6).all(axis=1)
    if differs.any():
        at = int(np.flatnonzero(differs)[0])
        raise DataError(
            f"{file}, rows {order[at]} and {order[at + 1]}: example_id {ids[order[at]]} stands for different values. "
            "Keep one row for each pair (and scorer)."
        )
    return order[np.concatenate([[True], ~again])] if len(order) else order
