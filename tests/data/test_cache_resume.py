import json
import os
import threading

import pytest

from diffalign.data import LatentCache, open_pairs
from diffalign.errors import DataError
from tests.data.caching import FailingEncoder, assert_same_cache, build, kill_while_building
from tests.data.world import TinyEncoder, picture, rows, write_parquet


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
        progress = kill_while_building(many, tmp_path / "killed", f"{phase}_delay", wanted[phase])
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
