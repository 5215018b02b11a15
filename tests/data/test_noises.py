"""What pictures were drawn from goes with them: read, sorted, cached, swapped, taken apart and written again."""

import json

import numpy as np
import pytest

from diffalign.data import AnnotatedPairs, OnlinePairs, UnpairedImages, open_pairs
from diffalign.data.fingerprints import digest_bytes
from diffalign.data.visits import RepeatedDraws, Visit
from diffalign.denoising import require_noises
from diffalign.errors import DataError
from diffalign.filtering.components import Components
from diffalign.filtering.writing import write_pairs
from tests.data.caching import TRANSFORM, FailingEncoder, assert_same_cache, build, fixed
from tests.data.world import TinyEncoder, picture, rows, write_parquet
from tests.e2e.pairs import noise_of

PLAIN = fixed([False] * 3, [False] * 3)


def of_image(content):
    """Return the noise that these tests say a picture was drawn from: named after its bytes."""
    return noise_of(int.from_bytes(digest_bytes(content)[:4], "little"))


def noisy_rows(count):
    made = rows(count)
    return [row | {f"noise_{side}": of_image(row[f"jpg_{side}"]) for side in (0, 1)} for row in made]


@pytest.fixture
def pairs(tmp_path):
    return write_parquet(tmp_path / "pairs" / "train.parquet", noisy_rows(6))


def expected(source, indices):
    """Return the noises of a batch: of the winners, then of the losers."""
    return [of_image(source[i].images[side].content) for side in (0, 1) for i in indices]


def test_a_pair_has_those_of_its_winner_and_loser(pairs, tmp_path):
    source = open_pairs(pairs)
    assert source.has_noises
    for row in source:
        assert row.noises == tuple(of_image(image.content) for image in row.images)
        assert "noise_0" not in row.extra
    plain = open_pairs(write_parquet(tmp_path / "plain" / "train.parquet", rows(6)))
    assert not plain.has_noises
    assert plain[0].noises is None
    assert plain[0].example_id == source[0].example_id  # draws stay what they were
    assert "noises" not in plain.identity["columns"]
    assert source.identity["columns"]["noises"] == ("noise_0", "noise_1")


def test_lists_are_sorted_with_them(tmp_path):
    images = [picture(i) for i in range(3)]
    row = {"caption": "a cat", "images": images, "scores": [0.1, 0.3, 0.2], "noises": list(map(of_image, images))}
    source = open_pairs(write_parquet(tmp_path / "lists.parquet", [row]))
    assert source[0].noises == tuple(of_image(images[i]) for i in (1, 2, 0))
    short = open_pairs(write_parquet(tmp_path / "short.parquet", [row | {"noises": row["noises"][:2]}]))
    assert short[0].noises == (None, None, None)


def test_json_lines_of_every_kind(tmp_path):
    files = {name: tmp_path / f"{name}.png" for name in "ab"}
    for number, file in enumerate(files.values()):
        file.write_bytes(picture(number))
    named = {"prompt": "a cat", "chosen": "b.png", "rejected": "a.png", "noise_chosen": "B", "noise_rejected": "A"}
    labelled = {"prompt": "a cat", "image_0": "a.png", "image_1": "b.png", "label_0": 0, "noise_0": "A", "noise_1": "B"}
    single = {"prompt": "a cat", "image": "b.png", "label": 1, "noise": "B"}
    for record, noises in ((named, ("B", "A")), (labelled, ("B", "A")), (single, ("B",))):
        file = tmp_path / "data.jsonl"
        file.write_text(json.dumps(record) + "\n")
        assert open_pairs(file)[0].noises == noises


def test_cached_and_online_batches_have_the_same(pairs, tmp_path):
    source = open_pairs(pairs)
    cache, online = build(source, tmp_path / "cache"), OnlinePairs(open_pairs(pairs), TinyEncoder(), TRANSFORM)
    for examples in (cache, online):
        batch = examples.batch([4, 0, 2], PLAIN)
        assert batch.noises == expected(source, [4, 0, 2])
        assert batch.select([2, 0]).noises == expected(source, [2, 4])
        assert batch.winners().noises == expected(source, [4, 0, 2])[:3]
        visits = [Visit(4, 1), Visit(0, 0), Visit(2, 3)]
        assert RepeatedDraws(examples).batch(visits, PLAIN).noises == batch.noises
    swapped = AnnotatedPairs(cache, flip_labels=1.0).batch([4, 0, 2], PLAIN)
    both = expected(source, [4, 0, 2])
    assert swapped.noises == both[3:] + both[:3]


def test_images_taken_apart_keep_theirs(pairs, tmp_path):
    source = open_pairs(pairs)
    cache = build(source, tmp_path / "cache")
    by_digest = {image.digest: of_image(image.content) for row in source for image in row.images}
    apart = UnpairedImages(cache)
    batch = apart.batch([1, 3, 5], PLAIN)
    digests = np.load(cache.folder / "image_digests.npy")
    assert batch.noises == [by_digest[digests[row].tobytes()] for row in apart._images[[1, 3, 5]]]


def test_an_interrupted_cache_is_the_same(pairs, tmp_path):
    build(pairs, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power failure"):
        build(pairs, tmp_path / "parts", FailingEncoder(1))
    build(pairs, tmp_path / "parts")
    assert_same_cache(tmp_path / "whole", tmp_path / "parts")
    assert next((tmp_path / "parts").glob("*/noises.jsonl")).read_text().count("seed=") == 7


def test_a_cache_without_them_has_none(tmp_path):
    cache = build(write_parquet(tmp_path / "train.parquet", rows(6)), tmp_path / "cache")
    assert cache.noises is None
    assert cache.batch([4, 0, 2], PLAIN).noises is None
    assert not (cache.folder / "noises.jsonl").exists()


def test_pairs_of_other_files_are_written_with_them(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "b.png").write_bytes(picture(2))
    line = {"prompt": "a cat", "chosen": "b.png", "rejected": "a.png", "noise_chosen": "B", "noise_rejected": "A"}
    (tmp_path / "data.jsonl").write_text(json.dumps(line) + "\n")
    source = open_pairs(tmp_path / "data.jsonl")
    write_pairs(source, Components.of(source, "here").table, np.array([0]), tmp_path / "kept.parquet")
    assert open_pairs(tmp_path / "kept.parquet")[0].noises == ("B", "A")


def test_a_row_without_one_is_none_and_refused_only_where_it_is_needed(tmp_path):
    made = noisy_rows(4)
    made[1]["noise_0"] = None
    cache = build(write_parquet(tmp_path / "train.parquet", made), tmp_path / "cache")
    assert None in cache.noises
    with pytest.raises(DataError, match="does not say what 1 of"):
        require_noises(cache.noises, (16, 16, 16), "train.parquet")
