"""Fill a latent cache: decode on threads, encode each distinct image and prompt once, commit batch by batch."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from diffalign.data import checksums, text_store
from diffalign.data.batch import PairEncoder
from diffalign.data.cache_store import AppendStore
from diffalign.data.pairs import Example, RowError
from diffalign.data.rejects import as_record, from_record
from diffalign.data.source import PairSource
from diffalign.data.transforms import PairTransform, View, to_images
from diffalign.errors import DataError
from diffalign.progress import Progress

# numpy has no bfloat16: its bits are kept as uint16.
STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
PROMPT_BATCH = 32
NOISES = "noises.jsonl"  # what each image was drawn from, where the data says it


@dataclass
class _Accepted:
    """An example whose images were decoded, waiting for them to be encoded."""

    row: Example
    images: list[int]  # [k] rows of latents
    prompts: list[int]  # [k] rows of the text columns


class CacheBuilder:
    """Write the files of one cache, continuing where an earlier process stopped.

    Images are numbered in the order of first appearance and encoded in full batches of `batch_size`, prompts likewise
    afterwards. So neither the content of a batch nor a bit of the result depends on where a build was interrupted.
    """

    def __init__(
        self,
        source: PairSource,
        encoder: PairEncoder,
        transform: PairTransform,
        store: AppendStore,
        *,
        dtype: str,
        text_dtype: str,
        batch_size: int,
        workers: int,
        progress: bool,
    ):
        self.source, self.encoder, self.transform, self.store = source, encoder, transform, store
        self.dtype, self.text_dtype = STORED[dtype], STORED[text_dtype]
        self.batch_size, self.workers, self.progress = batch_size, workers, progress
        digests = store.read("image_digests.npy")
        self.images = {} if digests is None else {bytes(digest): row for row, digest in enumerate(digests)}
        self.encoded = len(self.images)
        self.prompts = {prompt: row for row, prompt in enumerate(store.read_lines("prompts.jsonl"))}
        self.new_prompts: deque[str] = deque()  # not yet in prompts.jsonl
        self._prompt_row("")  # row 0, for dropped captions
        self.views: deque[tuple[bytes, str | None, View]] = deque()  # new images to be encoded, with their noise
        self.accepted: deque[_Accepted] = deque()  # examples to be committed
        for record in store.read_lines("skipped.jsonl"):
            source.rejects.add(from_record(record))
        self.skips_written = len(source.rejects.listed) if "skipped.jsonl" in store.lines else 0

    def run(self) -> None:
        """Encode what is missing and commit it."""
        done = self.store.state.get("next", 0)
        total = None if self.source.window else len(self.source)
        with torch.no_grad():
            if not self.store.state.get("images_done"):
                what = f"encoding {self.source.counts.unit}"
                with Progress(what, total, done=done, enabled=self.progress) as shown:
                    self._run_images(done, shown)
            self._run_prompts()

    def _run_images(self, done: int, shown: Progress) -> None:
        for row, outcome in self._prepared(done):
            if isinstance(outcome, RowError):
                self.source.rejects.add(outcome)
            else:
                self._accept(row, outcome)
            while len(self.views) >= self.batch_size:
                self._encode_images(self.batch_size)
                self._append_examples()
                self.store.commit()
            shown.reach(row.index + 1)
        if self.views:
            self._encode_images(len(self.views))
        self._append_examples()
        if not self.store.rows("example_ids.npy"):
            unit = self.source.counts.unit.removesuffix("s")
            raise DataError(f"{self.source.name} holds no usable {unit}: {self.source.counts}.")
        counts = asdict(self.source.counts)
        counts["skipped"] = dict(sorted(counts["skipped"].items()))
        self.store.commit(images_done=True, counts=counts)

    def _prepared(self, start: int) -> Iterator[tuple[Example, list[View | None] | RowError]]:
        """Yield rows in order with their decoded images (None: known already) or the error met."""
        ahead: deque[tuple[Example, Future]] = deque()
        unreadable = None
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                try:
                    for row in self.source.iterate(start):
                        ahead.append((row, pool.submit(self._prepare, row)))
                        if len(ahead) > self.workers + self.batch_size:
                            yield self._outcome(*ahead.popleft())
                except RowError as error:
                    unreadable = error  # rows are read ahead: an earlier one may turn out broken, and is named first
                while ahead:
                    yield self._outcome(*ahead.popleft())
                if unreadable is not None:
                    raise unreadable
            finally:
                for _, future in ahead:
                    future.cancel()

    def _outcome(self, row: Example, future: Future) -> tuple[Example, list[View | None] | RowError]:
        try:
            return row, future.result()
        except RowError as error:
            return row, error

    def _prepare(self, row: Example) -> list[View | None]:
        views = [None if i.digest in self.images else self.transform.view(i.load()) for i in row.images]
        row.example_id  # noqa: B018 (hashed here, on a thread, and kept)
        return views

    def _accept(self, row: Example, views: list[View | None]) -> None:
        numbers = []
        for image, noise, view in zip(row.images, row.noises or [None] * len(views), views, strict=True):
            if image.digest not in self.images:
                self.images[image.digest] = len(self.images)
                self.views.append((image.digest, noise, view))
            numbers.append(self.images[image.digest])
        self.accepted.append(_Accepted(row, numbers, [self._prompt_row(prompt) for prompt in row.prompts]))

    def _prompt_row(self, prompt: str) -> int:
        if prompt not in self.prompts:
            self.prompts[prompt] = len(self.prompts)
            self.new_prompts.append(prompt)
        return self.prompts[prompt]

    def _encode_images(self, count: int) -> None:
        """Encode the next `count` images, mirrored ones too, and append them."""
        taken = [self.views.popleft() for _ in range(min(count, len(self.views)))]
        views = [view for *_, view in taken]
        images = to_images([view.pixels for view in views])
        variants = [self.encoder.encode_images(images)]
        if self.transform.random_flip:
            variants.append(self.encoder.encode_images(images.flip(-1)))
        moments = torch.stack([torch.stack([m.cpu() for m in pair], dim=1) for pair in variants], dim=1)
        sizes = [[v.sizes, v.flipped_sizes] if self.transform.random_flip else [v.sizes] for v in views]
        stored = _stored(moments, self.dtype, "The VAE")
        self.store.append("latents.npy", stored)
        self.store.append(checksums.file_of("latents.npy"), np.stack([checksums.of_rows(row) for row in stored]))
        self.store.append("sizes.npy", np.array(sizes, dtype=np.int32))
        if self.source.has_noises:
            self.store.append_lines(NOISES, [noise for _, noise, _ in taken])
        digests = b"".join(digest for digest, *_ in taken)
        self.store.append("image_digests.npy", np.frombuffer(digests, dtype=np.uint8).reshape(-1, 16))
        self.encoded += len(taken)

    def _append_examples(self) -> None:
        """Append the examples whose images are all encoded, their prompts, and what was skipped."""
        ready = []
        while self.accepted and max(self.accepted[0].images) < self.encoded:
            ready.append(self.accepted.popleft())
        listed = self.source.rejects.listed
        self.store.append_lines("skipped.jsonl", [as_record(error) for error in listed[self.skips_written :]])
        self.skips_written = len(listed)
        if not ready:
            return
        rows = [example.row for example in ready]
        soft = [np.nan if row.preference is None else row.preference for row in rows]
        self.store.append("example_ids.npy", np.array([row.example_id for row in rows], dtype=np.int64))
        self.store.append("source_index.npy", np.array([row.index for row in rows], dtype=np.int64))
        self.store.append("pair_images.npy", np.array([example.images for example in ready], dtype=np.int64))
        self.store.append("pair_prompts.npy", np.array([example.prompts for example in ready], dtype=np.int64))
        self.store.append("scores.npy", np.array([row.scores for row in rows], dtype=np.float32))  # None becomes NaN
        self.store.append("preference.npy", np.array(soft, dtype=np.float32))
        listed_prompts = len(self.prompts) - len(self.new_prompts)
        count = max(0, max(max(example.prompts) for example in ready) + 1 - listed_prompts)
        self.store.append_lines("prompts.jsonl", [self.new_prompts.popleft() for _ in range(count)])
        self.store.state["next"] = rows[-1].index + 1

    def _run_prompts(self) -> None:
        prompts = self.store.read_lines("prompts.jsonl")
        tokens = self.encoder.token_columns
        done = text_store.count(self.store, tokens)
        with Progress("encoding prompts", len(prompts), done=done, enabled=self.progress) as shown:
            for start in range(done, len(prompts), PROMPT_BATCH):
                encoded = prompts[start : start + PROMPT_BATCH]
                columns = {
                    name: _stored(column.cpu(), self.text_dtype, "The text encoder")
                    for name, column in self.encoder.encode_prompts(encoded).items()
                }
                text_store.append(self.store, columns, tokens)
                self.store.commit()
                shown.reach(start + len(encoded))


def _stored(tensor: Tensor, dtype: torch.dtype, who: str) -> np.ndarray:
    """Return what is kept of a tensor: numbers in `dtype`, masks as they are."""
    cast = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if not torch.isfinite(cast).all():
        where = "already before storing" if not torch.isfinite(tensor).all() else f"once stored as {dtype}"
        raise DataError(
            f"{who} gave values that are not finite, {where}. SDXL's original VAE overflows in float16: use "
            "madebyollin/sdxl-vae-fp16-fix, or run the encoders in bfloat16 or float32. Prompts that overflow in "
            "float16 are kept with data.cache_text_dtype: bfloat16."
        )
    return (cast.view(torch.uint16) if cast.dtype == torch.bfloat16 else cast).numpy()
