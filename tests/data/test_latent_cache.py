import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch

from diffalign.data import LatentCache, OnlinePairs, PairTransform, open_pairs, sample_latents
from diffalign.data.transforms import to_images
from diffalign.errors import DataError
from tests.data.caching import TRANSFORM, build, files_of, fixed
from tests.data.world import TinyEncoder, rows, write_parquet


class TestContent:
    def test_a_batch_holds_what_the_encoder_says_of_every_pair(self, parquet, tmp_path, encoder):
        pairs, cache = open_pairs(parquet), build(parquet, tmp_path / "cache")
        assert len(cache) == len(pairs) == 6
        indices, flips, drop = [4, 0, 5], [False, True, True], [True, False, False]
        batch = cache.batch(indices, fixed(flips=flips, drop_caption=torch.tensor(drop)))
        assert batch.latent_mean.shape == batch.latent_std.shape == (6, 4, 4, 4)
        assert batch.prompts == ["", "prompt 0", "prompt 2"] * 2
        assert len(batch) == 3
        for b, (index, flip) in enumerate(zip(indices, flips, strict=True)):
            row = pairs[index]
            assert int(batch.example_ids[b]) == row.example_id
            for n, ref in ((b, row.chosen), (b + 3, row.rejected)):  # winners first, then losers
                view = TRANSFORM.view(ref.load())
                mean, std = encoder.encode_images(to_images([view.pixels], flip))
                torch.testing.assert_close(batch.latent_mean[n], mean[0], rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(batch.latent_std[n], std[0], rtol=1e-5, atol=1e-6)
                assert tuple(batch.sizes[n].tolist()) == (view.flipped_sizes if flip else view.sizes)
                text = encoder.encode_prompts([batch.prompts[b]])
                torch.testing.assert_close({name: column[n : n + 1] for name, column in batch.text.items()}, text)
        assert not torch.equal(batch.latent_mean[0], batch.latent_mean[3])

    def test_mirrored_latents_differ_from_straight_ones(self, parquet, tmp_path):
        cache = build(parquet, tmp_path)
        straight = cache.batch([1], fixed(flips=[False], drop_caption=[False]))
        flipped = cache.batch([1], fixed(flips=[True], drop_caption=[False]))
        assert not torch.equal(straight.latent_mean, flipped.latent_mean)
        # A VAE is not equivariant: turning the latent around is not the latent of the mirror image.
        assert not torch.allclose(straight.latent_mean.flip(-1), flipped.latent_mean, atol=1e-3)

    def test_online_batches_equal_cached_ones(self, parquet, tmp_path):
        cache = build(parquet, tmp_path)
        online = OnlinePairs(open_pairs(parquet), TinyEncoder(), TRANSFORM)
        settings = {"flips": [True, False, False, True], "drop_caption": [False, True, False, False]}
        ours, theirs = (x.batch([5, 2, 2, 0], fixed(**settings)) for x in (cache, online))
        for name, value in vars(ours).items():
            if isinstance(value, torch.Tensor | dict):
                torch.testing.assert_close(value, getattr(theirs, name), rtol=1e-5, atol=1e-6)  # and the dtypes
        assert ours.prompts == theirs.prompts
        assert ours.preference is theirs.preference is None

    def test_each_distinct_image_and_prompt_is_encoded_once_in_full_batches(self, parquet, tmp_path, encoder):
        cache = build(parquet, tmp_path, encoder)
        # Pairs 0, 1, 3, 4, 6, 7 use the pictures 0-8: nine for twelve places, each straight and mirrored.
        assert encoder.image_batches == [4, 4, 4, 4, 1, 1]
        assert encoder.prompt_batches == [["", "prompt 0", "prompt 1", "prompt 2"]]
        assert (cache.meta["images"], cache.meta["prompts"]) == (9, 4)

    @pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("bfloat16", 8e-3)])
    def test_stored_precision(self, parquet, tmp_path, dtype, tolerance):
        exact = build(parquet, tmp_path)
        stored = build(parquet, tmp_path, dtype=dtype)
        settings = {"flips": [True] * 6, "drop_caption": [False] * 6}
        ours, theirs = stored.batch(range(6), fixed(**settings)), exact.batch(range(6), fixed(**settings))
        assert ours.latent_mean.dtype == ours.text["prompt_embeds"].dtype == torch.float32
        torch.testing.assert_close(ours.latent_mean, theirs.latent_mean, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(ours.text, theirs.text, rtol=tolerance, atol=tolerance)
        assert not torch.equal(ours.latent_mean, theirs.latent_mean)

    def test_preferences(self, tmp_path):
        data = rows(3)
        data[1] |= {"label_0": 0.25, "label_1": 0.75}
        cache = build(write_parquet(tmp_path / "a.parquet", data), tmp_path / "cache")
        settings = {"flips": [False] * 3, "drop_caption": [False] * 3}
        batch = cache.batch([0, 1, 2], fixed(**settings))
        assert batch.preference.tolist() == [1.0, 0.75, 1.0]
        assert cache.batch([0], fixed(flips=[False], drop_caption=[False])).preference.tolist() == [1.0]
        online = OnlinePairs(open_pairs(tmp_path / "a.parquet"), TinyEncoder(), TRANSFORM)
        assert online.batch([0, 1, 2], fixed(**settings)).preference.tolist() == [1.0, 0.75, 1.0]

    def test_without_pooled_embeddings_and_without_flips(self, parquet, tmp_path):
        encoder = TinyEncoder(text_columns=("prompt_embeds",))
        cache = build(parquet, tmp_path, encoder, PairTransform(16, random_flip=False))
        assert cache.batch([0], fixed(flips=[False], drop_caption=[False])).text.keys() == {"prompt_embeds"}
        with pytest.raises(DataError, match="holds no mirrored images"):
            cache.batch([0], fixed(flips=[True], drop_caption=[False]))

    def test_masks_of_tokens_stay_bool_whatever_the_precision(self, parquet, tmp_path):
        encoder = TinyEncoder(text_columns=("prompt_embeds", "prompt_embeds_mask"))
        settings = {"flips": [False] * 2, "drop_caption": [True, False]}
        cached = build(parquet, tmp_path, encoder, dtype="bfloat16").batch([0, 1], fixed(**settings)).text
        online = OnlinePairs(open_pairs(parquet), encoder, TRANSFORM).batch([0, 1], fixed(**settings)).text
        assert cached["prompt_embeds_mask"].tolist() == 2 * [[False] * 10, [True] * 8 + [False] * 2]
        assert torch.equal(cached["prompt_embeds_mask"], online["prompt_embeds_mask"])
        torch.testing.assert_close(cached["prompt_embeds"], online["prompt_embeds"], rtol=8e-3, atol=8e-3)

    @pytest.mark.parametrize("columns", [("prompt_embeds",), ("prompt_embeds", "pooled_prompt_embeds")])
    def test_caches_from_before_text_columns_had_names_are_read(self, parquet, tmp_path, columns):
        cache = build(parquet, tmp_path, TinyEncoder(text_columns=columns))
        augment = fixed(flips=[False], drop_caption=[False])
        expected = cache.batch([0], augment).text
        record = json.loads((cache.folder / "complete.json").read_text())
        assert record.pop("text_columns") == list(columns)
        (cache.folder / "complete.json").write_text(json.dumps({**record, "pooled": len(columns) == 2}))
        torch.testing.assert_close(LatentCache.open(cache.folder).batch([0], augment).text, expected, rtol=0, atol=0)

    def test_masks_must_fit_the_pairs(self, parquet, tmp_path):
        with pytest.raises(ValueError, match="flips must hold one value for each of the 2 examples"):
            build(parquet, tmp_path).batch([0, 1], fixed(flips=[True], drop_caption=[False, False]))

    def test_batch_helpers(self, parquet, tmp_path):
        batch = build(parquet, tmp_path).batch([0, 3], fixed(flips=[False, False], drop_caption=[False, False]))
        noise = torch.randn(batch.latent_mean.shape, generator=torch.Generator().manual_seed(0))
        x0 = sample_latents(batch, noise)
        assert torch.equal(sample_latents(batch, torch.zeros_like(noise)), batch.latent_mean)
        torch.testing.assert_close(x0 - batch.latent_mean, batch.latent_std * noise, rtol=1e-4, atol=1e-5)
        winners = batch.winners()
        assert torch.equal(winners.latent_mean, batch.latent_mean[:2])
        assert winners.sizes.shape[0] == 2
        assert {name: len(column) for name, column in winners.text.items()} == dict.fromkeys(batch.text, 2)
        moved = batch.to("meta")
        assert moved.latent_std.device.type == moved.example_ids.device.type == "meta"
        assert {column.device.type for column in moved.text.values()} == {"meta"}
        assert moved.prompts == batch.prompts

    def test_opening_maps_files_and_workers_map_them_anew(self, parquet, tmp_path):
        built = build(parquet, tmp_path)
        cache = pickle.loads(pickle.dumps(LatentCache.open(tmp_path)))
        assert cache.folder == built.folder
        assert len(pickle.dumps(cache)) < 500
        assert isinstance(cache._latents.base, np.memmap)
        assert LatentCache.open(built.folder).example_ids.tolist() == built.example_ids.tolist()

    def test_a_stream_can_be_cached(self, parquet, tmp_path):
        cache = build(open_pairs(parquet, streaming=True), tmp_path / "s")
        local = build(parquet, tmp_path / "l")
        assert cache.example_ids.tolist() == local.example_ids.tolist()
        assert cache.meta["counts"]["ties"] == local.meta["counts"]["ties"] == 2
        ours, theirs = files_of(cache.folder), files_of(local.folder)
        assert ours["latents.npy"] == theirs["latents.npy"]


class TestKey:
    """Change one thing at a time: the cache must be another one."""

    def folder(self, tmp_path, source, encoder=None, transform=TRANSFORM, dtype="float32"):
        return build(source, tmp_path / "cache", encoder, transform, dtype=dtype).folder

    def test_nothing_changed_is_found_again_without_encoding(self, parquet, tmp_path, encoder):
        first = self.folder(tmp_path, parquet)
        assert self.folder(tmp_path, parquet, encoder) == first
        assert encoder.image_batches == encoder.prompt_batches == []

    @pytest.mark.parametrize(
        "change",
        [
            {"encoder": TinyEncoder(seed=1)},
            {"dtype": "float16"},
            {"transform": PairTransform(24)},
            {"transform": PairTransform(16, random_flip=False)},
            {"transform": PairTransform(16, interpolation="lanczos")},
            {"transform": PairTransform(16, sizes="resolution")},
        ],
        ids=["encoder", "dtype", "resolution", "flip", "interpolation", "sizes"],
    )
    def test_settings(self, parquet, tmp_path, change):
        assert self.folder(tmp_path, parquet, **change) != self.folder(tmp_path, parquet)

    def test_bytes_of_a_file(self, parquet, tmp_path):
        first = self.folder(tmp_path, parquet)
        data = rows(8)
        data[7]["caption"] = "prompt 3"  # was "prompt 2": as long as before
        size = parquet.stat().st_size
        data[2] |= {"label_0": 0.5, "label_1": 0.5}
        data[5] |= {"label_0": 0.5, "label_1": 0.5}
        stat = parquet.stat()
        write_parquet(parquet, data)
        os.utime(parquet, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert abs(parquet.stat().st_size - size) < 64
        assert self.folder(tmp_path, parquet) != first

    def test_max_samples(self, parquet, tmp_path):
        first = self.folder(tmp_path, parquet)
        assert self.folder(tmp_path, open_pairs(parquet, max_samples=5)) != first

    def test_a_copy_of_the_data_needs_no_new_cache(self, parquet, tmp_path):
        first = self.folder(tmp_path, parquet)
        (tmp_path / "copy").mkdir()
        assert self.folder(tmp_path, shutil.copyfile(parquet, tmp_path / "copy" / parquet.name)) == first


class TestOpen:
    def test_nothing_there(self, tmp_path):
        with pytest.raises(DataError, match="no latent cache"):
            LatentCache.open(tmp_path)

    def test_several_are_listed(self, parquet, tmp_path):
        build(parquet, tmp_path)
        build(parquet, tmp_path, dtype="float16")
        with pytest.raises(DataError, match=r"holds 2 caches.*\(resolution 16, float"):
            LatentCache.open(tmp_path)

    def test_damage_is_noticed(self, parquet, tmp_path):
        folder = build(parquet, tmp_path).folder
        os.truncate(folder / "latents.npy", 300)
        with pytest.raises(DataError, match=r"latents\.npy has 300 bytes, expected"):
            LatentCache.open(tmp_path)
        (folder / "complete.json").unlink()
        with pytest.raises(DataError, match="not finished"):
            LatentCache.open(tmp_path)

    def test_edited_or_foreign_formats_are_refused(self, parquet, tmp_path):
        meta = build(parquet, tmp_path).folder / "meta.json"
        fields = json.loads(meta.read_text())
        meta.write_text(json.dumps(fields | {"encoder": "another"}))
        with pytest.raises(DataError, match="does not match"):
            LatentCache.open(tmp_path)
        meta.write_text(json.dumps(fields | {"format": 99}))
        with pytest.raises(DataError, match="has format 99"):
            LatentCache.open(tmp_path)
