import pytest
import torch
from transformers import CLIPConfig

import reward_models
from reward_models.base import ScorerError
from reward_models.checkpoints import load_strict
from reward_models.preprocess import PixelSpec
from reward_models.step_aware import EVALUATED_AT, StepAware, identity_modulation, timestep_embedding
from reward_models.tiny import build_tiny_step_aware
from tests import golden
from tests.reward_models.test_tiny_clip_goldens import hash_weights, hf_config
from tests.reward_models.toy import PROMPTS, noise_image, random_images, to_hf_keys

RECORDS = golden.load("rewards")
IMAGES = [noise_image(seed, 40, 48) for seed in range(5)]


def golden_scorer(new_weights):
    module = StepAware.network(CLIPConfig(**hf_config("gelu", 63))).double()
    load_strict(module, {**to_hf_keys(hash_weights()), **new_weights}, "golden")
    return StepAware(StepAware.cards[0], module, PixelSpec(size=28), None, source="golden")


def filled_weights():
    """Return the new weights of the golden: hash fill, each layer's bias the identity's plus a tenth of a fill."""
    identity = {key: value.double() for key, value in identity_modulation(32, 2).items()}
    filled = golden.hash_weights({key: value.shape for key, value in identity.items()})
    for layer in range(2):
        key = f"vision_model.encoder.layers.{layer}.adaLN_modulation.1.bias"
        filled[key] = identity[key] + 0.1 * golden.hash_fill((6 * 32,), 77)
    return filled


def cosines(scorer, record, timesteps):
    with torch.no_grad():
        image = scorer.embed_pixels(golden.hash_fill((3, 3, 28, 28), 1000), torch.as_tensor(timesteps))
        text = scorer.embed_tokens(torch.tensor(record["inputs"]["token_ids"]))
    return torch.nn.functional.cosine_similarity(image, text, dim=-1)


@pytest.fixture
def scorer(scorer_places):
    return reward_models.load("step_aware", scorer_places["step_aware"])


@pytest.mark.parametrize("dim", [8, 256])
def test_the_timestep_embedding_matches_the_official_one(dim):
    record = RECORDS[f"spm_time_embedding_{dim}"]
    embedding = timestep_embedding(torch.tensor(record["inputs"]["t"]), dim)
    golden.assert_close(record, "embedding", embedding[:, record["expected"]["indices"]])


@pytest.mark.parametrize("timesteps", [0, 251, 999, [0, 251, 501]])
def test_the_identity_is_the_plain_clip(timesteps):
    record = RECORDS["spm_identity_init"]
    weights = {key: value.double() for key, value in identity_modulation(32, 2).items()}
    golden.assert_close(record, "cosine_identity_init", cosines(golden_scorer(weights), record, timesteps))


def test_the_official_constructor_is_not_the_identity():
    """Its numbers are those of zero biases, gates closed: transformers' initialisation resets the ones of the class."""
    record = RECORDS["spm_identity_init"]
    weights = {key: value.double() for key, value in identity_modulation(32, 2).items()}
    for layer in range(2):
        weights[f"vision_model.encoder.layers.{layer}.adaLN_modulation.1.bias"].zero_()
    golden.assert_close(record, "cosine_constructor_bias_ones", cosines(golden_scorer(weights), record, [0, 251, 501]))


def test_modulated_embeddings_match_the_official_network():
    record, scorer = RECORDS["spm_tiny"], golden_scorer(filled_weights())
    assert sorted(filled_weights()) == record["expected"]["new_keys"]
    for time, expected in record["expected"]["cosine_by_t"].items():
        got = cosines(scorer, record, int(time))
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=2e-4, atol=1e-4)
    mixed = cosines(scorer, record, record["inputs"]["t_mixed"])
    golden.assert_close(record, "cosine_mixed_t", mixed)
    expected = torch.tensor(record["expected"]["score_mixed_t"], dtype=torch.float64)
    torch.testing.assert_close(100 * mixed, expected, atol=1e-2, rtol=2e-4)  # the record's note


def test_a_fresh_one_scores_as_pickscore_at_every_timestep(tiny_scorer_folders, tmp_path):
    pickscore = reward_models.load("pickscore", tiny_scorer_folders["pickscore"])
    folder = build_tiny_step_aware(tmp_path / "fresh", tiny_scorer_folders["pickscore"], seed=0)
    fresh = reward_models.load("step_aware", folder)
    images = [noise_image(seed, 32, 32) for seed in range(3)]  # of the network's size: the preprocessors agree
    expected = pickscore.score(images, PROMPTS[:3])
    for time in EVALUATED_AT:
        torch.testing.assert_close(fresh.score(images, PROMPTS[:3], time), expected, atol=2e-5, rtol=1e-5)
    other = StepAware.from_clip(tiny_scorer_folders["pickscore"], seed=1)
    assert not torch.equal(other.module.t_embedder["mlp"][0].weight, fresh.module.t_embedder["mlp"][0].weight)


def test_every_image_has_its_own_timestep(scorer):
    times = [0, 251, 501, 701, 951]
    scores = scorer.score(IMAGES, PROMPTS[0], times)
    each = torch.cat([scorer.score(image, PROMPTS[0], time) for image, time in zip(IMAGES, times, strict=True)])
    torch.testing.assert_close(scores, each, atol=2e-5, rtol=1e-5)
    scorer.batch_size = 2
    torch.testing.assert_close(scorer.score(IMAGES, PROMPTS[0], torch.tensor(times)), each, atol=2e-5, rtol=1e-5)
    assert (scores - scorer.score(IMAGES, PROMPTS[0])).abs()[1:].min() > 1e-4
    torch.testing.assert_close(scorer.score(IMAGES, PROMPTS[0], 0), scorer.score(IMAGES, PROMPTS[0]))


def test_gradients_reach_the_prediction_at_its_timestep(scorer):
    images = random_images(2, 40).requires_grad_()
    scores = scorer.score_tensor(images, PROMPTS[:2], torch.tensor([751, 51]))
    scores.sum().backward()
    assert (images.grad.abs().sum(dim=(1, 2, 3)) > 0).all()
    expected = scorer.score(images.detach(), PROMPTS[:2], [751, 51])
    torch.testing.assert_close(scores.detach(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("timesteps", "message"), [([1, 2], r"5 images and timesteps of shape \[2\]"), (1000, "1000"), (-1, "-1")]
)
def test_impossible_timesteps_are_named(scorer, timesteps, message):
    with pytest.raises(ScorerError, match=message):
        scorer.score(IMAGES, PROMPTS[0], timesteps)


def test_the_official_file_loads(scorer, scorer_places, tmp_path):
    for file in scorer_places["step_aware"].iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    file = scorer.save_official(tmp_path / "sd-v1-5_step-aware_preference_model.bin")
    assert all(key.startswith("model.") for key in torch.load(file, weights_only=True))
    loaded = reward_models.load("step_aware", file)
    assert torch.equal(loaded.score(IMAGES, PROMPTS[0], 501), scorer.score(IMAGES, PROMPTS[0], 501))


def test_a_plain_clip_is_not_taken_for_a_step_aware_one(tiny_scorer_folders, scorer_places):
    with pytest.raises(ScorerError, match="10 missing"):
        reward_models.load("step_aware", tiny_scorer_folders["pickscore"])
    with pytest.raises(ScorerError, match="step-aware already"):
        StepAware.from_clip(scorer_places["step_aware"])
