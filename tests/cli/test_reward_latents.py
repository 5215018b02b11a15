"""`diffalign reward train lrm`: LPO's judge of noisy latents, from pairs to a judge of rollouts."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign.backbones import loading
from diffalign.jobs.rewards import reward_latents
from diffalign.jobs.rewards.reward_latents import NoisyLatents
from diffalign.rollout import LatentReward
from reward_models import training
from reward_models.errors import ScorerError
from reward_models.pairs import RewardPair
from reward_models.training_families import family_of
from tests.jobs.material import png, write_pairs

CPU = torch.device("cpu")
RECIPE = dataclasses.replace(training.RECIPES["lrm"], learning_rate=1e-3, warmup_steps=0, batch_size=4, max_steps=4)


@pytest.fixture(scope="module")
def rows():
    """Return pairs of two grey levels; the brighter one wins."""
    return [(png(200, i), png(40, i), 1.0, f"a circle {i % 5}") for i in range(10)]


@pytest.fixture(scope="module")
def pairs(rows):
    return [RewardPair(first, second, prompt, label) for first, second, label, prompt in rows]


@pytest.fixture(scope="module")
def table(rows, tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.parquet", rows)


@pytest.fixture
def make(tiny_sdxl, tmp_path):
    """Return a function that makes a fresh judge with what it learns from."""

    def judge_and_latents():
        base = loading.load(tiny_sdxl)
        latents = NoisyLatents(base, tmp_path / "latents", 64, seed=1)
        return reward_latents.start(base, None, 1), latents

    return judge_and_latents


def command(table, model, out, *more):
    few = ["--batch-size", 4, "--warmup-steps", 0, "--learning-rate", 1e-3, "--max-steps", 2, "--device", "cpu"]
    return ["reward", "train", "lrm", table, "--model", model, "--out", out, "--seed", 1, *few, *more]


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_the_command_makes_a_folder_that_rollouts_load(family, diffalign, table, scorer_folders, request, tmp_path):
    model, out = request.getfixturevalue(f"tiny_{family}"), tmp_path / "lrm"
    clip = [] if family == "sdxl" else ["--init", scorer_folders["pickscore"]]
    code, told = diffalign(*command(table, model, out, *clip))
    assert code == 0, told
    assert f"rollout.scorer=lrm={out}" in told
    record = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert {f"validation_accuracy_{time}" for time in (1, 251, 501, 701, 951)} < set(record)
    names = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert any(name.startswith("mid_block") for name in names)
    assert not any(name.startswith(("up_blocks", "conv_out")) for name in names)
    judge = LatentReward.load(out, loading.load(model), CPU, 64)
    scores = judge(torch.randn(2, 4, 16, 16), ["a circle 1", "a circle 2"], torch.tensor([951, 1]))
    assert scores.shape == (1, 2)
    assert scores.unique().numel() == 2
    assert (
        diffalign(*command(table, model, tmp_path / "on", "--init", out, "--max-steps", 1))[0] == 0
    )  # goes on from it


def test_training_moves_every_part_and_what_is_saved_scores_alike(make, pairs, tiny_sdxl, tmp_path):
    judge, latents = make()
    before = {name: value.clone() for name, value in judge.module.state_dict().items()}
    vae = [value.clone() for value in latents.backbone.vae.parameters()]
    result = training.train_reward(judge, pairs, RECIPE, directory=tmp_path / "run", pictures=latents)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    moved = {name for name, value in judge.module.state_dict().items() if not torch.equal(value, before[name])}
    for part in ("unet.down_blocks", "unet.mid_block", "text_encoders.0", "text_encoders.1", "heads", "logit_scale"):
        assert any(name.startswith(part) for name in moved), part
    assert all(torch.equal(old, new) for old, new in zip(vae, latents.backbone.vae.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in judge.module.parameters())

    first, second, times = latents(pairs[:3], 0, 501)
    family = family_of(judge, RECIPE, latents)
    (_, batch), *_ = family.validation(pairs[:3], 3)
    batch = batch._replace(image_0=first, image_1=second, timesteps=times)
    with torch.no_grad():
        expected = [judge.logit_scale * score for score in family.scores(batch)]
    loaded = LatentReward.load(tmp_path / "run", loading.load(tiny_sdxl), CPU, 64)
    for noisy, score in zip((first, second), expected, strict=True):
        torch.testing.assert_close(loaded(noisy, batch.prompts, times)[0], score, rtol=1e-5, atol=1e-5)


def test_the_loss_is_the_cross_entropy_of_the_pair_and_no_pair_sees_another(make, pairs):
    judge, latents = make()
    family = family_of(judge, RECIPE, latents)
    batch = next(iter(family.batches(pairs, [(0, [0, 1, 2])])))._replace(label_0=torch.tensor([1.0, 0.0, 0.5]))
    with torch.no_grad():
        losses = family.losses(batch)
        logits = judge.logit_scale * torch.stack(family.scores(batch), dim=1)
        parts = torch.cat([family.losses(batch.part(start, 2)) for start in (0, 2)])
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    optimum = torch.tensor([1.0, 1.0, 2.0]).log()  # of a tie, which is taken off
    expected = -(targets * logits.log_softmax(1)).sum(1) - optimum
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts, losses, rtol=1e-4, atol=1e-5)
    with pytest.raises(ScorerError, match="in_batch_negatives"):
        family_of(judge, dataclasses.replace(RECIPE, in_batch_negatives=True), latents)
    with pytest.raises(ScorerError, match="give `pictures`"):
        family_of(judge, RECIPE, None)


def test_latents_are_noised_on_the_ladder_and_encoded_once(make, pairs, monkeypatch):
    _, latents = make()
    encoded, encode = [], latents.backbone.encode_images
    monkeypatch.setattr(latents.backbone, "encode_images", lambda x: encoded.append(len(x)) or encode(x))
    drawn = torch.cat([latents(pairs, visit)[2] for visit in range(60)])
    assert sorted(drawn.unique().tolist()) == list(range(1, 952, 50))
    assert sum(encoded) == 2 * len(pairs)
    first, second, times = latents(pairs, 7)
    alone = latents(pairs[4:5], 7)
    assert torch.equal(alone[0][0], first[4])
    assert torch.equal(alone[2], times[4:5])
    assert not torch.equal(first, latents(pairs, 8)[0])

    path, x0 = latents.backbone.path, torch.from_numpy(latents._encoded(pairs)).float()
    alpha, sigma = path.alpha_sigma(times)
    alpha, sigma = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    noises = [(xt - alpha * x0[:, side]) / sigma for side, xt in enumerate((first, second))]
    assert torch.stack(noises).std().item() == pytest.approx(1, abs=0.05)
    assert (noises[0] - noises[1]).std().item() == pytest.approx(2**0.5, abs=0.1)  # each picture has its own


def test_a_stopped_run_goes_on_with_the_same_bits(make, pairs, tmp_path):
    recipe, states = dataclasses.replace(RECIPE, eval_every=2), {}

    class Stop(Exception):
        """Stand for a killed process."""

    def stop(record):
        if record["step"] == 3:  # after the state of step 2
            raise Stop

    for kind in ("through", "stopped"):
        judge, latents = make()
        settings = {"directory": tmp_path / kind, "pictures": latents}
        if kind == "stopped":
            with pytest.raises(Stop):
                training.train_reward(judge, pairs, recipe, **settings, log=stop)
            judge, latents = make()
            settings["pictures"] = latents
        result = training.train_reward(judge, pairs, recipe, **settings, resume=kind == "stopped")
        states[kind] = (judge.module.state_dict(), result.history, result.accuracy_at)
    assert states["through"][1:] == states["stopped"][1:]
    for name, value in states["through"][0].items():
        assert torch.equal(value, states["stopped"][0][name]), name


def test_a_dry_run_tells_the_plan_and_writes_nothing(diffalign, table, tiny_sdxl, tmp_path):
    code, told = diffalign(*command(table, tiny_sdxl, tmp_path / "out", "--dry-run", "--recipe", "lrm_sdxl"))
    assert code == 0, told
    assert "8 pairs to train on, 2 held out" in told
    assert not (tmp_path / "out").exists()


WRONG = {
    "no model": (["--model", "missing/folder/here"], "There is no model at"),
    "draws": (["--draws", "2"], "leave --draws out"),
    "no judge": (["--init", "assets/tiny-pickscore"], "holds no judge of latents: it has no unet/"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_trained_is_refused(case, diffalign, table, tiny_sdxl, tmp_path):
    more, message = WRONG[case]
    code, told = diffalign(*command(table, tiny_sdxl, tmp_path / "out", *more))
    assert (code, message in told) == (2, True), told


def test_sd15_needs_the_projection_of_its_own_clip(diffalign, table, tiny_sd15, tmp_path):
    code, told = diffalign(*command(table, tiny_sd15, tmp_path / "out", "--init", Path("assets/tiny-pickscore")))
    assert code == 2
    assert "text_projection takes" in told
    code, told = diffalign(*command(table, tiny_sd15, tmp_path / "out"))
    assert code == 2
    assert "openai/clip-vit-large-patch14" in told


def test_published_recipes():
    sd15, sdxl = training.RECIPES["lrm"], training.RECIPES["lrm_sdxl"]
    assert (sd15.learning_rate, sd15.batch_size, sd15.max_steps, sd15.warmup_steps) == (1e-5, 128, 4000, 500)
    assert (sdxl.learning_rate, sdxl.batch_size, sdxl.max_steps, sdxl.warmup_steps) == (1e-5, 32, 8000, 1000)


def test_a_flow_model_has_no_ddim_steps_to_judge(diffalign, table, tiny_sd3, tmp_path):
    code, said = diffalign("reward", "train", "lrm", table, "--model", tiny_sd3, "--out", tmp_path / "judge")
    assert code == 2
    assert "lrm judges the latents of DDIM steps" in said
    assert "sampled along a flow" in said
