import numpy as np
import pytest
import torch

from diffalign.data import AnnotatedPairs, Annotations, OnlinePairs, UnpairedImages, open_pairs
from diffalign.data.annotated import score_preference
from diffalign.errors import DataError
from tests import golden
from tests.data.caching import TRANSFORM, assert_same_one_by_one, build, fixed, same
from tests.data.world import TinyEncoder, list_rows, rows, write_parquet

PAIRS = 40
PLAIN = fixed([False] * PAIRS, [False] * PAIRS)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("annotated")
    return build(write_parquet(folder / "a.parquet", rows(PAIRS)), folder / "cache")


@pytest.fixture(scope="module")
def soft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soft")
    data = [row | {"label_0": 0.8 if i % 2 == 0 else 0.2, "label_1": None} for i, row in enumerate(rows(PAIRS))]
    return build(write_parquet(folder / "a.parquet", data), folder / "cache")


def annotations(cache, **change):
    """Return scores of which about half disagree with the label, and weights."""
    ids = np.sort(cache.example_ids)
    draw = np.random.default_rng(0)
    return Annotations("scores.parquet", ids, draw.uniform(18, 24, (len(ids), 2)), draw.uniform(0, 2, len(ids)))


def scores_of(cache):
    given = annotations(cache)
    return given.scores[given.rows(cache.example_ids)]


def whole(pairs):
    return pairs.batch(range(PAIRS), PLAIN)


def test_official_preference():
    record = golden.load("objectives")["smpo_probability"]
    scores = np.stack([record["inputs"][name] for name in ("score_w", "score_l")], axis=1)
    span = record["hyperparameters"]["min"], record["hyperparameters"]["max"]
    p = torch.from_numpy(score_preference(scores, span))
    golden.assert_close(record, "p", p)
    golden.assert_close(record, "factor", record["hyperparameters"]["gamma"] * (2 * p - 1))


def test_huge_scores_are_harmless():
    assert score_preference(np.array([[1e6, 0.0], [0.0, 1e6]]), (0, 1)).tolist() == [1.0, 0.0]


def test_without_anything_pairs_are_as_they_were(cache):
    plain, annotated = whole(cache), whole(AnnotatedPairs(cache))
    for name, value in vars(plain).items():
        assert same(value, getattr(annotated, name)), name
    view = AnnotatedPairs(cache)
    assert (len(view), view.images_per_example, view.has_preference, view.scores) == (PAIRS, 2, False, None)
    assert not view.swapped.any()


def test_scores_and_weights_come_along(cache):
    view, given = AnnotatedPairs(cache, annotations(cache)), annotations(cache)
    batch = whole(view)
    at = given.rows(batch.example_ids.numpy())
    np.testing.assert_allclose(batch.scores, given.scores[at], rtol=1e-6)
    np.testing.assert_allclose(batch.weights, given.weights[at], rtol=1e-6)
    assert batch.scores.dtype == batch.weights.dtype == torch.float32
    assert batch.preference is None
    np.testing.assert_array_equal(view.scores, given.scores[at])
    assert torch.equal(batch.latent_mean, whole(cache).latent_mean)


def test_the_reward_may_decide_who_wins(cache):
    view, scores = AnnotatedPairs(cache, annotations(cache), label_source="reward"), scores_of(cache)
    turned = scores[:, 1] > scores[:, 0]
    assert 10 < turned.sum() < 30
    batch, plain = whole(view), whole(cache)
    assert (batch.scores[:, 0] >= batch.scores[:, 1]).all()
    assert view.swapped.tolist() == turned.tolist()
    for b in range(PAIRS):
        first, second = (b, b + PAIRS) if not turned[b] else (b + PAIRS, b)
        assert torch.equal(batch.latent_mean[b], plain.latent_mean[first])
        assert torch.equal(batch.latent_mean[b + PAIRS], plain.latent_mean[second])
    assert torch.equal(batch.example_ids, plain.example_ids)
    np.testing.assert_allclose(view.scores, batch.scores, rtol=1e-6)


def test_equal_scores_keep_the_label(cache):
    given = Annotations("x", np.sort(cache.example_ids), np.ones((PAIRS, 2)))
    assert not AnnotatedPairs(cache, given, label_source="reward").swapped.any()


@pytest.mark.parametrize("source", ["human", "reward"])
@pytest.mark.parametrize("span", [None, (0.0, 30.0)])
def test_preference_from_scores(cache, source, span):
    view = AnnotatedPairs(cache, annotations(cache), preference_from="scores", score_range=span, label_source=source)
    batch, scores = whole(view), scores_of(cache)
    low, high = span or (scores.min(), scores.max())
    s_w, s_l = batch.scores.double().T
    torch.testing.assert_close(
        batch.preference.double(), torch.sigmoid((s_w - s_l) / (high - low)), rtol=1e-5, atol=1e-6
    )
    assert view.has_preference is True
    assert (batch.preference.min() >= 0.5) == (source == "reward")


def test_soft_human_labels_say_nothing_about_another_winner(soft):
    assert whole(AnnotatedPairs(soft, annotations(soft))).preference.tolist() == pytest.approx([0.8] * PAIRS)
    view = AnnotatedPairs(soft, annotations(soft), label_source="reward")
    assert (view.has_preference, whole(view).preference) == (False, None)


class TestFlips:
    def test_share_and_extremes(self, cache):
        assert not AnnotatedPairs(cache, flip_labels=0.0).swapped.any()
        assert AnnotatedPairs(cache, flip_labels=1.0).swapped.all()
        shares = [AnnotatedPairs(cache, flip_labels=0.3, seed=seed).swapped.mean() for seed in range(100)]
        # 4,000 draws: standard deviation 0.0072.
        assert np.mean(shares) == pytest.approx(0.3, abs=5 * 0.0072)

    def test_a_function_of_seed_and_id_alone(self, cache, tmp_path):
        data = rows(PAIRS)
        other = build(write_parquet(tmp_path / "b.parquet", data[::-1][:25]), tmp_path / "other")
        ours, theirs = (AnnotatedPairs(x, flip_labels=0.5, seed=3) for x in (cache, other))
        flipped = dict(zip(ours.example_ids.tolist(), ours.swapped.tolist(), strict=True))
        assert [flipped[i] for i in theirs.example_ids.tolist()] == theirs.swapped.tolist()
        assert AnnotatedPairs(cache, flip_labels=0.5, seed=4).swapped.tolist() != ours.swapped.tolist()
        more = AnnotatedPairs(cache, flip_labels=0.7, seed=3).swapped
        assert (more | ~ours.swapped).all()  # a higher rate flips the same pairs and others

    def test_flips_are_pinned(self):
        from diffalign.data import keyed

        drawn = keyed.uniform("flip_labels/0", np.array([0, 1, 2**62]))
        np.testing.assert_allclose(drawn, PINNED, rtol=0, atol=1e-9)

    def test_a_flip_is_noise_for_soft_labels_too(self, soft):
        batch, plain = whole(AnnotatedPairs(soft, flip_labels=1.0)), whole(soft)
        assert torch.equal(batch.latent_mean[:PAIRS], plain.latent_mean[PAIRS:])
        assert torch.equal(batch.preference, plain.preference)

    def test_after_reward_and_preference(self, cache):
        settings = {"preference_from": "scores", "label_source": "reward"}
        view = AnnotatedPairs(cache, annotations(cache), flip_labels=0.5, **settings)
        straight = AnnotatedPairs(cache, annotations(cache), **settings)
        ours, theirs = whole(view), whole(straight)
        flipped = torch.from_numpy(view.swapped ^ straight.swapped)
        assert 10 < flipped.sum() < 30
        assert torch.equal(ours.preference, theirs.preference)
        assert torch.equal(ours.scores[:, 0] < ours.scores[:, 1], flipped)
        assert torch.equal(ours.latent_mean, theirs.swapped(flipped).latent_mean)


PINNED = [0.8142137174, 0.9033631408, 0.9022373319]  # recorded from this implementation


@pytest.mark.parametrize("label_source", ["human", "reward"])
def test_a_batch_is_its_pairs_in_any_order(cache, label_source):
    settings = {"preference_from": "scores", "label_source": label_source, "flip_labels": 0.5}
    assert_same_one_by_one(AnnotatedPairs(cache, annotations(cache), **settings), [7, 30, 2, 11])


def test_pairs_encoded_online(cache, tmp_path):
    source = open_pairs(write_parquet(tmp_path / "a.parquet", rows(PAIRS)))
    settings = {"preference_from": "scores", "label_source": "reward", "flip_labels": 0.3}
    online = AnnotatedPairs(OnlinePairs(source, TinyEncoder(), TRANSFORM), annotations(cache), **settings)
    ours, theirs = whole(online), whole(AnnotatedPairs(cache, annotations(cache), **settings))
    assert torch.equal(ours.preference, theirs.preference)
    assert torch.equal(ours.scores, theirs.scores)
    torch.testing.assert_close(ours.latent_mean, theirs.latent_mean, rtol=1e-5, atol=1e-6)


def test_online_a_replaced_pair_brings_its_own_scores(tmp_path):
    data = rows(6)
    data[2]["jpg_0"] = data[2]["jpg_0"][:60]
    source = open_pairs(write_parquet(tmp_path / "a.parquet", data), on_error="skip")
    pairs = OnlinePairs(source, TinyEncoder(), TRANSFORM)
    ids = np.sort(pairs.example_ids)
    given = Annotations("x", ids, np.stack([np.arange(6.0), np.zeros(6)], axis=1))
    batch = AnnotatedPairs(pairs, given).batch([2, 3], fixed([False] * 2, [False] * 2))
    assert batch.example_ids.tolist() == [source[3].example_id] * 2
    assert batch.scores[:, 0].tolist() == [float(np.searchsorted(ids, source[3].example_id))] * 2


def test_rewards_relabel_single_images_too(cache, tmp_path):
    swapped = AnnotatedPairs(cache, annotations(cache), label_source="reward").swapped
    data = rows(PAIRS)
    for row, turned in zip(data, swapped, strict=True):
        if turned:
            row["label_0"], row["label_1"] = row["label_1"], row["label_0"]
    relabelled = build(write_parquet(tmp_path / "a.parquet", data), tmp_path / "cache")
    ours, theirs = UnpairedImages(cache, swapped=swapped), UnpairedImages(relabelled)
    labels = [dict(zip(x.example_ids.tolist(), x.desirable.tolist(), strict=True)) for x in (ours, theirs)]
    assert labels[0] == labels[1]
    assert ours.desirable.tolist() != UnpairedImages(cache).desirable.tolist()


class TestRefusals:
    @pytest.mark.parametrize("setting", [{"preference_from": "scores"}, {"label_source": "reward"}])
    def test_what_needs_scores(self, cache, setting):
        weights = Annotations("x", np.sort(cache.example_ids), None, np.ones(PAIRS))
        ((name, value),) = setting.items()
        for given in (None, weights):
            with pytest.raises(DataError, match=rf'{name} "{value}" needs a score .*diffalign score DATA --out FILE'):
                AnnotatedPairs(cache, given, **setting)
        assert whole(AnnotatedPairs(cache, weights)).weights.tolist() == [1] * PAIRS

    @pytest.mark.parametrize(
        ("setting", "message"),
        [({"preference_from": "score"}, 'preference_from must be "label" or "scores", got "score"'),
         ({"label_source": "oracle"}, 'label_source must be "human" or "reward", got "oracle"'),
         ({"flip_labels": 1.5}, r"flip_labels must be a probability in \[0, 1\], got 1.5"),
         ({"preference_from": "scores", "score_range": (2.0, 2.0)}, r"score_range is \[2.0, 2.0\]: max")],
    )  # fmt: skip
    def test_wrong_settings(self, cache, setting, message):
        with pytest.raises(DataError, match=message):
            AnnotatedPairs(cache, annotations(cache), **setting)

    def test_constant_scores_have_no_range(self, cache):
        given = Annotations("x", np.sort(cache.example_ids), np.ones((PAIRS, 2)))
        with pytest.raises(DataError, match="the range of the scores of this data set is"):
            AnnotatedPairs(cache, given, preference_from="scores")

    def test_pairs_without_scores(self, cache):
        given = annotations(cache)
        some = Annotations("some.parquet", given.ids[:30], given.scores[:30])
        with pytest.raises(DataError, match=r"some\.parquet lacks 10 of 40 pairs"):
            AnnotatedPairs(cache, some)

    def test_lists(self, tmp_path):
        lists = build(write_parquet(tmp_path / "l.parquet", list_rows(2)), tmp_path / "cache")
        with pytest.raises(DataError, match=r"Only pairs can be annotated; these examples have 3 image"):
            AnnotatedPairs(lists)
