"""What was judged: a pair of images, a list of them, or one, with its prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

from PIL import Image

from diffalign.data.fingerprints import digest_bytes, stable_id
from diffalign.errors import DataError
from reward_models.pictures import PictureError, decode, read, size

# Beyond this ratio of the sides a picture is a strip: resizing its short side would need gigabytes.
MAX_ASPECT_RATIO = 32


class Place(NamedTuple):
    """Where a row stands, for messages: the file, the row in it, and whether rows are called rows or lines."""

    file: str
    row: int
    unit: str = "row"


NOWHERE = Place("image", 0)


class RowError(DataError):
    """Report one unusable row. With `on_error="skip"` such rows are counted and left out instead.

    Args:
        place: file and row.
        reason: a short class of the fault, the key under which it is counted ("broken image").
        detail: what exactly is wrong, in words.
    """

    def __init__(self, place: Place, reason: str, detail: str):
        super().__init__(
            f"{place.file}, {place.unit} {place.row}: {detail}. "
            'Repair or remove it, or set on_error="skip" to leave out such rows (counted, and listed in error_log).'
        )
        self.place, self.reason, self.detail = place, reason, detail

    def __reduce__(self):
        return RowError, (self.place, self.reason, self.detail)


@dataclass(frozen=True)
class ImageRef:
    """Refer to an encoded image held in memory (`data`) or in a file (`path`); nothing is decoded until `load`."""

    data: bytes | None = field(default=None, repr=False)
    path: Path | None = None
    place: Place = NOWHERE

    @cached_property
    def content(self) -> bytes:
        """Return the encoded bytes. Raises RowError when the file cannot be read."""
        if self.data is not None:
            return self.data
        if self.path is None:
            raise RowError(self.place, "missing image", "the image is empty (null)")
        try:
            return read(self.path)
        except OSError as error:
            raise RowError(self.place, "missing image", f"cannot read {self.path} ({error.strerror})") from error
        except PictureError as error:
            raise RowError(self.place, "broken image", f"cannot read {self.path} ({error})") from error

    @cached_property
    def digest(self) -> bytes:
        """Return the 16-byte hash of the encoded bytes: the same file content has the same digest anywhere."""
        return digest_bytes(self.content)

    @property
    def identity(self) -> str:
        """Return the digest in hexadecimal."""
        return self.digest.hex()

    def size(self) -> tuple[int, int]:
        """Return width and height of the upright image from its header. Raises RowError when that is broken."""
        try:
            return size(self.path if self.data is None and self.path else self.content)
        except OSError as error:
            raise RowError(self.place, "missing image", f"cannot read {self.path} ({error.strerror})") from error
        except PictureError as error:
            raise RowError(self.place, "broken image", f"cannot read the header of an image ({error})") from error

    def load(self) -> Image.Image:
        """Decode to an upright RGB image; transparency is laid on white. Raises RowError when the image is broken."""
        name = self.path or "the image"
        try:
            rgb = decode(self.content)
        except PictureError as error:
            raise RowError(self.place, "broken image", f"cannot decode {name} ({error})") from error
        if max(rgb.size) > MAX_ASPECT_RATIO * min(rgb.size):
            width, height = rgb.size
            raise RowError(self.place, "aspect ratio", f"{name} is {width}x{height}, too thin to be cropped")
        return rgb

    @property
    def decodable(self) -> bytes:
        """Return the encoded bytes of what is a picture: no other file is copied or served. Raises RowError."""
        self.load()
        return self.content


class Example:
    """Describe what was judged together: k images with a caption each, best first.

    A pair has two images, the winner first; a list has k, by decreasing score; a single labelled image is a list of
    one.
    """

    index: int  # position among the usable examples of its source
    prompts: tuple[str, ...]  # [k]
    images: tuple[ImageRef, ...]  # [k]
    preference: float | None  # P(first preferred) of a pair with a soft label
    scores: tuple[float | None, ...]  # [k], higher is better
    noises: tuple[str | None, ...] | None  # [k], what the images were drawn from; None: the data does not say it

    @cached_property
    def example_id(self) -> int:
        """Return an id in [0, 2**63) that depends on the prompts and the images only, never on file order."""
        # A second caption counts only where it differs: ids of plain pairs must never change, draws are keyed by them.
        others = [digest_bytes(prompt.encode()) for prompt in self.prompts if prompt != self.prompts[0]]
        return stable_id(self.prompts[0], *(image.digest for image in self.images), *others)


@dataclass(frozen=True)
class PairRow(Example):
    """Hold one judged pair; ties never become a PairRow."""

    index: int
    prompt: str
    chosen: ImageRef
    rejected: ImageRef
    preference: float | None = None  # P(chosen preferred) in (0.5, 1); None for a plain winner
    extra: dict[str, Any] = field(default_factory=dict)  # the remaining scalar columns, as they were
    rejected_prompt: str | None = None  # the caption of the rejected image; None: the same one
    noises: tuple[str | None, str | None] | None = None

    @property
    def prompts(self) -> tuple[str, str]:
        """Return the captions of both images."""
        return self.prompt, self.prompt if self.rejected_prompt is None else self.rejected_prompt

    @property
    def images(self) -> tuple[ImageRef, ImageRef]:
        """Return the chosen and the rejected image."""
        return self.chosen, self.rejected

    @property
    def scores(self) -> tuple[None, None]:
        """Return no scores: a pair says only who won."""
        return None, None


@dataclass(frozen=True)
class ListRow(Example):
    """Hold k images of one prompt, best first. A single labelled image is k = 1 with score 1 (desirable) or 0."""

    index: int
    prompt: str
    images: tuple[ImageRef, ...]
    scores: tuple[float, ...]  # never increasing
    extra: dict[str, Any] = field(default_factory=dict)
    noises: tuple[str | None, ...] | None = None
    preference = None

    @classmethod
    def ranked(
        cls,
        index: int,
        prompt: str,
        images: Sequence[ImageRef],
        scores: Sequence[float],
        extra: dict[str, Any],
        noises: Sequence[str | None] | None = None,
    ) -> Self:
        """Make a list of images in any order: sorted by decreasing score, equal scores as they stand."""
        order = sorted(range(len(images)), key=lambda i: -scores[i])
        placed = None if noises is None else tuple(noises[i] for i in order)
        return cls(index, prompt, tuple(images[i] for i in order), tuple(scores[i] for i in order), extra, placed)

    @property
    def prompts(self) -> tuple[str, ...]:
        """Return the caption once an image."""
        return (self.prompt,) * len(self.images)
