"""Print how far memory rises, in MB, while a long grid is written, in a process of its own: others keep freed memory.

`python -m tests.evaluation.page_memory FOLDER PIXELS`: pictures 0.png to 5.png of FOLDER, pages of at most PIXELS.
"""

import sys
from pathlib import Path

from diffalign.evaluation import Look, save_pages

ROWS, COLUMNS = 500, 4


def write(folder: Path, name: str, pixels: int, rows: int = ROWS) -> None:
    """Write ROWS x COLUMNS cells."""
    images = [[folder / f"{(row + column) % 6}.png" for column in range(COLUMNS)] for row in range(rows)]
    parts = [""] * rows, list("abcd"), images, ["a red circle"] * rows
    save_pages(folder / name / "grid.jpg", *parts, look=Look(cell=64), page_pixels=pixels)


def peak() -> float:
    """Return the most memory this process has had, in MB; what `resource` tells begins with that of the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    place, most = Path(sys.argv[1]), int(sys.argv[2])
    write(place, f"warm-{most}", 10**6, rows=40)
    before = peak()
    write(place, f"grid-{most}", most)
    print(peak() - before)
