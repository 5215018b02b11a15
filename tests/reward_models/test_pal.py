import dataclasses

import pytest
import torch

import reward_models
from reward_models.base import ScorerError
from reward_models.pal import IDEAL_POINTS, Pal, PalConfig, PalHeads
from tests.reward_models.toy import PROMPTS, brightness_pairs, noise_image

IMAGES = [noise_image(seed) for seed in range(4)]


@pytest.fixture
def scorer(scorer_places):
    return reward_models.load("pal", scorer_places["pal"])


def test_the_worked_values_of_the_reference():
    """P = identity, w = softmax(ln 3, 0), items e0 and e1 (section 24 of the reward reference)."""
    config = PalConfig(users=("one",), groups=2, width=2, hidden_layers=0, ideal_point="Pw", preference="dist")
    heads = PalHeads(config, 2)
    heads.prototypes.data, heads.user_logits.data = torch.eye(2), torch.tensor([[3.0, 1.0]]).log()
    weights = heads.weights(["one"])
    torch.testing.assert_close(weights, torch.tensor([[0.75, 0.25]]))
    left, right = torch.eye(2)[:1], torch.eye(2)[1:]
    ideal = heads.ideal_points(weights)
    distance = heads.rewards(right, ideal) - heads.rewards(left, ideal)  # |x_l - u| - |x_r - u|
    assert distance.item() == pytest.approx(-0.70710679, abs=1e-6)
    heads.config = dataclasses.replace(config, preference="dist_squared")
    assert heads.rewards(left, ideal).item() == pytest.approx(-0.125)
    heads.config = dataclasses.replace(config, preference="angle")
    logits = [heads.rewards(item, ideal).item() for item in (left, right)]
    assert logits == pytest.approx([13.55261857, 4.51753943], rel=1e-6)
    heads.logit_scale.data.fill_(10.0)
    assert heads.rewards(ideal, ideal).item() == pytest.approx(100.0)


@pytest.mark.parametrize("ideal_point", IDEAL_POINTS)
def test_every_kind_of_ideal_point_by_hand(ideal_point):
    torch.manual_seed(0)
    heads = PalHeads(PalConfig(users=("a", "b"), groups=3, width=5, ideal_point=ideal_point), 7)
    heads.user_logits.data = torch.randn(2, 3)
    weights, text = heads.weights(["b", None]), torch.randn(2, 7)
    torch.testing.assert_close(weights[1], heads.user_logits.softmax(-1).mean(0))
    expected = torch.zeros(2, 5)
    for row in range(2):
        if ideal_point == "f(Pw)":
            expected[row] = heads.item(sum(weights[row, k] * heads.prototypes[k] for k in range(3)))
            continue
        for k in range(3):
            point = {
                "Pw": lambda k=k, row=row: heads.prototypes[k],
                "f(P)w": lambda k=k, row=row: heads.item(heads.prototypes[k]),
                "|f(P)|w": lambda k=k, row=row: torch.nn.functional.normalize(heads.item(heads.prototypes[k]), dim=-1),
                "g(prompt)w": lambda k=k, row=row: heads.group_heads[k](text[row]),
            }[ideal_point]()
            expected[row] = expected[row] + weights[row, k] * point
    torch.testing.assert_close(heads.ideal_points(weights, text), expected)


def test_users_differ_and_the_average_is_nobody(scorer):
    average = scorer.score(IMAGES, PROMPTS[0])
    ann, bob = (scorer.for_user(user).score(IMAGES, PROMPTS[0]) for user in ("ann", "bob"))
    assert (ann - bob).abs().max() > 1e-2
    torch.testing.assert_close(scorer.for_user(None).score(IMAGES, PROMPTS[0]), average)
    with pytest.raises(ScorerError, match='does not know the user "carl"'):
        scorer.for_user("carl")


def embeddings(scorer, pairs):
    first, second, prompts, labels = zip(*pairs, strict=True)
    with torch.no_grad():
        images = [scorer.image_embeddings(scorer.pixels(side)) for side in (first, second)]
    return *images, scorer.cached_text_embeddings(prompts), torch.tensor(labels)


def accuracy(scorer, user, pairs):
    first, second, prompts, labels = zip(*pairs, strict=True)
    chosen = scorer.for_user(user).compare(first, second, prompts) > 0.5
    return (chosen == (torch.tensor(labels) > 0.5)).float().mean().item()


def test_two_opposite_users_are_learned_and_a_third_joins(tiny_scorer_folders, tmp_path):
    """Ann likes bright pictures, Bob dark ones; Carl, who comes later, agrees with Bob: only his weights move."""
    scorer = Pal.from_clip(str(tiny_scorer_folders["pickscore"]), PalConfig(users=("ann", "bob"), width=16))
    pairs = brightness_pairs(64, seed=0)
    image_0, image_1, text, bright = embeddings(scorer, pairs)
    heads = scorer.heads.requires_grad_(True)
    heads.user_logits.data = torch.tensor([[0.5, -0.5], [-0.5, 0.5]])
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-2)
    for _ in range(60):
        losses = []
        for user, labels in (("ann", bright), ("bob", 1 - bright)):
            ideals = heads.ideal_points(heads.weights([user]).expand(len(text), -1), text)
            losses.append(heads.losses(image_0, image_1, ideals, labels).mean())
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    heads.requires_grad_(False)
    held_out = brightness_pairs(40, seed=1)
    assert accuracy(scorer, "ann", held_out) > 0.9
    assert accuracy(scorer, "bob", held_out) < 0.1
    logits = scorer.add_user("carl").requires_grad_(True)
    before = {key: value.clone() for key, value in scorer.module.state_dict().items() if "user_logits" not in key}
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for _ in range(40):
        ideals = heads.ideal_points(heads.weights(["carl"]).expand(len(text), -1), text)
        optimizer.zero_grad()
        heads.losses(image_0, image_1, ideals, 1 - bright).mean().backward()
        optimizer.step()
    assert accuracy(scorer, "carl", held_out) < 0.1
    assert all(torch.equal(value, scorer.module.state_dict()[key]) for key, value in before.items())
    saved = reward_models.load("pal", scorer.save(tmp_path / "saved"))
    assert saved.heads.config.users == ("ann", "bob", "carl")
    expected = scorer.for_user("carl").score(IMAGES, PROMPTS[0])
    torch.testing.assert_close(saved.for_user("carl").score(IMAGES, PROMPTS[0]), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ideal_point": "P"}, '"P"'),
        ({"preference": "norm"}, '"norm"'),
        ({"users": ()}, "at least one user"),
        ({"users": ("a", "a")}, "each named once"),
        ({"temperature": 0.0}, "must be positive"),
    ],
)
def test_impossible_heads_are_refused(change, message):
    with pytest.raises(ScorerError, match=message):
        PalConfig(**{"users": ("a",), **change})


def test_a_folder_that_describes_no_heads_is_named(scorer_places, tmp_path):
    (tmp_path / "pal.json").write_text('{"groups": 2}')
    with pytest.raises(ScorerError, match=r"pal\.json does not describe PAL heads"):
        reward_models.load("pal", tmp_path)
    with pytest.raises(ScorerError, match=r"pal\.json"):
        reward_models.load("pal", scorer_places["pickscore"])
