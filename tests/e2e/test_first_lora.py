"""docs/first-lora.md: its commands, in their order, in an empty folder, with fewer prompts and steps."""

import re
import shlex
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console

from diffalign.jobs import label
from diffalign.labelling import Votes
from diffalign.labelling.store import pair_tasks

PAGE = Path(__file__).parents[2] / "docs" / "first-lora.md"
PROMPTS = [
    "a red circle on a blue background",
    "two green squares on a white background",
    "a yellow star on a black background",
]


def blocks(language):
    text = PAGE.read_text(encoding="utf8")
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [block for written, block in found if written == language]


def commands():
    lines = [line for block in blocks("") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("diffalign ")]


def smaller(words):
    """Return a command with two sampling steps."""
    return ["2" if before == "--steps" else word for before, word in zip(["", *words], words, strict=False)]


def vote(file):
    """Choose the left picture of every pair, as a person would on the page."""
    tasks = pair_tasks(label.named_pictures(["drawn"], Path("left_out.jsonl"), Console(quiet=True)))
    with Votes(file) as votes:
        votes.add(tasks)
        for number in range(1, len(tasks) + 1):
            votes.vote(number, "me", "left", 1.0)


def test_the_page(own_folder, diffalign):
    (own_folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (settings,) = blocks("yaml")
    small = settings.replace("max_train_steps: 60", "max_train_steps: 2") + "logging: {report_to: []}\n"
    (own_folder / "my.yaml").write_text(small)
    ran = []
    for words in commands():
        if words[0] == "label" and "--export" not in words:
            vote(Path("votes.sqlite"))
            continue
        code, said = diffalign(*smaller(words))
        assert code == 0, f"{words}: {said}"
        ran.append(words[0])
    assert ran == ["generate", "label", "train", "train", "grid", "evaluate", "export"]
    assert pq.read_table("pairs/train.parquet").num_rows == len(PROMPTS)
    for file in ("runs/mine/pytorch_lora_weights.safetensors", "grid.png", "report/report.html"):
        assert Path(file).is_file(), file
    assert list(Path("runs/mine/export").rglob("*.safetensors"))
