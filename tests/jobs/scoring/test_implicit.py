"""The implicit reward: its formula, which pictures it prefers, and its way through the command line."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from diffalign import backbones
from diffalign.backbones import adapters, export
from diffalign.cli import app
from diffalign.data import open_pairs
from diffalign.denoising.paths import add_noise, target
from diffalign.errors import UserError
from diffalign.jobs.scoring import scorers
from diffalign.jobs.scoring.implicit import ImplicitReward
from diffalign.rollout import PromptEncoder
from reward_models.preprocess import to_tensor
from tests.jobs.material import png, write_pairs, write_run

ASSETS = Path(__file__).parents[3] / "assets"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return 8 pairs and the folder of a LoRA that DPO has trained on them, on draws other than the scorer's."""
    pairs = list(open_pairs(str(ASSETS / "tiny-pairs")))[:8]
    backbone = backbones.load(ASSETS / "tiny-sdxl")
    images = [to_tensor(image.load()) for side in (0, 1) for image in (pair.images[side] for pair in pairs)]
    x0, _ = backbone.encode_images(torch.stack(images))
    cond = PromptEncoder(backbone, 64)([pair.prompt for pair in pairs] * 2, torch.device("cpu")).cond
    parameters = adapters.add_lora(backbone.denoiser, 8, 8.0)
    optimizer, generator = torch.optim.AdamW(parameters, lr=1e-3), torch.Generator().manual_seed(0)
    for _ in range(12):
        noise = torch.randn(8, *x0.shape[1:], generator=generator).repeat(2, 1, 1, 1)
        times = torch.randint(0, 1000, (8,), generator=generator).repeat(2)
        xt, wanted = add_noise(backbone.path, x0, noise, times), target(backbone.path, x0, noise, times)
        backbone.denoiser.disable_adapters()
        with torch.no_grad():
            reference = (backbone.predict(backbone.denoiser, xt, times, cond) - wanted).square().mean((1, 2, 3))
        backbone.denoiser.enable_adapters()
        gain = reference - (backbone.predict(backbone.denoiser, xt, times, cond) - wanted).square().mean((1, 2, 3))
        loss = -torch.nn.functional.logsigmoid(1000 * (gain[:8] - gain[8:])).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("lora")
    export.save_lora(backbone.denoiser, folder, str(ASSETS / "tiny-sdxl"))
    return pairs, folder


def test_it_prefers_the_winners_a_dpo_run_has_learnt(trained):
    pairs, folder = trained
    scorer = ImplicitReward(str(folder), "cpu", num_draws=8)
    images = [image.load() for side in (0, 1) for image in (pair.images[side] for pair in pairs)]
    scores = scorer.score(images, [pair.prompt for pair in pairs] * 2)
    assert (scores[:8] > scores[8:]).float().mean() >= 0.75
    assert (scores[:8] - scores[8:]).mean() > 0
    scorer.batch_size = 5
    torch.testing.assert_close(scorer.score(images, [pair.prompt for pair in pairs] * 2), scores, rtol=1e-3, atol=1e-3)


def test_the_base_is_worth_nothing_and_a_whole_model_is_refused(tmp_path, tiny_sdxl):
    scorer = ImplicitReward(str(write_run(tmp_path / "run", tiny_sdxl).folder), "cpu", num_draws=2)
    picture = Image.new("RGB", (40, 32), "red")
    assert scorer.score([picture], ["a red wall"]).abs() > 1e-3
    with torch.no_grad():
        for name, parameter in scorer.policy.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert scorer.score([picture], ["a red wall"]).item() == 0.0
    with pytest.raises(UserError, match="whole model"):
        ImplicitReward(str(tiny_sdxl), "cpu")
    with pytest.raises(UserError, match="implicit=runs/demo"):
        scorers.parse("implicit")


def test_it_scores_from_the_command_line(lora_run, tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    arguments = ["score", str(tmp_path), "--prompt", "a red wall", "--with", f"implicit={lora_run.folder}"]
    done = CliRunner().invoke(app, [*arguments, "--device", "cpu", "--out", str(tmp_path / "scores.parquet")])
    assert done.exit_code == 0, done.output
    assert CliRunner().invoke(app, ["show", "scorer", "implicit"]).output.startswith("implicit")


def test_it_judges_models_and_chooses_pairs(lora_run, tmp_path):
    """`evaluate` and `filter` take what `score` takes."""
    judge, prompts = f"implicit={lora_run.folder}", tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na green star\n")
    few = ["--prompts", prompts, "--steps", "2", "--resamples", "100", "--device", "cpu", "--out", tmp_path / "judged"]
    done = CliRunner().invoke(app, [*map(str, ["evaluate", lora_run.folder, "--show-base", "--with", judge, *few])])
    assert done.exit_code == 0, done.output
    scores = pd.read_parquet(tmp_path / "judged" / "scores.parquet")
    assert set(scores["scorer"]) == {"implicit"}
    assert scores["score"].std() > 0

    rows = [(png(200, i), png(40, i), 1.0, f"a circle {i}") for i in range(3)]
    pairs, out = write_pairs(tmp_path / "pairs.parquet", rows), tmp_path / "chosen"
    wanted = ["filter", pairs, "--method", "margin", "--keep", "2", "--scorer", judge, "--device", "cpu", "--out", out]
    done = CliRunner().invoke(app, [*map(str, wanted)])
    assert done.exit_code == 0, done.output
    margins = pd.read_parquet(out / "selection.parquet")["value"]
    assert len(open_pairs(str(out / "train.parquet"))) == len(margins) == 2
    assert margins.is_monotonic_decreasing
    assert margins.std() > 0
