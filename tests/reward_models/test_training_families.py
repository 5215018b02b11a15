"""Training of each kind of scorer, over processes, and after a stop."""

import dataclasses
import json

import pytest
import torch
import torch.multiprocessing

import reward_models
from reward_models import training_ranks as ranks
from reward_models.base import ScorerError
from reward_models.pairs import RewardPair
from reward_models.preprocess import to_rgb, to_tensor
from reward_models.step_aware import EVALUATED_AT, StepAware
from reward_models.training import RewardRecipe, train_reward, validation_accuracy
from reward_models.training_families import family_of, pair_weights
from reward_models.training_recipes import IMAGE_REWARD, PAL, RECIPES, STEP_AWARE_SDXL
from reward_models.training_state import states
from tests.reward_models.toy import brightness_pairs

SHORT = RewardRecipe(
    learning_rate=2e-3, weight_decay=0.01, batch_size=8, max_steps=4, warmup_steps=1, eval_every=2, seed=0
)


def state_of(scorer):
    return {key: value.clone() for key, value in scorer.module.state_dict().items()}


def darkened(pairs, visit, timestep):
    """Stand for a diffusion model: the later the step, the less is left of the difference; visits differ."""
    times = torch.full((len(pairs),), 100 * (visit % 10) if timestep is None else timestep)
    keep = (1 - times / 1200).view(-1, 1, 1, 1)
    first, second = (torch.stack([to_tensor(to_rgb(pair[side])) for pair in pairs]) for side in (0, 1))
    return first * keep + 0.5 * (1 - keep), second * keep + 0.5 * (1 - keep), times


def test_image_reward_learns_and_keeps_its_first_layers(scorer_places):
    scorer = reward_models.load("image_reward", scorer_places["image_reward"])
    before, validation = state_of(scorer), brightness_pairs(30, seed=1)
    recipe = dataclasses.replace(
        IMAGE_REWARD, learning_rate=2e-3, frozen_share=0.5, batch_size=16, max_steps=40, eval_every=10
    )
    tie = (*brightness_pairs(1, seed=9)[0][:3], 0.5)
    result = train_reward(scorer, [*brightness_pairs(48, seed=0), tie], recipe, validation=validation)
    assert result.best_accuracy >= 0.9
    assert not scorer.module.training
    moved = {key for key, value in state_of(scorer).items() if not torch.equal(value, before[key])}
    assert not any(key.startswith(("vision.encoder.layers.0.", "text.encoder.layer.0.")) for key in moved)
    assert any(key.startswith("vision.encoder.layers.1.") for key in moved)
    assert any(key.startswith("head.") for key in moved)


def test_pal_learns_two_users_who_disagree_with_the_clip_frozen(scorer_places):
    scorer = reward_models.load("pal", scorer_places["pal"])
    before = state_of(scorer)
    pairs = [RewardPair(*pair, "ann") for pair in brightness_pairs(40, seed=0)]
    pairs += [RewardPair(a, b, prompt, 1 - label, "bob") for a, b, prompt, label in brightness_pairs(40, seed=2)]
    recipe = dataclasses.replace(PAL, learning_rate=1e-2, batch_size=20, max_steps=60, eval_every=20)
    result = train_reward(scorer, pairs, recipe, validation=[*pairs[:10], *pairs[-10:]])
    assert result.best_accuracy >= 0.9
    moved = {key for key, value in state_of(scorer).items() if not torch.equal(value, before[key])}
    assert moved
    assert all(key.startswith("heads.") for key in moved)
    first, second, prompt, label_0, _ = pairs[1]
    ann, bob = (float(scorer.for_user(user).compare(first, second, prompt)) > 0.5 for user in ("ann", "bob"))
    assert (ann, bob) == (bool(label_0), not label_0)


def test_a_step_aware_model_learns_what_its_steps_show(tiny_scorer_folders, tmp_path):
    scorer, validation = StepAware.from_clip(tiny_scorer_folders["pickscore"]), brightness_pairs(20, seed=1)
    with pytest.raises(ScorerError, match="give `pictures`"):
        train_reward(scorer, brightness_pairs(8, seed=0), SHORT)
    before = state_of(scorer)
    recipe = dataclasses.replace(SHORT, batch_size=16, max_steps=40, eval_every=20)
    arguments = {"validation": validation, "pictures": darkened, "directory": tmp_path}
    result = train_reward(scorer, brightness_pairs(48, seed=0), recipe, **arguments)
    assert result.best_accuracy >= 0.9
    assert set(result.accuracy_at) == set(EVALUATED_AT)
    assert result.best_accuracy == pytest.approx(sum(result.accuracy_at.values()) / len(EVALUATED_AT))
    moved = {key for key, value in state_of(scorer).items() if not torch.equal(value, before[key])}
    assert any("adaLN_modulation" in key for key in moved)
    saved = reward_models.load("step_aware", tmp_path)
    assert validation_accuracy(saved, validation, pictures=darkened) == result.best_accuracy


@pytest.mark.parametrize("name", ["hpsv2", "image_reward"])
def test_a_stopped_run_goes_on_with_the_same_bits(name, scorer_places, tmp_path):
    recipe = dataclasses.replace(RECIPES[name], learning_rate=1e-3, batch_size=8, max_steps=6, eval_every=3)
    pairs, states = brightness_pairs(24, seed=0), {}

    class Stop(Exception):
        """Stand for a killed process."""

    def stop(record):
        if record["step"] == 4:  # after the state of step 3
            raise Stop

    for kind in ("through", "stopped"):
        torch.manual_seed(len(states))  # the global generator must not matter: ImageReward has dropout
        scorer = reward_models.load(name, scorer_places[name])
        if kind == "stopped":
            with pytest.raises(Stop):
                train_reward(scorer, pairs, recipe, directory=tmp_path / kind, log=stop)
            scorer = reward_models.load(name, scorer_places[name])
        result = train_reward(scorer, pairs, recipe, directory=tmp_path / kind, resume=kind == "stopped")
        states[kind] = (state_of(scorer), result.history, result.best_step)
    assert states["through"][1:] == states["stopped"][1:]
    for key, value in states["through"][0].items():
        assert torch.equal(value, states["stopped"][0][key]), key
    changed = dataclasses.replace(recipe, learning_rate=0.1)
    with pytest.raises(ScorerError, match=r"learning_rate: 0\.001 then, 0\.1 now"):
        train_reward(scorer, pairs, changed, directory=tmp_path / "stopped", resume=True)
    with pytest.raises(ScorerError, match="nothing to resume"):
        train_reward(scorer, pairs, recipe, directory=tmp_path / "none", resume=True)


@pytest.mark.parametrize("kind", ["truncated", "a flipped bit", "without its proof"])
def test_the_last_state_that_is_whole_is_gone_on_from(tiny_scorer_folders, tmp_path, kind):
    pairs, told = brightness_pairs(16, seed=0), []
    recipe = dataclasses.replace(SHORT, max_steps=4, eval_every=1, warmup_steps=0)
    scorer, again = (reward_models.load("pickscore", tiny_scorer_folders["pickscore"]) for _ in range(2))
    train_reward(scorer, pairs, recipe, directory=tmp_path)
    assert [file.name for file in states(tmp_path)] == ["training-state-3.pt", "training-state-4.pt"]
    last = states(tmp_path)[-1]
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes({"truncated": content[:-10], "a flipped bit": content}.get(kind, last.read_bytes()))
    if kind == "without its proof":
        last.with_suffix(".sha256").unlink()
    result = train_reward(again, pairs, recipe, directory=tmp_path, resume=True, say=told.append)
    assert told == [f"Warning: {last} is damaged or incomplete, and is not used."]
    assert [record["step"] for record in result.history] == [1, 2, 3, 4]
    assert all(torch.equal(value, state_of(again)[key]) for key, value in state_of(scorer).items())


def one_of_two(rank, folder, out):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    train_shared(folder, out)
    torch.distributed.destroy_process_group()


def train_shared(folder, out):
    """Train with uneven weights: some prompts have more pairs than others."""
    pairs = [*brightness_pairs(20, seed=0), *brightness_pairs(7, seed=3)]
    scorer = reward_models.load("pickscore", folder)
    recipe = dataclasses.replace(SHORT, learning_rate=1e-4, max_steps=3, eval_every=3, warmup_steps=0)
    result = train_reward(scorer, pairs, recipe, directory=out / "best", validation=brightness_pairs(9, seed=4))
    if ranks.rank() == 0:
        (out / "history.json").write_text(json.dumps(result.history))


def test_two_processes_equal_one(tiny_scorer_folders, tmp_path):
    folder = tiny_scorer_folders["pickscore"]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    train_shared(folder, tmp_path / "one")
    torch.multiprocessing.spawn(one_of_two, (folder, tmp_path / "two"), nprocs=2)
    one, two = (
        json.loads((tmp_path / "one/history.json").read_text()),
        json.loads((tmp_path / "two/history.json").read_text()),
    )
    for first, second in zip(one, two, strict=True):
        assert first == pytest.approx(second, rel=1e-5)
    before = state_of(reward_models.load("pickscore", folder))
    first, second = (state_of(reward_models.load("pickscore", tmp_path / kind / "best")) for kind in ("one", "two"))
    for key, value in first.items():
        # Adam's first steps take the sign of a gradient, also of one that is rounding noise (a key's bias)
        if "k_proj.bias" not in key:
            torch.testing.assert_close(second[key], value, atol=2e-5, rtol=1e-4, msg=key)
    assert max((value - before[key]).abs().max() for key, value in first.items()) > 1e-4


def test_weights_are_those_of_the_whole_batch():
    pairs = [RewardPair(None, None, prompt, 1.0) for prompt in ("a", "a", "b")]
    torch.testing.assert_close(pair_weights(pairs, {"a": 2, "b": 1}, "pickscore"), torch.tensor([0.25, 0.25, 0.5]))
    assert pair_weights(pairs, {}, "hps").tolist() == [1, 1, 1]
    assert pair_weights(pairs, {}, "pairwise").sum() == pytest.approx(1)


def test_what_cannot_be_trained_is_named(scorer_places):
    with pytest.raises(ScorerError, match='"aesthetic" cannot be trained'):
        family_of(reward_models.load("aesthetic", scorer_places["aesthetic"]), SHORT, None)
    assert (STEP_AWARE_SDXL.learning_rate, STEP_AWARE_SDXL.max_steps) == (1e-6, 7000)
    assert (IMAGE_REWARD.learning_rate, IMAGE_REWARD.frozen_share, IMAGE_REWARD.drop_ties) == (1e-5, 0.7, True)
