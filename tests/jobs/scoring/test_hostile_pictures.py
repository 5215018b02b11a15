"""One hostile picture is one rejected row, whatever the source; only pictures leave the folder they are in."""

import json
import os
import tarfile

import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign.data import open_pairs
from diffalign.errors import DataError
from diffalign.evaluation import Manifest
from diffalign.filtering.components import Components
from diffalign.filtering.writing import write_pairs
from diffalign.jobs.drawing import pictures
from diffalign.jobs.scoring.decode import Decoder
from diffalign.jobs.scoring.places import open_places
from diffalign.jobs.scoring.rank import _bytes
from tests.jobs.material import png
from tests.jobs.scoring.test_score_sources import write_tar
from tests.reward_models.test_pictures import black_png, encoded

GOOD = png(90, 1)
POSTSCRIPT = encoded(Image.new("RGB", (8, 8)), "EPS")
BOMB = black_png(10_000, 10_000)
NOT_PICTURES = {"eps": POSTSCRIPT, "bomb": BOMB, "half": GOOD[: len(GOOD) // 2], "nothing": b"", "text": b"secret"}


def faults(*places, **how):
    """Return why each picture of places cannot be scored, None for one that can, by the end of its name."""
    source = open_places([str(place) for place in places], prompt="a cat", **how)
    items = list(source.items(0, len(source)))
    made = Decoder((None,), (b"",))[items]
    return {item.name.rpartition("/")[2]: made.faults.get(row) for row, item in enumerate(items)}


def test_hostile_files_are_rejected_rows(tmp_path):
    for name, content in {**NOT_PICTURES, "good": GOOD}.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    os.mkfifo(tmp_path / "pipe.png")
    found = faults(tmp_path)
    assert found.pop("good.png") is None
    assert found.keys() == {f"{name}.png" for name in NOT_PICTURES}
    assert "it is not a picture" == found["eps.png"] == found["text.png"]
    assert "10000x10000 pixels" in found["bomb.png"]
    assert found["nothing.png"] == "it is empty"
    assert "no regular file" in faults(tmp_path / "pipe.png")["pipe.png"]  # named, so it is not hung on


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_hostile_rows_of_tables_are_rejected_rows(tmp_path, kind):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "good.png").write_bytes(GOOD)
    (tmp_path / "secret.png").write_bytes(GOOD)
    names = ["good.png", "../secret.png", str(tmp_path / "secret.png"), "/dev/zero", "a\0b", "n" * 4000]
    table = pd.DataFrame({"image": names, "caption": "a cat"})
    file = tmp_path / "data" / f"table.{kind}"
    if kind == "parquet":
        table.to_parquet(file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in table.to_dict("records")) + "[" * 100_000)
    found = list(faults(file).values())
    assert found[0] is None
    assert all("leads out of" in fault for fault in found[1:4])
    assert all(found[1:])
    widened = list(faults(file, root=tmp_path).values())
    assert widened[:3] == [None] * 3
    assert all(widened[3:])
    if kind == "parquet":
        pd.DataFrame({"image": list(NOT_PICTURES.values()), "caption": "a cat"}).to_parquet(file)
        assert all(faults(file).values())


def test_hostile_members_of_tars_are_rejected_rows(tmp_path):
    samples = [(f"{name}.png", content) for name, content in NOT_PICTURES.items()]
    samples += [("good.png", GOOD), ("._good.png", b"?"), ("__MACOSX/good.png", b"?"), (".thumbnails/good.png", GOOD)]
    samples += [("deep.json", b"[" * 100_000), ("deep.png", GOOD), ("long.txt", bytes(2 << 20)), ("long.png", GOOD)]
    file = write_tar(tmp_path / "shard.tar", samples)
    found = faults(file)
    assert {name.rpartition(":")[2] for name, fault in found.items() if fault is None} == {
        "good.png", "deep.png", "long.png"
    }  # fmt: skip
    assert len(found) == len(NOT_PICTURES) + 3
    captions = open_places([str(file)]).table().set_index("file")["prompt"]
    assert captions[f"{file}:long.png"] == captions[f"{file}:deep.png"] == ""


def test_absurd_tar_headers_are_rejected_rows(tmp_path):
    file = write_tar(tmp_path / "shard.tar", [("good.png", GOOD)])
    content = file.read_bytes()[: 512 + -(-len(GOOD) // 512) * 512]
    huge = tarfile.TarInfo("huge.png")
    huge.size = 1 << 60
    sparse = tarfile.TarInfo("sparse.png")
    sparse.size, sparse.type = len(GOOD), tarfile.GNUTYPE_SPARSE
    header = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (0, len(GOOD))  # one stretch of data, of a file of four gigabytes
    header[482:495] = b"\0%011o\0" % (1 << 32)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    body = GOOD.ljust(-(-len(GOOD) // 512) * 512, b"\0")
    file.write_bytes(content + bytes(header) + body + huge.tobuf(tarfile.GNU_FORMAT) + GOOD)
    found = {name.rpartition(":")[2]: fault for name, fault in faults(file).items()}
    assert found["good.png"] is None
    assert "sparse member" in found["sparse.png"]
    assert f"{1 << 60} bytes" in found["huge.png"]


def test_links_out_of_a_folder_need_a_root(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(GOOD)
    (tmp_path / "secret.png").write_bytes(GOOD)
    (folder / "b.png").symlink_to("../secret.png")
    assert [path.name for path in pictures.find([str(folder)])] == ["a.png"]
    assert [path.name for path in pictures.find([str(folder / "*.png")])] == ["a.png"]
    assert [path.name for path in pictures.find([str(folder)], tmp_path)] == ["a.png", "b.png"]
    assert pictures.find([str(folder / "b.png")]) == [folder / "b.png"]  # named by the user, not by data


def test_a_manifest_names_files_of_its_folder_only(tmp_path):
    requested = pd.DataFrame({"prompt_id": range(3), "prompt": "a cat", "seed": 0})
    manifest = Manifest.plan(tmp_path / "drawn", requested, settings={}, identity="x")
    table = manifest.table.assign(file=["00000-0.png", "../secret.png", "/etc/passwd"])
    Manifest(manifest.directory, table, {}, "x")._write()
    assert Manifest.read(manifest.directory).table["file"].tolist() == ["00000-0.png"]


def test_only_pictures_are_copied(tmp_path):
    for name, content in (("good", GOOD), ("other", png(30, 2)), ("secret", b"password")):
        (tmp_path / f"{name}.png").write_bytes(content)
    lines = [{"prompt": "a", "chosen": "good.png", "rejected": f"{name}.png"} for name in ("other", "secret")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for on_error in ("skip", "raise"):
        source = open_pairs(str(tmp_path / "pairs.jsonl"), on_error=on_error)
        table = Components.of(source, {}).table
        if on_error == "raise":
            with pytest.raises(DataError, match=r"line 2: cannot decode .*secret\.png \(it is not a picture\)"):
                write_pairs(source, table, slice(None), tmp_path / "out.parquet")
            continue
        write_pairs(source, table, slice(None), tmp_path / "out.parquet")
        written = pq.read_table(tmp_path / "out.parquet").to_pylist()
        assert [row["jpg_1"] for row in written] == [png(30, 2)]
        assert source.counts.skipped == {"broken image": 1}
    with pytest.raises(DataError, match=r"Cannot read the picture .*secret\.png \(it is not a picture\)"):
        _bytes(str(tmp_path / "secret.png"))


def test_captions_beside_pictures_lead_nowhere_else(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (tmp_path / "secret.txt").write_text("a secret")
    for name in ("a", "b"):
        (folder / f"{name}.png").write_bytes(GOOD)
    (folder / "a.txt").symlink_to("../secret.txt")
    os.mkfifo(folder / "b.caption")
    (folder / "b.txt").write_text("a cat")

    def captions(**how):
        source = open_places([str(folder)], **how)
        return [(item.prompt, item.fault) for item in source.items(0, len(source))]

    (prompt, fault), other = captions()
    assert prompt == ""
    assert "leads out of" in fault
    assert other == ("a cat", None)
    assert captions(root=tmp_path) == [("a secret", None), ("a cat", None)]
    (folder / "captions.json").symlink_to("../secret.txt")
    with pytest.raises(DataError, match=r"captions\.json leads out of"):
        captions()
