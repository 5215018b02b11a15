"""`diffalign caption`: from pairs of any source to what DCPO trains on, killed and started again or not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

from diffalign.captioning import DroppedWords, ImageToText
from diffalign.cli import app
from diffalign.cli.app import main
from diffalign.data import open_pairs
from diffalign.errors import ConfigError, DataError, ModelError
from diffalign.jobs.captioning import caption as job
from diffalign.jobs.captioning.captioners import Request
from diffalign.shapes.captioner import describe
from tests.captioning.models import write_blip
from tests.captioning.server import Server
from tests.data.world import log_of, picture, rows, write_parquet

ROOT = Path(__file__).parents[2]
WORLD = ROOT / "assets" / "tiny-pairs"
COLUMNS = ("caption_0", "caption_1")


@pytest.fixture
def pairs(tmp_path):
    """Return a parquet file of six pairs, the winner on either side, with a tie among them."""
    data = rows(7)
    data[3] |= {"label_0": 0.5, "label_1": 0.5}
    return write_parquet(tmp_path / "pairs" / "train.parquet", data)


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    return write_blip(tmp_path_factory.mktemp("models") / "blip")


def words(source, out, *more):
    return ["caption", *map(str, (source, "--out", out, *more))]


def run(source, out, *more):
    """Run the command and return what it prints; raise what it raises."""
    done = CliRunner().invoke(app, words(source, out, *more))
    if done.exception is not None:
        raise done.exception
    return " ".join(done.output.split())


def captions(file):
    return [row.prompts for row in open_pairs(file, image_caption_columns=COLUMNS)]


def test_captions_are_those_of_their_pictures(pairs, tmp_path):
    out, server = tmp_path / "out.parquet", Server()
    with server.running() as address:
        said = run(pairs, out, "--with", address, "--template", "Say.\n{prompt}")
    plain, captioned = open_pairs(pairs), open_pairs(out, image_caption_columns=COLUMNS)
    assert len(captioned) == len(plain) == 6
    for before, after in zip(plain, captioned, strict=True):
        assert [image.content for image in after.images] == [image.content for image in before.images]
        assert after.extra["caption"] == before.prompt
        for image, caption in zip(after.images, after.prompts, strict=True):
            shown = "-".join(map(str, image.load().resize((1, 1)).getpixel((0, 0))))
            assert caption == f"{shown} {before.prompt}"
    assert "6 pairs in" in said
    assert "data.image_caption_columns=[caption_0,caption_1]" in said


def test_the_embedded_world(tmp_path):
    out = tmp_path / "out.parquet"
    run(WORLD, out, "--with", "shapes", "--limit", 2)
    for before, after in zip(open_pairs(WORLD, max_samples=2), open_pairs(out), strict=True):
        assert before.example_id == after.example_id
        told = [describe(image.load(), before.prompt) for image in before.images]
        assert [after.extra[name] for name in COLUMNS] == told


def test_the_three_variants(tmp_path, pairs):
    drop = DroppedWords("weak").perturb
    with Server().running() as address:
        server = ("--with", address, "--template", "Say.\n{prompt} it is")
        weak = ("--perturb", "weak", "--perturb-with", "words")
        run(pairs, tmp_path / "c.parquet", *server)
        run(pairs, tmp_path / "h.parquet", *server, *weak)
        run(pairs, tmp_path / "w.parquet", *server, *weak, "--perturb-of", "winner")
    run(pairs, tmp_path / "p.parquet", "--with", "prompt", *weak)
    own = captions(tmp_path / "c.parquet")
    assert captions(tmp_path / "h.parquet") == [(chosen, drop(rejected)) for chosen, rejected in own]
    assert captions(tmp_path / "w.parquet") == [(chosen, drop(chosen)) for chosen, _ in own]
    prompts = [row.prompt for row in open_pairs(pairs)]
    assert captions(tmp_path / "p.parquet") == [(prompt, drop(prompt)) for prompt in prompts]


def test_a_server_perturbs_too(tmp_path, pairs):
    server = Server(models=("llava", "llama"))
    with server.running() as address:
        asked = ("--with", address, "--model", "llava", "--template", "Say.\n{prompt}")
        run(
            pairs,
            tmp_path / "h.parquet",
            *asked,
            "--perturb",
            "weak",
            "--perturb-with",
            address,
            "--perturb-model",
            "llama",
        )
    assert {body["model"] for body in server.bodies} == {"llava", "llama"}
    own = [text for pair in captions(tmp_path / "h.parquet") for text in pair]
    assert sum(text.startswith("Caption: ") for text in own) == 6  # this server repeats the last line


def test_folders_and_json_lines(tmp_path):
    for side, seed in (("w", 0), ("l", 1)):
        (tmp_path / "own" / side).mkdir(parents=True)
        (tmp_path / "own" / side / "1.png").write_bytes(picture(seed))
    (tmp_path / "own" / "w" / "1.txt").write_text("a red circle")
    lines = '{"prompt": "a red circle", "chosen": "own/w/1.png", "rejected": "own/l/1.png", "preference": 0.9}\n'
    (tmp_path / "a.jsonl").write_text(lines)
    with Server().running() as address:
        for name in ("own", "a.jsonl"):
            run(tmp_path / name, tmp_path / f"{name}.parquet", "--with", address)
            [row] = open_pairs(tmp_path / f"{name}.parquet", image_caption_columns=COLUMNS)
            assert row.chosen.content == picture(0)
            assert row.preference == (None if name == "own" else 0.9)


def test_an_interrupted_run_of_a_model_goes_on_to_the_same_file(pairs, tmp_path, blip, monkeypatch):
    asked, write = [], ImageToText._write

    def stops(self, images, prompts):
        asked.append(len(images))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return write(self, images, prompts)

    monkeypatch.setattr(ImageToText, "_write", stops)
    console, out, whole = Console(quiet=True), tmp_path / "out.parquet", tmp_path / "whole.parquet"
    how = {"captioner": f"blip={blip}", "template": "{prompt} of a", "batch_size": 4, "new_tokens": 5}

    def request(file):
        return Request(source=str(pairs), out=file, **how)

    with pytest.raises(KeyboardInterrupt):
        job.caption_pairs(request(out), console)
    assert not out.exists()
    job.caption_pairs(request(out), console)
    assert asked == [4, 4, 4, 1]  # nine distinct questions; the first batch is not asked again
    job.caption_pairs(request(whole), console)
    assert out.read_bytes() == whole.read_bytes()
    job.caption_pairs(request(out), console)
    assert len(asked) == 7  # all of it was known


def test_a_killed_run_goes_on_to_the_same_file(tmp_path):
    source, server = write_parquet(tmp_path / "many.parquet", rows(60)), Server()
    out, whole = tmp_path / "out.parquet", tmp_path / "whole.parquet"
    with server.running() as address:
        how = ("--with", address, "--template", "Say.\n{prompt}", "--concurrency", 2)
        command = [sys.executable, "-m", "diffalign", *words(source, out, *how)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(server.bodies) < 30 and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not out.exists()
        asked = len(server.bodies)
        assert asked >= 30
        run(source, out, *how)
        distinct = len(server.seen)
        assert distinct <= len(server.bodies) <= distinct + 5  # those that were on their way
        run(source, whole, *how)
    assert out.read_bytes() == whole.read_bytes()
    assert len(captions(out)) == 60


def test_pairs_without_picture_or_answer_are_left_out_counted_and_asked_for_again(tmp_path):
    data = rows(6)
    data[1]["jpg_1"] = b"no picture"
    data[4] |= {"caption": "unspeakable"}
    source, out, server = write_parquet(tmp_path / "a.parquet", data), tmp_path / "out.parquet", Server()
    with server.running() as address:
        server.always = {"unspeakable": "cut"}
        how = ("--with", address, "--template", "Say.\n{prompt}", "--retries", 0)
        said = run(source, out, *how)
        assert "Left out 2 of 6 rows as unusable: 1 broken image, 1 no caption" in said
        assert "1 pairs have no caption: run the same command again" in said
        assert len(captions(out)) == 4
        listed = log_of(tmp_path / "out.unusable_rows.jsonl")
        assert [(line["row"], line["reason"]) for line in listed] == [(1, "broken image"), (4, "no caption")]
        assert all(text.strip() for text in pq.read_table(out)["caption_1"].to_pylist())
        server.always = {}
        before = len(server.bodies)
        run(source, out, *how)
        assert len(server.bodies) == before + 2
        assert len(captions(out)) == 5
        with pytest.raises(DataError, match=r"row 1: .*--skip-broken"):
            run(source, out, *how, "--strict")


def test_no_caption_at_all_writes_nothing(pairs, tmp_path):
    with pytest.raises(DataError, match=r"no pair got its captions.*6 skipped \(no caption\)"):
        run(pairs, tmp_path / "out.parquet", "--with", "shapes")  # its prompts are no sentences of that world
    assert not (tmp_path / "out.parquet").exists()


def test_equal_captions_are_told(tmp_path, pairs):
    with Server().running() as address:
        how = ("--perturb", "weak", "--perturb-with", address)
        said = run(pairs, tmp_path / "out.parquet", "--with", "prompt", *how)
        assert "have one caption" not in said
    data = [row | {"jpg_1": row["jpg_0"]} for row in rows(3)]
    with Server().running() as address:
        said = run(write_parquet(tmp_path / "same.parquet", data), tmp_path / "same-out.parquet", "--with", address)
    assert "3 of 3 pairs have one caption for both pictures" in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--with", "blib"), 'Unknown captioner "blib". Did you mean "blip"?'),
        (("--with", "git=x"), 'Unknown captioner "git=x"'),
        (("--with", "model"), 'Unknown captioner "model"'),
        (("--with", "prompt"), "add --perturb weak"),
        (("--with", "shapes", "--perturb", "week"), 'Did you mean "weak"?'),
        (("--with", "shapes", "--perturb-with", "words"), "belong to --perturb"),
        (("--with", "shapes", "--perturb", "weak", "--perturb-of", "both"), "--perturb-of must be loser or winner"),
        (("--with", "shapes", "--perturb", "weak", "--perturb-with", "dippr"), 'Did you mean "dipper"?'),
        (("--with", "shapes", "--template", "x"), "leave out --template"),
        (("--with", "shapes", "--model", "x"), "give its address"),
        (("--with", "shapes", "--batch-size", "0"), "--batch-size must be at least 1"),
        (("--with", "shapes", "--retries", "-1"), "--retries must be >= 0"),
        (("--with", "shapes", "--strict", "--skip-broken"), "give one of them"),
    ],
)
def test_options_that_make_no_sense(pairs, tmp_path, more, message):
    with pytest.raises(ValueError, match=r".") as raised:
        run(pairs, tmp_path / "out.parquet", *more)
    assert message in str(raised.value)


def test_mistakes_are_told_without_a_traceback(pairs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["diffalign", *words(pairs, tmp_path / "o.parquet", "--with", f"blip={tmp_path}/no")]
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "Cannot load the captioner" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"must end in \.parquet"):
        run(pairs, tmp_path / "out.jsonl", "--with", "shapes")


def test_lists_are_refused_and_a_server_that_is_not_there_is_named(tmp_path, pairs):
    single = [{"image": picture(0), "label": 1.0, "caption": "x"}]
    with pytest.raises(DataError, match="only pairs are captioned"):
        run(write_parquet(tmp_path / "s.parquet", single), tmp_path / "out.parquet", "--with", "shapes")
    with pytest.raises(ModelError, match="No server answers"):
        run(pairs, tmp_path / "out.parquet", "--with", "http://127.0.0.1:9/v1")
