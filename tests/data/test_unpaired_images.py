import numpy as np
import pytest

from diffalign.data import UnpairedImages, open_pairs
from diffalign.errors import DataError
from tests.data.caching import assert_same_one_by_one, build, fixed
from tests.data.world import list_rows, picture, write_parquet

# (winner, loser, caption): picture 1 beats 2 and loses to 0; picture 3 wins twice; 1 appears under another caption.
JUDGED = [(0, 1, "cat"), (1, 2, "cat"), (3, 4, "cat"), (3, 2, "cat"), (1, 3, "dog")]
IMAGES = [(0, "cat"), (1, "cat"), (2, "cat"), (3, "cat"), (4, "cat"), (1, "dog"), (3, "dog")]
POLICIES = {
    "won_once": [1, 1, 0, 1, 0, 1, 0],
    "never_lost": [1, 0, 0, 1, 0, 1, 0],
    "drop_mixed": [1, None, 0, 1, 0, 1, 0],
}


def pair(winner, loser, caption):
    return {"jpg_0": picture(loser), "jpg_1": picture(winner), "label_0": 0.0, "label_1": 1.0, "caption": caption}


@pytest.fixture
def cache(tmp_path):
    return build(write_parquet(tmp_path / "a.parquet", [pair(*x) for x in JUDGED]), tmp_path / "cache")


def reference_batch(cache, image, caption):
    """Return the latent mean of a picture, found through a pair that has it."""
    for index, (winner, loser, text) in enumerate(JUDGED):
        if text == caption and image in (winner, loser):
            return cache.batch([index], fixed([False], [False])).latent_mean[int(image == loser)]
    raise AssertionError


@pytest.mark.parametrize("policy", POLICIES)
def test_each_image_and_caption_once_with_its_label(cache, policy):
    view = UnpairedImages(cache, policy)
    labels = [label for label in POLICIES[policy] if label is not None]
    images = [x for x, label in zip(IMAGES, POLICIES[policy], strict=True) if label is not None]
    assert len(view) == len(images)
    batch = view.batch(range(len(view)), fixed([False] * len(view), [False] * len(view)))
    found = dict(zip(batch.prompts, batch.latent_mean, strict=False))
    assert set(found) == {"cat", "dog"}
    for b, caption in enumerate(batch.prompts):
        matching = [i for i, c in images if c == caption and reference_batch(cache, i, c).equal(batch.latent_mean[b])]
        assert len(matching) == 1
        label = labels[images.index((matching[0], caption))]
        assert view.desirable[b] == label
        assert batch.scores[b].tolist() == [label]
    assert (batch.images_per_example, batch.preference, view.has_preference) == (1, None, False)
    assert view.scores.tolist() == batch.scores.tolist()
    assert view.images_per_example == 1


def test_ids_are_distinct_and_those_of_single_images(cache, tmp_path):
    view = UnpairedImages(cache)
    assert len(set(view.example_ids.tolist())) == len(view) == 7
    assert set(view.example_ids).isdisjoint(cache.example_ids)
    singles = [{"caption": caption, "image": picture(image), "label": 1} for image, caption in IMAGES]
    source = open_pairs(write_parquet(tmp_path / "b.parquet", singles))
    assert {row.example_id for row in source} == set(view.example_ids.tolist())


def test_ids_and_labels_do_not_depend_on_the_order_of_the_pairs(cache, tmp_path):
    shuffled = [pair(*JUDGED[i]) for i in (4, 2, 0, 3, 1)]
    other = build(write_parquet(tmp_path / "b.parquet", shuffled), tmp_path / "other")
    for policy in POLICIES:
        ours, theirs = UnpairedImages(cache, policy), UnpairedImages(other, policy)
        labels = [dict(zip(v.example_ids.tolist(), v.desirable.tolist(), strict=True)) for v in (ours, theirs)]
        assert labels[0] == labels[1]
        assert ours.example_ids.tolist() != theirs.example_ids.tolist()


def test_a_batch_is_its_images_in_any_order(cache):
    assert_same_one_by_one(UnpairedImages(cache), [6, 0, 3, 1])


def test_swapped_pairs_count_the_other_way_round(cache):
    view, turned = UnpairedImages(cache), UnpairedImages(cache, swapped=np.ones(5, dtype=bool))
    assert turned.example_ids.tolist() == view.example_ids.tolist()
    # All reversed: to have won once is now what it was to have lost once.
    never_lost = dict(zip(view.example_ids.tolist(), UnpairedImages(cache, "never_lost").desirable, strict=True))
    assert turned.desirable.tolist() == [not never_lost[i] for i in turned.example_ids.tolist()]


def test_wrong_use_is_refused(cache, tmp_path):
    with pytest.raises(DataError, match=r'Unknown policy "never_loses".*Did you mean "never_lost".*won_once'):
        UnpairedImages(cache, "never_loses")
    lists = build(write_parquet(tmp_path / "l.parquet", list_rows(2)), tmp_path / "lists")
    with pytest.raises(DataError, match="Only pairs can be taken apart"):
        UnpairedImages(lists)
    circle = [pair(0, 1, "x"), pair(1, 0, "x")]
    with pytest.raises(DataError, match=r'both won and lost.*Use "won_once"'):
        UnpairedImages(build(write_parquet(tmp_path / "c.parquet", circle), tmp_path / "circle"), "drop_mixed")
