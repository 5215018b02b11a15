"""One web page about a selection: what was kept, how distributions moved, and pairs to look at."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from diffalign.data import PairSource, RowError
from diffalign.filtering.agreement import Agreement, agreements
from diffalign.filtering.importance import ImportanceSettings, log_distance
from diffalign.filtering.margin import margins
from diffalign.webpages import data_uri
from diffalign.webpages import page as web_page
from diffalign.webpages.plots import Chart, distribution_plot

EXAMPLES = 6  # pairs of a kind
THUMBNAIL = 192  # pixels


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
        columns["scorer agrees with the label"] = agreements(pairs)
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
    method: str,
    settings: ImportanceSettings,
    counts: Mapping[str, int],
    command: str = "",
) -> str:
    """Return the page as HTML that needs no other file.

    Args:
        source: the pairs, for their images.
        pairs: the table of `Components`.
        order: indices of the kept pairs, the best first.
        values: by which they were ranked [N]; NaN for pairs that were no candidates.
        method: they were chosen by.
        settings: the constants.
        counts: pairs by what became of them.
        command: what to type to get this again.
    """
    found, agreement = distributions(pairs, order, settings), Agreement.of(pairs, order)
    shown = {name: _examples(source, pairs, indices, values) for name, indices in _groups(order, values).items()}
    content = {
        "title": f"{len(order):,} pairs kept by {method}",
        "share_kept": len(order) / len(pairs),
        "agreement": agreement,
        "warning": agreement and agreement.warning(method, settings),
        "counts": {name: f"{number:,}" for name, number in counts.items() if number},
        "settings": {name: value for name, value in asdict(settings).items() if value is not None},
        "source": source.name,
        "command": command,
        "rows": [_row(item) for item in found],
        "charts": [_chart(item) for item in found if len(item.after)],
        "examples": {name: examples for name, examples in shown.items() if examples},
    }
    return web_page("diffalign.filtering", "report.html.j2", content)


def _groups(order: NDArray[np.int64], values: NDArray[np.float64]) -> dict[str, NDArray[np.int64]]:
    """Return which pairs to show, by what they are."""
    ranked = np.argsort(-values, kind="stable")[: int(np.isfinite(values).sum())]
    left = ranked[~np.isin(ranked, order)]
    middle = order[len(order) // 2 : len(order) // 2 + EXAMPLES]
    return {
        "Kept: the highest values": order[:EXAMPLES],
        "Kept: from the middle": middle[~np.isin(middle, order[:EXAMPLES])],
        "Left out: the highest values that were": left[:EXAMPLES],
        "Left out: the lowest values": left[::-1][:EXAMPLES],
    }


def _row(item: Distribution) -> dict[str, Any]:
    cells: dict[str, Any] = {"name": item.name}
    for side, values in (("before", item.before), ("after", item.after)):
        mean, median = (values.mean(), np.median(values)) if len(values) else (np.nan, np.nan)
        cells |= {f"{side}_mean": f"{mean:.4g}", f"{side}_median": f"{median:.4g}"}
    return cells


def _chart(item: Distribution) -> Chart:
    """Return the shares of both sides over common bins; the after side of few values is jagged."""
    label = f"Distribution of {item.name} before and after"
    svg = distribution_plot(item.before, item.after, label, (item.name, "share of pairs"), shares=True)
    legend = ("base", f"before ({len(item.before):,})"), ("aligned", f"after ({len(item.after):,})")
    return Chart(item.name.capitalize(), "Dashed lines are the means.", svg, legend)


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
    return data_uri(stream.getvalue(), "image/jpeg")
