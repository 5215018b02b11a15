"""Charts of a report as inline SVG whose colours follow the page, light or dark."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

# Drawn in these placeholder colours, then replaced by the page's own variables.
_COLOURS = {
    "ink": "#010201",
    "muted": "#020301",
    "line": "#030401",
    "base": "#040501",
    "aligned": "#050601",
    "win": "#060701",
    "loss": "#070801",
}
_STYLE = {
    "svg.fonttype": "none",  # text stays text: small files, the page's font
    "svg.hashsalt": "diffalign",
    "font.size": 8.5,
    "axes.edgecolor": _COLOURS["line"],
    "axes.labelcolor": _COLOURS["muted"],
    "xtick.color": _COLOURS["line"],
    "ytick.color": _COLOURS["line"],
    "xtick.labelcolor": _COLOURS["muted"],
    "ytick.labelcolor": _COLOURS["muted"],
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _COLOURS["line"],
    "grid.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "axes.formatter.limits": (-3, 5),
    "axes.formatter.use_mathtext": False,
}
# Inches: a wide chart takes half of the page, a narrow one a third; type then comes out at about 11 pixels.
_WIDE, _NARROW = (4.7, 2.2), (3.5, 1.85)
_MOST_POINTS = 240  # of a curve: more cannot be told apart at this width


@dataclass(frozen=True)
class Chart:
    """Describe a chart of a report."""

    title: str
    note: str
    svg: Markup
    legend: tuple[tuple[str, str], ...] = ()  # (colour variable, text)
    last: str = ""


def difference_plot(differences: NDArray[np.float64], label: str) -> Markup:
    """Return every prompt's difference [P] as a bar, from the largest gain to the largest loss."""
    ordered = np.sort(differences)[::-1]
    edges = np.arange(len(ordered) + 1)

    def paint(axes: Axes) -> None:
        for sign, colour in ((1, "win"), (-1, "loss")):
            heights = np.where(ordered * sign > 0, ordered, 0.0)
            axes.stairs(heights, edges, fill=True, color=_COLOURS[colour], linewidth=0)
        axes.axhline(0, color=_COLOURS["muted"], linewidth=0.8)
        axes.set_xlim(0, len(ordered))
        axes.set_xlabel("prompts, largest gain first")
        axes.set_ylabel("difference", labelpad=9)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))

    return _svg(paint, label, _WIDE)


def distribution_plot(
    base: NDArray[np.float64],
    aligned: NDArray[np.float64],
    label: str,
    axes_labels: tuple[str, str] = ("score", "prompts"),
    shares: bool = False,
) -> Markup:
    """Return histograms of two sets of numbers over common bins, with their means as dashed lines.

    Args:
        base: [P] e.g. the scores per prompt of the base model.
        aligned: [Q] the other ones.
        label: what is read out in place of the picture.
        axes_labels: of the numbers and of how often they occur.
        shares: draw the share of each set in place of the count: for sets of different size.
    """
    low, high = float(min(base.min(), aligned.min())), float(max(base.max(), aligned.max()))
    if low == high:
        low, high = low - 0.5, high + 0.5
    bins = np.linspace(low, high, int(np.clip(np.sqrt(len(base)) * 1.5, 6, 28)) + 1)

    def paint(axes: Axes) -> None:
        for values, colour in ((base, "base"), (aligned, "aligned")):
            counts, _ = np.histogram(values, bins, weights=np.full(len(values), 1 / len(values) if shares else 1.0))
            axes.stairs(counts, bins, fill=True, color=_COLOURS[colour], alpha=0.22, linewidth=0)
            axes.stairs(counts, bins, color=_COLOURS[colour], linewidth=1.4)
            axes.axvline(values.mean(), color=_COLOURS[colour], linewidth=1.2, linestyle=(0, (3, 2)))
        axes.set_xlim(low, high)
        axes.set_xlabel(axes_labels[0])
        axes.set_ylabel(axes_labels[1], labelpad=9)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=not shares))
        axes.xaxis.set_major_locator(MaxNLocator(6))

    return _svg(paint, label, _WIDE)


def curve_plot(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    label: str,
    level: float | None = None,
    smooth: bool = True,
) -> Markup:
    """Return up to two curves, each (steps, values), faint with their running means on top.

    Args:
        curves: by name; the first in the colour of the aligned model, a second in that of losses.
        label: what is read out in place of the picture.
        level: a value to mark by a dashed line.
        smooth: False for what has no noise: the curve itself is drawn, alone.
    """

    def paint(axes: Axes) -> None:
        if level is not None:
            axes.axhline(level, color=_COLOURS["muted"], linewidth=0.9, linestyle=(0, (3, 2)))
        for (steps, values), colour in zip(curves.values(), ("aligned", "loss"), strict=False):
            steps, values = thin(np.asarray(steps, dtype=float), np.asarray(values, dtype=float))
            if smooth:
                axes.plot(steps, values, color=_COLOURS[colour], linewidth=0.8, alpha=0.3)
                values = running_mean(values, max(1, len(values) // 20))
            axes.plot(steps, values, color=_COLOURS[colour], linewidth=1.7, solid_capstyle="round")
        axes.set_xlabel("optimiser step")
        axes.margins(x=0.01)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))

    return _svg(paint, label, _NARROW)


def thin(steps: NDArray[np.float64], values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return means over consecutive stretches where there are more points than can be shown."""
    if len(steps) <= _MOST_POINTS:
        return steps, values
    stride = -(-len(steps) // _MOST_POINTS)
    starts = np.arange(0, len(steps), stride)
    counts = np.diff([*starts, len(steps)])
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts


def running_mean(values: NDArray[np.float64], radius: int) -> NDArray[np.float64]:
    """Return the mean of each value and its neighbours within `radius`, fewer of them at the ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    positions = np.arange(len(values))
    start, stop = np.maximum(positions - radius, 0), np.minimum(positions + radius + 1, len(values))
    return (total[stop] - total[start]) / (stop - start)


def _svg(paint: Callable[[Axes], None], label: str, size: tuple[float, float]) -> Markup:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure.subplots())
        stream = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'<svg\b[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text, count=1)
    text = text.replace('role="img">', Markup('role="img" aria-label="{}">').format(label), 1)
    for name, colour in _COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    # Group ids repeat from chart to chart; only those that are referred to must stay.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    return Markup(re.sub(r">\s+<", "><", text))
