"""How the images of a data set will be cut, told from the headers of a sample."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from diffalign.data import PairSource, RowError

SAMPLE = 1000  # images
STRETCHES = 10  # a parquet file is read in stretches: neighbours are cheap, jumps are not
CUT = 0.01  # a loss of less than this share of the area is rounding


@dataclass(frozen=True)
class Survey:
    """Count what resizing and cropping to a square will do to a sample of images."""

    images: int  # sampled
    of: int  # images there are
    upscaled: int  # whose short side is below the resolution
    cropped: int  # that lose more than CUT of their area
    lost: float  # share of its area that a cropped image loses, on average
    unreadable: int
    middle: tuple[float, float]  # median width and height

    def describe(self, resolution: int) -> str:
        """Word it."""
        which = "of all" if self.images == self.of else "of a sample of"
        width, height = self.middle
        loss = f", which lose {self.lost:.0%} of their area on average" if self.cropped else ""
        broken = f"; {self.unreadable} cannot be opened" if self.unreadable else ""
        return (
            f"{which} {self.images:,} images (median {width:g}x{height:g}): {self.upscaled:,} upscaled to "
            f"{resolution}, {self.cropped:,} cropped{loss}{broken}"
        )


def survey(source: PairSource, resolution: int) -> Survey | None:
    """Look at up to SAMPLE images in stretches all over a data set; None if none of them can be opened."""
    per_example = source.images_per_example or 1
    sizes, unreadable = [], 0
    for index in _sample(len(source), SAMPLE // per_example):
        try:
            sizes += [image.size() for image in source[index].images]
        except RowError:
            unreadable += 1
    if not sizes:
        return None
    losses = [1 - min(size) / max(size) for size in sizes]
    cut = [loss for loss in losses if loss > CUT]
    return Survey(
        images=len(sizes),
        of=len(source) * per_example,
        upscaled=sum(min(size) < resolution for size in sizes),
        cropped=len(cut),
        lost=sum(cut) / max(len(cut), 1),
        unreadable=unreadable,
        middle=(median(width for width, _ in sizes), median(height for _, height in sizes)),
    )


def _sample(count: int, wanted: int) -> Iterator[int]:
    """Yield the examples to look at: all if they are few, else `wanted` in STRETCHES."""
    if count <= wanted:
        yield from range(count)
        return
    length = wanted // STRETCHES
    for stretch in range(STRETCHES):
        start = stretch * (count - length) // (STRETCHES - 1)
        yield from range(start, start + length)
