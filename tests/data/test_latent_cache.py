import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from diffalign.data import Augmentation, LatentCache, OnlinePairs, PairTransform, open_pairs, sample_latents
from diffalign.data.cache_store import AppendStore
from diffalign.data.pairs import ImageRef, RowError
from diffalign.data.transforms import to_images
from diffalign.errors import DataError
from tests.data.world import TinyEncoder, picture, rows, write_parquet

ROOT = Path(__file__).parents[2]
TRANSFORM = PairTransform(16)


def build(source, directory, encoder=None, transform=TRANSFORM, **settings):
    source = source if hasattr(source, "iterate") else open_pairs(source)
    settings = {"dtype": "float32", "batch_size": 4, "progress": False, **settings}
    return LatentCache.build(source, encoder or TinyEncoder(), transform, directory, **settings)


def fixed(flips, drop_caption, crops=None):
    """Augment by the values given, whatever the example ids."""
    return lambda ids: Augmentation(torch.as_tensor(flips), torch.as_tensor(drop_caption), crops)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class TestContent:
    def test_a_batch_holds_what_the_encoder_says_of_every_pair(self, parquet, tmp_path, encoder):
        pairs, cache = open_pairs(parquet), build(parquet, tmp_path / "cache")
        assert len(cache) == len(pairs) == 6
        indices, flips, drop = [4, 0, 5], [False, True, True], [True, False, False]
        batch = cache.batch(indices, fixed(flips=flips, drop_caption=torch.tensor(drop)))
        assert batch.latent_mean.shape == batch.latent_std.shape == (6, 4, 4, 4)
        assert batch.prompts == ["", "prompt 0", "prompt 2"]
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
                embeds, pooled = encoder.encode_prompts([batch.prompts[b]])
                torch.testing.assert_close(batch.prompt_embeds[n], embeds[0])
                torch.testing.assert_close(batch.pooled_prompt_embeds[n], pooled[0])
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
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, getattr(theirs, name), rtol=1e-5, atol=1e-6)
                assert value.dtype == getattr(theirs, name).dtype
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
        assert ours.latent_mean.dtype == ours.prompt_embeds.dtype == torch.float32
        torch.testing.assert_close(ours.latent_mean, theirs.latent_mean, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(ours.prompt_embeds, theirs.prompt_embeds, rtol=tolerance, atol=tolerance)
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
        cache = build(parquet, tmp_path, TinyEncoder(pooled=False), PairTransform(16, random_flip=False))
        assert cache.batch([0], fixed(flips=[False], drop_caption=[False])).pooled_prompt_embeds is None
        with pytest.raises(DataError, match="holds no mirrored images"):
            cache.batch([0], fixed(flips=[True], drop_caption=[False]))

    def test_masks_must_fit_the_pairs(self, parquet, tmp_path):
        with pytest.raises(ValueError, match="flips must hold one value for each of the 2 pairs"):
            build(parquet, tmp_path).batch([0, 1], fixed(flips=[True], drop_caption=[False, False]))

    def test_batch_helpers(self, parquet, tmp_path):
        batch = build(parquet, tmp_path).batch([0, 3], fixed(flips=[False, False], drop_caption=[False, False]))
        noise = torch.randn(batch.latent_mean.shape, generator=torch.Generator().manual_seed(0))
        x0 = sample_latents(batch, noise)
        assert torch.equal(sample_latents(batch, torch.zeros_like(noise)), batch.latent_mean)
        torch.testing.assert_close(x0 - batch.latent_mean, batch.latent_std * noise, rtol=1e-4, atol=1e-5)
        winners = batch.winners()
        assert torch.equal(winners.latent_mean, batch.latent_mean[:2])
        assert winners.prompt_embeds.shape[0] == winners.sizes.shape[0] == winners.pooled_prompt_embeds.shape[0] == 2
        moved = batch.to("meta")
        assert moved.latent_std.device.type == moved.example_ids.device.type == "meta"
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


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [({"dtype": "float8"}, 'Unknown cache dtype "float8"'), ({"batch_size": 0}, "batch_size must be at least 1"),
         ({"transform": PairTransform(16, center_crop=False)}, "random crop cannot be cached")],
    )  # fmt: skip
    def test_wrong_settings(self, parquet, tmp_path, settings, message):
        with pytest.raises(DataError, match=message):
            build(parquet, tmp_path, **settings)

    def test_overflow_in_storing_and_in_the_encoder(self, parquet, tmp_path):
        loud = TinyEncoder()
        loud.moments.weight.data *= 1e5
        with pytest.raises(DataError, match=r"not finite, once stored as torch\.float16.*fp16-fix"):
            build(parquet, tmp_path, loud, dtype="float16")
        loud.moments.weight.data[0] = float("nan")
        with pytest.raises(DataError, match="already before storing"):
            build(parquet, tmp_path, loud)

    def test_an_encoder_that_changes_its_shape_under_one_fingerprint(self, parquet, tmp_path):
        encoder = FailingEncoder(after=2)
        with pytest.raises(RuntimeError, match="power"):
            build(parquet, tmp_path, encoder)
        encoder = TinyEncoder()
        encoder.moments = torch.nn.Conv2d(3, 8, 2, stride=2)
        with pytest.raises(DataError, match="fingerprint must change"):
            build(parquet, tmp_path, encoder)

    def test_full_disk_keeps_what_is_finished(self, parquet, tmp_path, monkeypatch, encoder):
        real, writes = AppendStore.commit, []

        def fill_up(self, **state):
            writes.append(state)
            if len(writes) == 2:
                monkeypatch.setattr("diffalign.data.cache_store.write_json", disk_full)
            real(self, **state)

        def disk_full(*arguments, **options):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(AppendStore, "commit", fill_up)
        with pytest.raises(DataError, match=r"No space left on device.*intact.*run again"):
            build(parquet, tmp_path)
        monkeypatch.undo()
        cache = build(parquet, tmp_path, encoder)
        assert len(cache) == 6
        assert sum(encoder.image_batches) == 2 * (9 - 4)  # the first batch was not encoded again

    def test_directory_that_cannot_be_made(self, parquet, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(DataError, match="Cannot make the folder"):
            build(parquet, tmp_path / "file")


class FailingEncoder(TinyEncoder):
    """Stop after some image batches, as a killed process would."""

    def __init__(self, after: int):
        super().__init__()
        self.after = after

    def encode_images(self, images):
        if len(self.image_batches) == self.after:
            raise RuntimeError("power failure")
        return super().encode_images(images)


class TestBrokenImages:
    @pytest.fixture
    def damaged(self, tmp_path):
        data = rows(9)
        data[3]["jpg_0"] = data[3]["jpg_0"][:60]
        data[6]["jpg_1"] = b""
        return write_parquet(tmp_path / "a.parquet", data)

    def test_the_first_is_named(self, damaged, tmp_path):
        with pytest.raises(RowError, match=r"a\.parquet, row 3: cannot decode"):
            build(damaged, tmp_path / "cache")

    def test_skipping_counts_lists_and_leaves_the_rest(self, damaged, tmp_path):
        log = tmp_path / "bad.jsonl"
        source = open_pairs(damaged, on_error="skip", error_log=log)
        cache = build(source, tmp_path / "cache")
        assert len(cache) == 7
        assert cache.source_index.tolist() == [0, 1, 2, 4, 5, 7, 8]
        assert source.counts.skipped == {"broken image": 1, "missing image": 1}
        assert [json.loads(line)["row"] for line in log.read_text().splitlines()] in ([3, 6], [6, 3])
        assert cache.example_ids.tolist() == [open_pairs(damaged)[i].example_id for i in cache.source_index]
        assert [record["row"] for record in cache.meta["skipped"]] == [3, 6]

    def test_a_cache_with_gaps_is_not_passed_off_as_whole(self, damaged, tmp_path, encoder):
        build(open_pairs(damaged, on_error="skip"), tmp_path / "cache")
        with pytest.raises(RowError, match="row 3"):
            build(damaged, tmp_path / "cache")
        again = open_pairs(damaged, on_error="skip", error_log=tmp_path / "bad.jsonl")
        build(again, tmp_path / "cache", encoder)
        assert encoder.image_batches == []
        assert again.counts.skipped == {"broken image": 1, "missing image": 1}

    def test_after_an_error_skipping_continues_where_it_stopped(self, damaged, tmp_path, encoder):
        with pytest.raises(RowError, match="row 3"):
            build(damaged, tmp_path / "cache", batch_size=2)
        build(open_pairs(damaged, on_error="skip"), tmp_path / "cache", encoder, batch_size=2)
        whole = TinyEncoder()
        build(open_pairs(damaged, on_error="skip"), tmp_path / "whole", whole, batch_size=2)
        assert 0 < sum(encoder.image_batches) < sum(whole.image_batches)
        assert_same_cache(tmp_path / "cache", tmp_path / "whole")

    def test_nothing_usable(self, tmp_path):
        file = write_parquet(tmp_path / "a.parquet", rows(2, jpg_0=b"x"))
        with pytest.raises(DataError, match=r"no usable pair.*2 skipped \(broken image\)"):
            build(open_pairs(file, on_error="skip"), tmp_path / "cache")

    def test_online_replaces_a_broken_pair_by_the_next(self, damaged):
        settings = {"flips": [False] * 3, "drop_caption": [False] * 3}
        with pytest.raises(RowError, match="row 3"):
            OnlinePairs(open_pairs(damaged), TinyEncoder(), TRANSFORM).batch([1, 3, 8], fixed(**settings))
        source = open_pairs(damaged, on_error="skip")
        online = OnlinePairs(source, TinyEncoder(), TRANSFORM)
        batch, again = (online.batch([1, 3, 6], fixed(**settings)) for _ in range(2))
        assert batch.example_ids.tolist() == [source[i].example_id for i in (1, 4, 7)]
        assert torch.equal(batch.latent_mean, again.latent_mean)
        assert source.counts.skipped == {"broken image": 1, "missing image": 1}


def test_online_replaces_a_pair_whose_file_vanished(tmp_path):
    lines = [{"prompt": "a cat", "chosen": f"{i}.png", "rejected": f"{i + 1}.png"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    source = open_pairs(tmp_path / "pairs.jsonl", on_error="skip")
    ids = [row.example_id for row in source]
    (tmp_path / "0.png").unlink()
    batch = OnlinePairs(source, TinyEncoder(), TRANSFORM).batch([0, 2], fixed([False] * 2, [False] * 2))
    assert batch.example_ids.tolist() == [ids[1], ids[2]]
    assert source.counts.skipped == {"missing image": 1}


def test_random_crops_online(parquet):
    source = open_pairs(parquet)
    online = OnlinePairs(source, TinyEncoder(), PairTransform(16, center_crop=False))
    settings = {"flips": [False, True], "drop_caption": [False, False]}
    with pytest.raises(ValueError, match="crops"):
        online.batch([0, 1], fixed(**settings))
    batch = online.batch([0, 1], fixed(crops=torch.tensor([[0.0, 0.0], [0.5, 0.99]]), **settings))
    assert batch.sizes[:, 3].tolist() == [0, 0, 0, 0]  # left edge, twice mirrored: the right edge becomes the left one
    assert torch.equal(batch.sizes[:2], batch.sizes[2:])
    image = to_images([online.transform.view(ImageRef(data=picture(0)).load(), (0.0, 0.0)).pixels])
    torch.testing.assert_close(batch.latent_mean[0], TinyEncoder().encode_images(image)[0][0], rtol=1e-5, atol=1e-6)


def assert_same_cache(one, other):
    (one,), (other,) = ([p for p in folder.iterdir() if p.is_dir()] for folder in (one, other))
    assert one.name == other.name
    ours, theirs = files_of(one), files_of(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert len(ours["latents.npy"]) > 1000


BUILD = """
import sys, torch
torch.set_num_threads(1)
from tests.data.world import TinyEncoder
from diffalign.data import LatentCache, PairTransform, open_pairs
source = open_pairs(sys.argv[1], on_error="skip")
encoder = TinyEncoder(**{sys.argv[3]: 0.3})
LatentCache.build(source, encoder, PairTransform(16), sys.argv[2], batch_size=4, progress=False,
                  dtype="float32")
"""


class TestResume:
    @pytest.fixture
    def many(self, tmp_path):
        data = [dict(row, caption=f"prompt {i}") for i, row in enumerate(rows(70))]
        data[4]["jpg_0"] = b"broken"
        data[50]["jpg_1"] = data[50]["jpg_1"][:50]
        return write_parquet(tmp_path / "a.parquet", data, 8)

    @pytest.mark.parametrize("phase", ["image", "prompt"])
    def test_kill_minus_nine(self, many, tmp_path, phase):
        wanted = {"image": lambda state: 5 < state.get("next", 0) < 40, "prompt": lambda s: s.get("images_done")}
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", BUILD, many, tmp_path / "killed", f"{phase}_delay"]
        process = subprocess.Popen(command, env=environment)
        progress = wait_for(tmp_path / "killed", wanted[phase], process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        encoder, whole = TinyEncoder(), TinyEncoder()
        resumed = build(open_pairs(many, on_error="skip"), tmp_path / "killed", encoder)
        build(open_pairs(many, on_error="skip"), tmp_path / "whole", whole)
        assert_same_cache(tmp_path / "killed", tmp_path / "whole")
        assert len(resumed) == 68
        done = progress["arrays"]["latents.npy"]["rows"]
        assert 0 < done
        assert sum(encoder.image_batches) <= sum(whole.image_batches) - 2 * done
        assert (encoder.image_batches == []) == (phase == "prompt")

    @pytest.mark.parametrize("after", range(1, 11))
    def test_stopped_after_any_batch(self, tmp_path, after):
        # Three images a batch and none shared: every other batch ends inside a pair.
        data = [dict(row, jpg_0=picture(2 * i), jpg_1=picture(2 * i + 1)) for i, row in enumerate(rows(7))]
        file = write_parquet(tmp_path / "a.parquet", data)
        encoder, whole = TinyEncoder(), TinyEncoder()
        try:
            build(file, tmp_path / "stopped", FailingEncoder(after), batch_size=3)
        except RuntimeError:
            build(file, tmp_path / "stopped", encoder, batch_size=3)
        build(file, tmp_path / "whole", whole, batch_size=3)
        assert_same_cache(tmp_path / "stopped", tmp_path / "whole")
        assert whole.image_batches == [3] * 8 + [2] * 2
        # A batch is committed with its mirror images: an odd number of calls loses one.
        assert encoder.image_batches == whole.image_batches[after // 2 * 2 :]

    def test_what_was_written_after_the_last_commit_is_dropped(self, parquet, tmp_path):
        with pytest.raises(RuntimeError):
            build(parquet, tmp_path / "stopped", FailingEncoder(2))
        (folder,) = (path for path in (tmp_path / "stopped").iterdir() if path.is_dir())
        for name in ("latents.npy", "prompts.jsonl", "sizes.npy"):
            with open(folder / name, "ab") as file:
                file.write(b"half a batch")
        build(parquet, tmp_path / "stopped")
        build(parquet, tmp_path / "whole")
        assert_same_cache(tmp_path / "stopped", tmp_path / "whole")

    def test_after_a_reboot_only_synced_commits_count(self, parquet, tmp_path, monkeypatch, encoder):
        monkeypatch.setattr("diffalign.data.cache_store.SYNC_SECONDS", -1.0)
        with pytest.raises(RuntimeError):
            build(parquet, tmp_path / "stopped", FailingEncoder(2))
        monkeypatch.setattr("diffalign.data.cache_store.SYNC_SECONDS", 1e9)
        with pytest.raises(RuntimeError):
            build(parquet, tmp_path / "stopped", FailingEncoder(2))
        (folder,) = (path for path in (tmp_path / "stopped").iterdir() if path.is_dir())
        latest = json.loads((folder / "progress.json").read_text())
        assert latest["arrays"]["latents.npy"]["rows"] == 8
        (folder / "progress.json").write_text(json.dumps(latest | {"boot": "before the power failed"}))
        os.truncate(folder / "latents.npy", 192 + 4 * 2 * 2 * 64 * 4)  # the second batch did not reach the disk
        build(parquet, tmp_path / "stopped", encoder)
        build(parquet, tmp_path / "whole")
        assert_same_cache(tmp_path / "stopped", tmp_path / "whole")
        assert sum(encoder.image_batches) == 2 * (9 - 4)

    def test_lost_data_is_not_papered_over(self, parquet, tmp_path):
        with pytest.raises(RuntimeError):
            build(parquet, tmp_path, FailingEncoder(2))
        (folder,) = (path for path in tmp_path.iterdir() if (path / "progress.json").exists())
        os.truncate(folder / "latents.npy", 500)
        with pytest.raises(DataError, match="shorter than was recorded"):
            build(parquet, tmp_path)

    def test_two_at_once_build_once(self, parquet, tmp_path):
        encoders = [TinyEncoder(image_delay=0.02) for _ in range(3)]
        threads = [threading.Thread(target=build, args=(parquet, tmp_path, encoder)) for encoder in encoders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(len(encoder.image_batches) for encoder in encoders) == [0, 0, 6]
        assert len(LatentCache.open(tmp_path)) == 6


def wait_for(directory, wanted, process):
    """Return the progress of a build once it is as wanted."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        for path in directory.glob("*/progress.json"):
            progress = json.loads(path.read_text())
            if wanted(progress["state"]):
                return progress
        assert process.poll() is None, "the build ended before it could be killed"
        time.sleep(0.01)
    raise AssertionError("the build did not get there in time")
