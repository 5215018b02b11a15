"""`diffalign generate --negative-lora` and `diffalign grid --negative-lora`, as a user types them."""

import pytest
from PIL import Image

from diffalign.evaluation import Manifest
from tests.jobs.material import write_run


@pytest.fixture(scope="session")
def npo_run(tiny_sdxl, tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "npo", tiny_sdxl, seed=2)


def drawing(model, out, *more):
    prompts = ("--prompt", "a red circle", "--seeds", "0-1")
    return (model, "--out", out, *prompts, "--steps", "2", "--device", "cpu", *more)


def test_pictures_drawn_against_a_negative_network(diffalign, lora_run, npo_run, tmp_path):
    negative = ("--negative-lora", npo_run.folder)
    assert diffalign("generate", *drawing(lora_run.folder, tmp_path / "dpo"))[0] == 0
    assert diffalign("generate", *drawing(lora_run.folder, tmp_path / "npo", *negative))[0] == 0
    dpo, npo = Manifest.read(tmp_path / "dpo"), Manifest.read(tmp_path / "npo")
    dpo.require_comparable(npo)
    assert npo.identity.endswith("negative branch npo x 1.0, policy x 1.0")
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(dpo.paths, npo.paths, strict=True))
    # Pictures of another network never get into the folder.
    for changed in ((), (*negative, "--negative-scale", "0.5"), (*negative, "--policy-scale", "0.5")):
        code, said = diffalign("generate", *drawing(lora_run.folder, tmp_path / "npo", *changed))
        assert code == 2
        assert "negative branch npo x 1.0, policy x 1.0" in said


def test_a_grid_against_a_negative_network(diffalign, lora_run, npo_run, tmp_path):
    figures = []
    for name, more in (("dpo", ()), ("npo", ("--negative-lora", npo_run.folder))):
        out = tmp_path / f"{name}.png"
        code, said = diffalign("grid", *drawing(lora_run.folder, out, "--show-base", *more))
        assert code == 0, said
        figures.append(Image.open(out).tobytes())
    assert figures[0] != figures[1]


@pytest.mark.parametrize("command", ["generate", "grid"])
def test_what_has_no_effect_or_is_no_network_is_refused(diffalign, lora_run, npo_run, tmp_path, command):
    out = tmp_path / "out.png"
    for more, message in (
        (("--negative-lora", npo_run.folder, "--guidance-scale", "1"), "--guidance-scale must be above 1, got 1."),
        (("--negative-lora", lora_run.base), "is no LoRA, UNet or training run"),
        (("--negative-lora", tmp_path / "none"), "There is no model at"),
        (("--negative-scale", "2"), "--negative-scale 2 has no effect without --negative-lora"),
        (
            ("--negative-lora", npo_run.folder, "--negative-scale", "-1"),
            "--negative-scale must be a number of at least 0",
        ),
    ):
        code, said = diffalign(command, *drawing(lora_run.folder, out, *more))
        assert code == 2
        assert message in said
    assert not out.exists()
