"""Copies of encoded pictures that hold nothing but pixels: what stands beside them must not make them unreadable."""

import re
import struct
import zlib

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"tRNS", b"eXIf")  # of the chunks a reader may skip: transparency, and which way is up
_JPEG = b"\xff\xd8"
_JPEG_KEPT = (0xE0, 0xEE)  # of the application markers: JFIF, and Adobe's, which says what the colours are
_TIFF = {b"II*\0": ("<", False), b"MM\0*": (">", False), b"II+\0": ("<", True), b"MM\0+": (">", True)}
_HEIF_EXIF = re.compile(rb"(infe.{8})Exif", re.DOTALL)
# The tags that say how pixels are stored (TIFF 6.0, technical notes 1 and 2), and the orientation (274).
_TIFF_KEPT = frozenset(
    number
    for first, last in [(254, 259), (262, 262), (266, 266), (273, 274), (277, 279), (284, 284), (292, 293), (317, 317),
                        (320, 320), (322, 325), (332, 332), (334, 334), (336, 336), (338, 341), (347, 347), (512, 521),
                        (529, 532)]
    for number in range(first, last + 1)
)  # fmt: skip


def bare(content: bytes) -> bytes | None:
    """Return a PNG, JPEG, TIFF, AVIF or HEIC without texts, profiles, resolutions, further pages; None for others."""
    if content.startswith(_PNG):
        return _bare_png(content)
    if content.startswith(_JPEG):
        return _bare_jpeg(content)
    if content[:4] in _TIFF:
        return _bare_tiff(content, *_TIFF[content[:4]])
    if content[4:8] == b"ftyp":
        return _HEIF_EXIF.sub(rb"\1none", content, count=1)  # readers skip items of a type they do not know
    return None


def _bare_png(content: bytes) -> bytes:
    parts, at = [_PNG], len(_PNG)
    while at + 8 <= len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        kind, check = content[at + 4 : at + 8], content[end - 4 : end]
        intact = kind in _PNG_KEPT and zlib.crc32(content[at + 4 : end - 4]).to_bytes(4, "big") == check
        if kind[0:1].isupper() or intact:
            parts.append(content[at:end])
        at = end
    return b"".join(parts)


def _bare_jpeg(content: bytes) -> bytes:
    parts, at = [_JPEG], len(_JPEG)
    while at + 4 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker == 0xDA:  # the pixels start
            break
        end = at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        if marker in _JPEG_KEPT or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            parts.append(content[at:end])
        at = end
    return b"".join([*parts, content[at:]])


def _bare_tiff(content: bytes, order: str, big: bool) -> bytes | None:
    """Shorten the first directory to the tags that matter, where it stands: all other offsets stay right."""
    count, size, word = ("Q", 20, "Q") if big else ("H", 12, "I")
    try:
        (first,) = struct.unpack_from(order + word, content, 8 if big else 4)
        (entries,) = struct.unpack_from(order + count, content, first)
        start = first + struct.calcsize(count)
        table = content[start : start + size * min(entries, 65536)]
        tags = [table[at : at + size] for at in range(0, len(table) - size + 1, size)]
        kept = b"".join(tag for tag in tags if struct.unpack_from(order + "H", tag)[0] in _TIFF_KEPT)
        directory = struct.pack(order + count, len(kept) // size) + kept + struct.pack(order + word, 0)
    except struct.error:
        return None
    return b"".join([content[:first], directory, content[first + len(directory) :]])
