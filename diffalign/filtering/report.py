"""One web page about a selection: what was kept, how distributions moved, and pairs to look at."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from diffalign.data import PairSource, RowError
from diffalign.filtering.importance import ImportanceSettings, log_distance
from diffalign.filtering.margin import margins

EXAMPLES = 6  # pairs of a kind
THUMBNAIL = 192  # pixels
_BINS = 40
_GREY, _BLUE = "#9a9a9a", "#2563c9"


@dataclass(frozen=True)
class Distribution:
    """Hold a quantity before and after the selection, as a row of a table."""

    name: str
    before: NDArray[np.float64]
    after: NDArray[np.float64]


def distributions(pairs: pd.DataFrame, kept: Any, settings: ImportanceSettings) -> list[Distribution]:
    """Return the components that are there, of all pairs and of the kept ones; text terms count once a pair."""
    columns: dict[str, NDArray[np.float64]] = {}
    if "score_chosen" in pairs:
        columns["margin"] = margins(pairs["score_chosen"], pairs["score_rejected"], settings.margin)
        signed = margins(pairs["score_chosen"], pairs["score_rejected"], "signed")
        columns["scorer agrees with the label"] = np.where(np.isnan(signed), np.nan, (np.sign(signed) + 1) / 2)
    if "text_quality" in pairs:
        columns["text quality"] = pairs["text_quality"].to_numpy(dtype=np.float64)
    if (distance := f"distance_{settings.neighbours}") in pairs:
        columns["log distance to the nearest prompt"] = log_distance(pairs[distance].to_numpy(), settings)
    columns["words in the prompt"] = pairs["prompt"].str.split().str.len().to_numpy(dtype=np.float64)
    found = []
    for name, values in columns.items():
        finite = np.isfinite(values)
        found.append(Distribution(name, values[finite], values[kept][finite[kept]]))
    return found


def page(
    source: PairSource,
    pairs: pd.DataFrame,
    order: NDArray[np.int64],
    values: NDArray[np.float64],
    *,
    settings: ImportanceSettings,
    facts: Mapping[str, Any],
    command: str = "",
) -> str:
    """Return the page as HTML that needs no other file.

    Args:
        source: the pairs, for their images.
        pairs: the table of `Components`.
        order: indices of the kept pairs, the best first.
        values: by which they were ranked [N]; NaN for pairs that were no candidates.
        settings: the constants.
        facts: what to print above all, by name.
        command: what to type to get this again.
    """
    found = distributions(pairs, order, settings)
    ranked = np.argsort(-values, kind="stable")[: int(np.isfinite(values).sum())]
    left = ranked[~np.isin(ranked, order)]
    middle = order[len(order) // 2 : len(order) // 2 + EXAMPLES]
    groups = {
        "Kept: the highest values": order[:EXAMPLES],
        "Kept: from the middle": middle[~np.isin(middle, order[:EXAMPLES])],
        "Left out: the highest values that were": left[:EXAMPLES],
        "Left out: the lowest values": left[::-1][:EXAMPLES],
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("diffalign.filtering"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        facts=facts,
        command=command,
        rows=[_row(item) for item in found],
        charts=[(item.name, _histogram(item)) for item in found if len(item.after)],
        examples={name: _examples(source, pairs, indices, values) for name, indices in groups.items() if len(indices)},
    )


def _row(item: Distribution) -> dict[str, Any]:
    cells: dict[str, Any] = {"name": item.name}
    for side, values in (("before", item.before), ("after", item.after)):
        mean, median = (values.mean(), np.median(values)) if len(values) else (np.nan, np.nan)
        cells |= {f"{side}_mean": f"{mean:.4g}", f"{side}_median": f"{median:.4g}"}
    return cells


def _histogram(item: Distribution) -> str:
    """Return densities of both sides over common bins as a data URI; the after side of few values is jagged."""
    low, high = float(min(item.before.min(), item.after.min())), float(max(item.before.max(), item.after.max()))
    bins = np.linspace(low, high, _BINS + 1) if high > low else np.linspace(low - 0.5, high + 0.5, _BINS + 1)
    figure = Figure(figsize=(4.6, 2.4), layout="constrained")
    axes = figure.subplots()
    for values, colour, label in ((item.before, _GREY, "before"), (item.after, _BLUE, "after")):
        share = np.histogram(values, bins)[0] / len(values)
        axes.stairs(share, bins, fill=True, color=colour, alpha=0.3)
        axes.stairs(share, bins, color=colour, linewidth=1.3, label=f"{label} ({len(values):,})")
    axes.set_xlabel(item.name)
    axes.set_ylabel("share of pairs")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    return _data_uri(stream.getvalue(), "image/png")


def _examples(
    source: PairSource, pairs: pd.DataFrame, indices: Sequence[int], values: NDArray[np.float64]
) -> list[dict[str, Any]]:
    shown = []
    for index in indices:
        record = pairs.iloc[int(index)]
        try:
            row = source[int(record["index"])]
            images = [_thumbnail(row.chosen.load()), _thumbnail(row.rejected.load())]
        except RowError:
            images = []
        numbers = {"value": values[index]}
        for name in ("score_chosen", "score_rejected", "text_quality"):
            if name in record:
                numbers[name.replace("_", " ")] = record[name]
        text = ", ".join(f"{name} {number:.4g}" for name, number in numbers.items())
        shown.append({"prompt": record["prompt"], "images": images, "numbers": text})
    return shown


def _thumbnail(image: Image.Image) -> str:
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return _data_uri(stream.getvalue(), "image/jpeg")


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
