import numpy as np
import pytest
import torch

from diffalign.data import LatentCache, OnlinePairs, PairTransform, open_pairs
from diffalign.data.transforms import to_images
from tests.data.caching import (
    TRANSFORM,
    FailingEncoder,
    assert_same_cache,
    assert_same_one_by_one,
    build,
    fixed,
    kill_while_building,
)
from tests.data.world import TinyEncoder, list_rows, picture, write_parquet


@pytest.fixture
def lists(tmp_path):
    return write_parquet(tmp_path / "lists" / "lists.parquet", list_rows(6))


class TestContent:
    def test_rows_are_ordered_by_image_then_example(self, lists, tmp_path, encoder):
        source, cache = open_pairs(lists), build(lists, tmp_path / "cache")
        assert (cache.images_per_example, len(cache), cache.has_preference) == (3, 6, False)
        assert cache.preference is None
        indices, flips, drop = [4, 0, 5, 4], [False, True, True, False], [True, False, False, False]
        batch = cache.batch(indices, fixed(flips, drop))
        assert (batch.images_per_example, len(batch), len(batch.latent_mean)) == (3, 4, 12)
        for b, (index, flip) in enumerate(zip(indices, flips, strict=True)):
            example = source[index]
            assert int(batch.example_ids[b]) == example.example_id
            assert batch.scores[b].tolist() == pytest.approx(example.scores)
            for image, ref in enumerate(example.images):
                row = image * 4 + b
                mean, std = encoder.encode_images(to_images([TRANSFORM.view(ref.load()).pixels], flip))
                torch.testing.assert_close(batch.latent_mean[row], mean[0], rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(batch.latent_std[row], std[0], rtol=1e-5, atol=1e-6)
                assert batch.prompts[row] == ("" if drop[b] else example.prompts[image])
        assert not torch.equal(batch.latent_mean[:4], batch.latent_mean[4:8])

    def test_online_batches_equal_cached_ones(self, lists, tmp_path):
        cache = build(lists, tmp_path)
        online = OnlinePairs(open_pairs(lists), TinyEncoder(), TRANSFORM)
        assert online.images_per_example == 3
        assert online.example_ids.tolist() == cache.example_ids.tolist()
        augment = fixed([True, False, False], [False, True, False])
        ours, theirs = (x.batch([5, 2, 0], augment) for x in (cache, online))
        for name, value in vars(ours).items():
            if isinstance(value, torch.Tensor | dict):
                torch.testing.assert_close(value, getattr(theirs, name), rtol=1e-5, atol=1e-6)
        assert ours.prompts == theirs.prompts
        assert (ours.preference, theirs.preference) == (None, None)

    def test_a_stream_of_lists_online(self, lists):
        stream = open_pairs(lists, streaming=True, max_samples=6)
        online = OnlinePairs(stream, TinyEncoder(), TRANSFORM)
        assert online.images_per_example == 3
        assert online.batch([0, 1], fixed([False] * 2, [False] * 2)).images_per_example == 3

    def test_a_random_crop_is_joint(self, lists):
        online = OnlinePairs(open_pairs(lists), TinyEncoder(), PairTransform(16, center_crop=False))
        crops = torch.tensor([[0.0, 0.0], [0.5, 0.99]])
        batch = online.batch([0, 1], fixed([False] * 2, [False] * 2, crops))
        assert batch.sizes[:, 3].tolist() == [0, 8] * 3

    @pytest.mark.parametrize("k", [1, 2, 4])
    def test_a_batch_is_its_examples_in_any_order(self, tmp_path, k):
        data = list_rows(5, k=max(k, 2))
        if k == 1:
            data = [{"caption": r["caption"], "image": r["images"][0], "label": i % 2} for i, r in enumerate(data)]
        cache = build(write_parquet(tmp_path / "a.parquet", data), tmp_path / "cache")
        whole = assert_same_one_by_one(cache, [3, 0, 4, 1])
        assert whole.images_per_example == k
        assert torch.equal(cache.batch([1, 4, 0, 3], whole_order()).latent_mean,
                           cache.batch([3, 0, 4, 1], whole_order()).select([3, 2, 1, 0]).latent_mean)  # fmt: skip

    def test_scores_are_what_the_source_says(self, lists, tmp_path):
        cache = build(lists, tmp_path)
        wanted = np.array([row.scores for row in open_pairs(lists)], dtype=np.float32)
        assert np.array_equal(cache.scores, wanted)
        assert cache.scores.dtype == np.float32
        assert (np.diff(cache.scores, axis=1) <= 0).all()
        assert LatentCache.open(tmp_path).scores.tolist() == wanted.tolist()

    def test_pairs_have_no_scores(self, parquet, tmp_path):
        cache = build(parquet, tmp_path)
        assert (cache.images_per_example, cache.scores, cache.preference) == (2, None, None)
        batch = cache.batch([0], fixed([False], [False]))
        assert batch.scores is batch.weights is None

    def test_preferences_of_a_cache(self, tmp_path, parquet):
        from tests.data.world import rows

        data = rows(2)
        data[1] |= {"label_0": 0.25, "label_1": 0.75}
        cache = build(write_parquet(tmp_path / "a.parquet", data), tmp_path / "cache")
        np.testing.assert_array_equal(cache.preference, np.array([np.nan, 0.75], dtype=np.float32))


def whole_order():
    return fixed([False] * 4, [False] * 4)


class TestResume:
    @pytest.fixture
    def many(self, tmp_path):
        data = [row | {"caption": f"prompt {i}"} for i, row in enumerate(list_rows(24, k=4))]
        data[3]["images"][2] = b"broken"
        return write_parquet(tmp_path / "a.parquet", data, 8)

    def test_kill_minus_nine(self, many, tmp_path):
        progress = kill_while_building(many, tmp_path / "killed", "image_delay", lambda s: 2 < s.get("next", 0) < 16)
        encoder, whole = TinyEncoder(), TinyEncoder()
        resumed = build(open_pairs(many, on_error="skip"), tmp_path / "killed", encoder)
        build(open_pairs(many, on_error="skip"), tmp_path / "whole", whole)
        assert_same_cache(tmp_path / "killed", tmp_path / "whole")
        assert (len(resumed), resumed.images_per_example) == (23, 4)
        done = progress["arrays"]["latents.npy"]["rows"]
        assert 0 < sum(encoder.image_batches) <= sum(whole.image_batches) - 2 * done

    @pytest.mark.parametrize("after", range(1, 10))
    def test_stopped_after_any_batch(self, lists, tmp_path, after):
        # Four images a batch, three an example: most batches end inside an example.
        encoder, whole = TinyEncoder(), TinyEncoder()
        with pytest.raises(RuntimeError):
            build(lists, tmp_path / "stopped", FailingEncoder(after))
        build(lists, tmp_path / "stopped", encoder)
        build(lists, tmp_path / "whole", whole)
        assert_same_cache(tmp_path / "stopped", tmp_path / "whole")
        assert whole.image_batches == [4] * 8 + [2] * 2
        assert encoder.image_batches == whole.image_batches[after // 2 * 2 :]

    def test_broken_images_are_skipped_as_in_pairs(self, many, tmp_path):
        cache = build(open_pairs(many, on_error="skip"), tmp_path)
        assert [record["row"] for record in cache.meta["skipped"]] == [3]
        assert 3 not in cache.source_index
        online = OnlinePairs(open_pairs(many, on_error="skip"), TinyEncoder(), TRANSFORM)
        batch = online.batch([3], fixed([False], [False]))
        assert batch.example_ids.tolist() == [int(cache.example_ids[3])]  # the next usable one


def test_images_that_lists_share_are_encoded_once(tmp_path, encoder):
    data = list_rows(3)
    for row in data:
        row["images"][1] = picture(7)
    cache = build(write_parquet(tmp_path / "a.parquet", data), tmp_path / "cache", encoder)
    assert cache.meta["images"] == 7
    assert sum(encoder.image_batches) == 14
