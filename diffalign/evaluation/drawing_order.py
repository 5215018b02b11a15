"""In which batches a folder's pictures are drawn: what was interrupted goes on in the batches it had.

A network rounds otherwise in batches of another size, so a picture depends a little on those beside it.
"""

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffalign.evaluation.manifest import Manifest, atomic_write

FILE = ".drawing.json"  # the order of what is being drawn; gone when all is
SIGNATURE = b"\x89PNG\r\n\x1a\n"


@contextmanager
def drawing_order(manifest: Manifest, batch_size: int) -> Iterator[list[int]]:
    """Yield the rows to draw, whole batches of the order that was begun; it is forgotten when all of them are there."""
    rows = {name: row for row, name in enumerate(manifest.table["file"])}
    missing = [name for name, path in zip(rows, manifest.paths, strict=True) if not is_whole_png(path)]
    order = _begun(manifest.directory / FILE)
    if not set(order) <= rows.keys() or not set(order) & set(missing):
        order = []
    order += [name for name in missing if name not in set(order)]
    wanted = set(missing)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if missing:
        with atomic_write(manifest.directory / FILE) as temporary:
            temporary.write_text(json.dumps(order), encoding="utf8")
    yield [rows[name] for batch in batches if wanted & set(batch) for name in batch]
    (manifest.directory / FILE).unlink(missing_ok=True)


def _begun(file: Path) -> list[str]:
    try:
        order = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return []
    return order if isinstance(order, list) and all(isinstance(name, str) for name in order) else []


def is_whole_png(path: Path) -> bool:
    """Tell whether a file is a PNG to its end, by the checksum of every part; it is not decoded."""
    try:
        content = memoryview(path.read_bytes())
    except OSError:
        return False
    if content[:8] != SIGNATURE:
        return False
    at, kind = 8, b""
    while at + 12 <= len(content) and kind != b"IEND":
        size, kind = int.from_bytes(content[at : at + 4], "big"), bytes(content[at + 4 : at + 8])
        end = at + 8 + size
        if zlib.crc32(content[at + 4 : end]) != int.from_bytes(content[end : end + 4], "big"):
            return False
        at = end + 4
    return kind == b"IEND" and at == len(content)
