"""Prompts of unequal lengths in a cache: without their padding on disk, the same to the bit in batches."""

import json

import pytest
import torch

from diffalign.data import LatentCache, text_store
from diffalign.errors import DataError
from tests.data.caching import assert_same_cache, build, fixed, same
from tests.data.world import TinyEncoder, rows, write_parquet

COLUMNS = ("prompt_embeds", "prompt_embeds_mask", "pooled_prompt_embeds")
TOKENS = COLUMNS[:2]
TEXTS = ["a", "four words or so", "", "a cat", "αβγ", "xx"]  # 1, 10 (of 16), 0, 5, 6 and 2 bytes of 10


class Masked(TinyEncoder):
    """Encode prompts with zeros where they have ended, as families with a mask do."""

    def __init__(self, stop_after: int = 1000, **settings):
        super().__init__(text_columns=COLUMNS, **{"token_columns": TOKENS, **settings})
        self.stop_after = stop_after

    def encode_prompts(self, prompts):
        if len(self.prompt_batches) == self.stop_after:
            raise RuntimeError("power failure")
        text = super().encode_prompts(prompts)
        return text | {"prompt_embeds": text["prompt_embeds"].masked_fill(~text["prompt_embeds_mask"][..., None], 0.0)}


@pytest.fixture
def file(tmp_path):
    data = rows(len(TEXTS), caption=None)
    for row, text in zip(data, TEXTS, strict=True):
        row["caption"] = text or "full to the end"
    return write_parquet(tmp_path / "a.parquet", data)


def batch_of(cache, drop=2):
    dropped = [index == drop for index in range(len(TEXTS))]
    return cache.batch(range(len(TEXTS)), fixed([False] * len(TEXTS), dropped))


def bytes_of(cache, name="prompt_embeds"):
    return (cache.folder / f"{name}.npy").stat().st_size - 192


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_batches_are_those_of_a_padded_cache_to_the_bit(file, tmp_path, dtype):
    padded = build(file, tmp_path / "padded", Masked(token_columns=()), dtype=dtype)
    ragged = build(file, tmp_path / "ragged", Masked(), dtype=dtype)
    ours, theirs = batch_of(ragged), batch_of(padded)
    assert ours.text.keys() == theirs.text.keys() == set(COLUMNS)
    assert same(ours.text, theirs.text)
    assert ours.text["prompt_embeds"].shape == (2 * len(TEXTS), 10, 6)
    assert padded.folder.name != ragged.folder.name
    tokens = 1 + 1 + 10 + 10 + 5 + 6 + 2  # of "" one is kept
    number = 4 if dtype == "float32" else 2
    assert (bytes_of(ragged), bytes_of(padded)) == (tokens * 6 * number, 7 * 10 * 6 * number)
    assert bytes_of(ragged, "prompt_embeds_mask") == tokens


def test_a_network_that_ignores_padding_is_given_the_longest_of_a_batch(file, tmp_path):
    whole = batch_of(build(file, tmp_path / "whole", Masked())).text
    cache = build(file, tmp_path / "short", Masked(ignores_padding=True))
    assert same(batch_of(cache).text, whole)  # one is as long as can be
    short = cache.batch([0, 5, 3], fixed([False] * 3, [False, True, False])).text
    assert short["prompt_embeds"].shape[1] == short["prompt_embeds_mask"].shape[1] == 5
    assert short["prompt_embeds_mask"].sum(1).tolist() == [1, 0, 5] * 2
    for row, index in enumerate((0, None, 3)):
        if index is not None:
            assert torch.equal(short["prompt_embeds"][row], whole["prompt_embeds"][index, :5])
    empty = cache.batch([0], fixed([False], [True])).text
    assert empty["prompt_embeds"].shape[1] == 1
    assert not any(empty[name].any() for name in TOKENS)


def test_what_is_no_zero_is_never_left_out(file, tmp_path):
    # TinyEncoder's padding has an embedding of its own, as T5's has: only the mask tells it apart.
    padded, kept = (
        build(file, tmp_path / str(len(tokens)), TinyEncoder(text_columns=COLUMNS, token_columns=tokens))
        for tokens in ((), TOKENS)
    )
    assert same(batch_of(kept).text, batch_of(padded).text)
    assert bytes_of(kept) == bytes_of(padded)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_stopped_between_batches_of_prompts(file, tmp_path, monkeypatch, after):
    monkeypatch.setattr("diffalign.data.cache_build.PROMPT_BATCH", 2)
    stopped = Masked(stop_after=after)
    with pytest.raises(RuntimeError):
        build(file, tmp_path / "stopped", stopped)
    (folder,) = (path for path in (tmp_path / "stopped").iterdir() if path.is_dir())
    with pytest.raises(DataError, match="not finished"):
        LatentCache.open(folder)
    for name in ("prompt_embeds.npy", "prompt_lengths.npy"):
        with open(folder / name, "ab") as half:
            half.write(b"half a batch")
    rest = Masked()
    build(file, tmp_path / "stopped", rest)
    build(file, tmp_path / "whole", Masked())
    assert_same_cache(tmp_path / "stopped", tmp_path / "whole")
    assert len(rest.prompt_batches) == 4 - after


def test_prompts_may_have_a_precision_of_their_own(file, tmp_path):
    exact, mixed = (build(file, tmp_path, Masked(), text_dtype=dtype) for dtype in (None, "bfloat16"))
    assert exact.folder != mixed.folder
    assert build(file, tmp_path, Masked(), text_dtype="float32").folder == exact.folder
    ours, theirs = batch_of(mixed), batch_of(exact)
    assert torch.equal(ours.latent_mean, theirs.latent_mean)
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        assert torch.equal(ours.text[name], theirs.text[name].bfloat16().float())
        assert not torch.equal(ours.text[name], theirs.text[name])


def test_the_fields_of_other_caches_are_what_they_were(file, tmp_path):
    cache = build(file, tmp_path, TinyEncoder(), text_dtype="float32")
    fields = json.loads((cache.folder / "meta.json").read_text())
    assert set(fields) == {"format", "encoder", "transform", "dtype", "source"}  # else it would be built again
    assert not (cache.folder / text_store.LENGTHS).exists()
