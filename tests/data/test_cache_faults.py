import json

import pytest
import torch

from diffalign.data import OnlinePairs, PairTransform, open_pairs
from diffalign.data.cache_store import AppendStore
from diffalign.data.pairs import RowError
from diffalign.errors import DataError
from tests.data.caching import TRANSFORM, FailingEncoder, assert_same_cache, build, fixed
from tests.data.world import TinyEncoder, picture, rows, write_parquet


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

    def test_a_disk_that_was_full_before(self, parquet, tmp_path, monkeypatch):
        def disk_full(*arguments, **options):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("diffalign.data.cache_store.write_json", disk_full)
        with pytest.raises(DataError, match=r"meta\.json: No space left on device"):
            build(parquet, tmp_path)

    def test_directory_that_cannot_be_made(self, parquet, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(DataError, match="Cannot make the folder"):
            build(parquet, tmp_path / "file")


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


class TestEqualSizeDamage:
    """A bit that turns on the disk changes no size; it is found where it is read."""

    @pytest.fixture
    def cache(self, parquet, tmp_path):
        return build(parquet, tmp_path / "cache")

    def turn(self, file, at):
        content = bytearray(file.read_bytes())
        content[at] ^= 1
        file.write_bytes(content)

    @pytest.mark.parametrize("name", ["latents", "prompt_embeds", "pooled_prompt_embeds"])
    def test_of_what_is_read_by_the_row(self, cache, name):
        whole = cache.batch([0, 1, 2], fixed([False] * 3, [False] * 3))
        self.turn(cache.folder / f"{name}.npy", -1)  # of the last row
        again = type(cache)(cache.folder)
        assert torch.equal(again.batch([0, 1, 2], fixed([False] * 3, [False] * 3)).latent_mean, whole.latent_mean)
        rows = list(range(len(again)))
        with pytest.raises(DataError, match=rf"{name}\.npy is damaged: by its checksum.* Delete .* and build it again"):
            again.batch(rows, fixed([True] * len(rows), [False] * len(rows)))

    @pytest.mark.parametrize("name", ["example_ids.npy", "pair_images.npy", "sizes.npy", "prompts.jsonl"])
    def test_of_what_is_read_when_it_is_opened(self, cache, name):
        self.turn(cache.folder / name, -2)
        with pytest.raises(DataError, match=rf"{name} is damaged"):
            type(cache)(cache.folder)

    def test_a_cache_from_before_checksums_is_read(self, cache):
        whole = cache.batch([0, 1], fixed([False] * 2, [False] * 2))
        for file in cache.folder.glob("*.crc.npy"):
            file.unlink()
        record = json.loads((cache.folder / "complete.json").read_text())
        del record["checksums"]
        record["files"] = {name: size for name, size in record["files"].items() if not name.endswith(".crc.npy")}
        (cache.folder / "complete.json").write_text(json.dumps(record))
        before = type(cache)(cache.folder).batch([0, 1], fixed([False] * 2, [False] * 2))
        assert torch.equal(before.latent_mean, whole.latent_mean)
