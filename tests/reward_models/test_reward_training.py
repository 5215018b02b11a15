import dataclasses
import math

import numpy as np
import pytest
import torch

import reward_models
from reward_models.base import ScorerError
from reward_models.pairs import RewardPair, index_batches, split_by_prompt
from reward_models.training import HPSV2, PICKSCORE, RewardRecipe, learning_rate, train_reward, validation_accuracy
from tests.reward_models.toy import PROMPTS, brightness_pairs, colour_pairs, flat_image

SHORT = RewardRecipe(
    learning_rate=2e-3, weight_decay=0.01, batch_size=16, max_steps=4, warmup_steps=1, eval_every=2, seed=0
)


def state_of(scorer):
    return {key: value.clone() for key, value in scorer.module.state_dict().items()}


def assert_states_equal(first, second, **tolerance):
    for key in first:
        torch.testing.assert_close(first[key], second[key], **tolerance, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("loss", ["pickscore", "hps"])
def test_training_learns_that_brighter_wins(scorer, scorer_name, loss, tmp_path):
    recipe = dataclasses.replace(SHORT, loss=loss, max_steps=40, warmup_steps=5, eval_every=10)
    validation = brightness_pairs(40, seed=1)
    before = validation_accuracy(scorer, validation)
    result = train_reward(
        scorer, brightness_pairs(64, seed=0), recipe, validation=validation, directory=tmp_path / "best"
    )
    assert result.best_accuracy >= 0.95 > before + 0.1
    assert result.history[-1]["loss"] < 0.3 * result.history[0]["loss"]
    saved = reward_models.load(scorer_name, tmp_path / "best")
    assert validation_accuracy(saved, validation) == result.best_accuracy
    image_0, image_1, prompt, label_0 = validation[1]
    assert (saved.compare(image_0, image_1, prompt).item() > 0.5) == bool(label_0)


def test_in_batch_negatives_teach_a_fresh_clip_what_prompts_name(scorer):
    recipe = dataclasses.replace(
        SHORT, in_batch_negatives=True, batch_size=32, max_steps=60, warmup_steps=5, eval_every=30
    )
    validation = colour_pairs(60, seed=1)
    assert 0.2 < validation_accuracy(scorer, validation) < 0.8
    result = train_reward(scorer, colour_pairs(200, seed=0), recipe, validation=validation)
    assert result.best_accuracy >= 0.9
    assert validation_accuracy(scorer, validation) == result.best_accuracy


def test_training_is_a_function_of_its_seed(scorer_name, scorer_folder):
    pairs, states, histories = brightness_pairs(40, seed=0), [], []
    for seed in (0, 0, 1):
        torch.manual_seed(len(states))  # the global generator must not matter
        scorer = reward_models.load(scorer_name, scorer_folder)
        histories.append(train_reward(scorer, pairs, dataclasses.replace(SHORT, seed=seed)).history)
        states.append(state_of(scorer))
    assert histories[0] == histories[1] != histories[2]
    assert_states_equal(states[0], states[1], atol=0, rtol=0)


def test_micro_batches_leave_the_result_unchanged(scorer_name, scorer_folder):
    pairs = [*brightness_pairs(20, seed=0)]
    pairs[3] = (*pairs[3][:3], 0.5)
    for loss in ("pickscore", "hps"):
        losses, moved = [], []
        for micro_batch_size in (None, 5):
            scorer = reward_models.load(scorer_name, scorer_folder)
            before = state_of(scorer)
            recipe = dataclasses.replace(
                SHORT,
                loss=loss,
                micro_batch_size=micro_batch_size,
                validation_fraction=0,
                max_steps=3,
                max_grad_norm=None,
            )
            losses.append([record["loss"] for record in train_reward(scorer, pairs, recipe).history])
            moved.append(sum((state_of(scorer)[key] - before[key]).abs().sum().item() for key in before))
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
        assert moved[0] == pytest.approx(moved[1], rel=1e-2)
        assert moved[0] > 1


def test_the_best_weights_are_kept_not_the_last(scorer):
    """The labels of training contradict those of validation, so every step makes it worse."""
    train = [(a, b, prompt, 1 - label) for a, b, prompt, label in brightness_pairs(64, seed=0)]
    validation = brightness_pairs(40, seed=1)
    recipe = dataclasses.replace(SHORT, learning_rate=5e-4, max_steps=30, warmup_steps=10, eval_every=1)
    result = train_reward(scorer, train, recipe, validation=validation)
    accuracies = [record["validation_accuracy"] for record in result.history]
    assert accuracies[-1] < max(accuracies)
    assert result.best_accuracy == max(accuracies) == validation_accuracy(scorer, validation)
    assert result.best_step == accuracies.index(max(accuracies)) + 1


def test_the_scorer_is_usable_afterwards(scorer):
    picture = flat_image((200, 40, 40), seed=0)
    before = scorer.score(picture, PROMPTS[0])
    train_reward(scorer, brightness_pairs(40, seed=0), SHORT)
    assert not scorer.module.training
    assert not any(parameter.requires_grad for parameter in scorer.module.parameters())
    assert (scorer.score(picture, PROMPTS[0]) - before).abs() > 1e-4  # no stale prompt embedding, no old weights


def test_a_failing_run_leaves_the_scorer_frozen_and_in_eval_mode(scorer):
    pairs = brightness_pairs(40, seed=0)
    with pytest.raises(ScorerError, match=r"The loss became (nan|inf)"):
        train_reward(scorer, pairs, dataclasses.replace(SHORT, learning_rate=1e12, max_steps=20, max_grad_norm=None))
    assert not scorer.module.training
    assert not any(parameter.requires_grad for parameter in scorer.module.parameters())


def test_hps_recipe_freezes_the_first_parts_of_both_towers(scorer):
    before = state_of(scorer)
    recipe = dataclasses.replace(
        HPSV2,
        learning_rate=1e-2,
        batch_size=16,
        max_steps=2,
        warmup_steps=0,
        unlocked_image_groups=2,
        unlocked_text_layers=1,
    )
    train_reward(scorer, brightness_pairs(40, seed=0), recipe)
    moved = {key for key, value in state_of(scorer).items() if not torch.equal(value, before[key])}
    # image tower of 4 groups: embeddings, block 0, block 1 with the last norm, projection; text: embeddings, 2 blocks
    if scorer.name == "hpsv2":
        frozen = (
            "visual.conv1",
            "visual.class_embedding",
            "visual.positional_embedding",
            "visual.ln_pre",
            "visual.transformer.resblocks.0.",
            "token_embedding",
            "positional_embedding",
            "transformer.resblocks.0.",
        )
        expected = {key for key in before if not key.startswith(frozen)}
    else:
        frozen = (
            "vision_model.embeddings",
            "vision_model.pre_layrnorm",
            "vision_model.encoder.layers.0.",
            "text_model.embeddings",
            "text_model.encoder.layers.0.",
        )
        # a key's bias shifts all attention logits of a query alike: its gradient is rounding, zero or not
        expected = {key for key in before if not key.startswith(frozen)}
    assert {key for key in moved if "k_proj.bias" not in key} == {key for key in expected if "k_proj.bias" not in key}


def test_parameter_groups_cover_each_tower_once(scorer):
    groups = [*scorer.image_groups(), *scorer.text_groups()]
    listed = [id(parameter) for group in groups for parameter in group]
    assert len(listed) == len(set(listed))
    everything = {id(parameter): name for name, parameter in scorer.module.named_parameters()}
    outside = {name for key, name in everything.items() if key not in set(listed)}
    assert len(outside) == 4  # logit_scale, the text tower's last norm (2) and projection, which never freeze
    assert "logit_scale" in outside
    assert len(scorer.image_groups()) == 4
    assert len(scorer.text_groups()) == 3


def test_logit_scale_is_bounded_where_the_recipe_says_so(scorer_name, scorer_folder):
    for bound, expected in ((5.0, 5.0), (None, 1 / 0.07)):
        scorer = reward_models.load(scorer_name, scorer_folder)
        train_reward(scorer, brightness_pairs(40, seed=0), dataclasses.replace(SHORT, max_logit_scale=bound))
        assert float(scorer.logit_scale) == pytest.approx(expected, rel=0.05)


def test_learning_rate_warms_up_and_decays_to_zero():
    recipe = dataclasses.replace(PICKSCORE, learning_rate=1.0, warmup_steps=4, max_steps=14)
    rates = [learning_rate(recipe, step) for step in range(15)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[9] == pytest.approx(0.5)
    assert rates[14] == 0
    cosine = dataclasses.replace(recipe, schedule="cosine")
    assert learning_rate(cosine, 9) == pytest.approx(0.5)
    assert learning_rate(cosine, 6) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.2)))


def test_the_split_is_by_prompt_and_repeatable():
    pairs = [RewardPair(None, None, f"prompt {index % 10}", 1.0) for index in range(50)]
    train, held_out = split_by_prompt(pairs, 0.2, seed=3)
    assert len(train) == 40
    assert len(held_out) == 10
    assert {pair.prompt for pair in train}.isdisjoint(pair.prompt for pair in held_out)
    assert split_by_prompt(pairs, 0.2, seed=3) == (train, held_out)
    assert split_by_prompt(list(reversed(pairs)), 0.2, seed=3)[1][0].prompt in {pair.prompt for pair in held_out}
    assert split_by_prompt(pairs, 0.2, seed=4) != (train, held_out)


def test_batches_visit_everything_once_an_epoch():
    batches = list(index_batches(10, 5, 6, seed=0))
    assert [len(batch) for batch in batches] == [5] * 6
    for epoch in range(3):
        assert sorted(batches[2 * epoch] + batches[2 * epoch + 1]) == list(range(10))
    assert batches[:2] != batches[2:4]
    assert list(index_batches(3, 8, 2, seed=0))[1] != []


def test_accuracy_counts_labels_as_pickscore_does(scorer):
    same = flat_image((90, 90, 90), seed=0)
    other = flat_image((200, 40, 40), seed=1)
    prefers_first = scorer.compare(same, other, PROMPTS[0]).item() > 0.5
    for label_0, expected in ((1.0, prefers_first), (0.0, not prefers_first), (0.5, 0.5)):
        assert validation_accuracy(scorer, [(same, other, PROMPTS[0], label_0)]) == pytest.approx(float(expected))
    assert validation_accuracy(scorer, [(same, same, PROMPTS[0], 1.0)]) == 0.0  # undecided counts as wrong


def test_bf16_autocast_trains(scorer):
    result = train_reward(scorer, brightness_pairs(40, seed=0), dataclasses.replace(SHORT, bf16=True))
    assert all(np.isfinite(record["loss"]) for record in result.history)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "no training pairs"),
        ([(1, 2, 3)], "Pair 0 is not"),
        ([(None, None, "prompt", 1.5)], "Pair 0 is not"),
        ([("a.png", "b.png", "one", 1.0)], "Cannot hold out"),
        ([("a.png", "b.png", prompt, 1.0) for prompt in PROMPTS], r'Pair \d+ \("a .*no image file a.png'),
    ],
)
def test_unusable_pairs_are_named(scorer, pairs, message):
    with pytest.raises(ScorerError, match=message):
        train_reward(scorer, pairs, SHORT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "dpo"}, '"dpo"'),
        ({"schedule": "step"}, '"step"'),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"in_batch_negatives": True, "micro_batch_size": 4}, "whole batch"),
        ({"in_batch_negatives": True, "loss": "hps"}, "whole batch"),
    ],
)
def test_impossible_recipes_are_refused(change, message):
    with pytest.raises(ScorerError, match=message):
        dataclasses.replace(PICKSCORE, **change)


def test_half_precision_weights_are_refused(scorer_name, scorer_folder):
    scorer = reward_models.load(scorer_name, scorer_folder, dtype=torch.bfloat16)
    with pytest.raises(ScorerError, match="float32"):
        train_reward(scorer, brightness_pairs(8, seed=0), SHORT)


def test_published_recipes():
    assert (PICKSCORE.learning_rate, PICKSCORE.weight_decay, PICKSCORE.batch_size) == (3e-6, 0.3, 128)
    assert (HPSV2.loss, HPSV2.unlocked_image_groups, HPSV2.unlocked_text_layers) == ("hps", 20, 11)
