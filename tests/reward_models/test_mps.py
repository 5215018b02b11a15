import pytest
import torch
from safetensors.torch import load_file, save_file

import reward_models
from reward_models.base import ScorerError
from reward_models.checkpoints import load_strict
from reward_models.mps import CONDITION, CrossModel, attention_mask, own_names, similarity
from tests import golden
from tests.reward_models.toy import PROMPTS, noise_image

RECORDS = golden.load("rewards")
IMAGES = [noise_image(seed) for seed in range(4)]


@pytest.fixture
def scorer(scorer_places):
    return reward_models.load("mps", scorer_places["mps"])


@pytest.mark.parametrize("record_id", [key for key in RECORDS if key.startswith("mps_tiny")])
def test_mask_and_cross_model_match_the_official_ones(record_id):
    record = RECORDS[record_id]
    module = CrossModel(16, layers=2, heads=2, dim_head=8, ff_mult=4).double()
    assert sorted(module.state_dict()) == record["expected"]["keys"]
    load_strict(module, golden.hash_weights({key: value.shape for key, value in module.state_dict().items()}), "golden")
    image = golden.hash_fill((2, 5, 16), 1000)
    text = golden.hash_fill((2, 6, 16), 1001) * torch.tensor([6.0, 1.0])[:, None, None]
    similarities = similarity(text, golden.hash_fill((2, 4, 16), 1002))
    mask = attention_mask(
        similarities, **{"reference" if k == "mask_reference" else k: v for k, v in record["hyperparameters"].items()}
    )
    with torch.no_grad():
        first = module(image, text, mask)[:, 0]
    golden.assert_close(record, "sim", similarities)
    golden.assert_close(record, "mask_open", (mask[:, 0] == 0).double())
    golden.assert_close(record, "out0_first3", first[:, :3])
    golden.assert_close(record, "cosine", torch.nn.functional.cosine_similarity(first, text[:, -1], dim=-1))


def test_a_score_does_not_depend_on_its_batch_unless_asked(scorer):
    prompts = PROMPTS[:4]
    alone = torch.cat([scorer.score(image, prompt) for image, prompt in zip(IMAGES, prompts, strict=True)])
    torch.testing.assert_close(scorer.score(IMAGES, prompts), alone, atol=2e-5, rtol=1e-5)
    scorer.threshold, scorer.mask_reference = 0.7, "batch"
    single = torch.cat([scorer.score(image, prompt) for image, prompt in zip(IMAGES, prompts, strict=True)])
    scorer.mask_reference = "sample"
    torch.testing.assert_close(scorer.score(IMAGES, prompts), single, atol=2e-5, rtol=1e-5)  # the same at batch size 1


def test_the_published_mask_can_close_altogether_and_says_so(scorer):
    scorer.mask_reference, scorer.threshold = "batch", 1.0
    with pytest.raises(ScorerError, match=r'score nan.*mask_reference = "sample"'):
        scorer.score(IMAGES[:2], PROMPTS[:2])


def test_an_unknown_reference_is_named(scorer):
    scorer.mask_reference = "prompt"
    with pytest.raises(ScorerError, match='sample, batch, got "prompt"'):
        scorer.score(IMAGES[0], PROMPTS[0])


def test_condition_and_threshold_decide_what_is_read(scorer):
    seen = {}
    for scorer.threshold in (0.01, 0.1, 0.2, 0.4, 0.99):
        for scorer.condition in ("red", "a blue flag", CONDITION):
            seen[scorer.threshold, scorer.condition] = tuple(scorer.score(IMAGES, PROMPTS[0]).tolist())
    assert len({seen[threshold, "red"] for threshold in (0.01, 0.4, 0.99)}) >= 2
    assert any(seen[threshold, "red"] != seen[threshold, CONDITION] for threshold in (0.1, 0.2, 0.4))


def test_names_of_the_official_module_and_of_the_port_load(scorer, scorer_places, tmp_path):
    """Both hold the constant buffers of their modules as well; the port puts "mps." before everything."""
    folder = tmp_path / "port"
    scorer.save(folder)
    state = load_file(folder / "model.safetensors")
    for key in [key for key in state if key.endswith("norm.weight") and key.startswith("cross_model")]:
        state[key.replace("weight", "bias")] = torch.zeros_like(state[key])
    for layer in range(2):
        state[f"cross_model.layers.{layer}.1.fn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(state, folder / "model.safetensors")
    expected = scorer.score(IMAGES, PROMPTS[0])
    assert torch.equal(reward_models.load("mps", folder).score(IMAGES, PROMPTS[0]), expected)
    save_file({f"mps.{key}": value for key, value in state.items()}, folder / "model.safetensors")
    assert torch.equal(reward_models.load("mps", folder).score(IMAGES, PROMPTS[0]), expected)


def test_a_norm_with_a_bias_is_another_network():
    with pytest.raises(ScorerError, match=r"layers\.0\.norm\.bias is not zero"):
        own_names({"cross_model.layers.0.norm.bias": torch.ones(2)}, "file")


def test_an_image_has_no_embedding_of_its_own(scorer):
    with pytest.raises(ScorerError, match="only together with a prompt"):
        scorer.image_embeddings(scorer.pixels(IMAGES))


def test_prompts_are_read_once_and_forgotten_in_time(scorer, monkeypatch):
    monkeypatch.setattr("reward_models.mps.CACHED_PROMPTS", 3)
    seen, tokenize = [], scorer.tokenize
    monkeypatch.setattr(scorer, "tokenize", lambda prompts: seen.extend(prompts) or tokenize(prompts))
    scorer.score(IMAGES, [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    scorer.score(IMAGES[:1], PROMPTS[1])
    assert sorted(seen) == sorted([PROMPTS[0], PROMPTS[1], scorer.condition])
    scorer.score(IMAGES, PROMPTS[2:6])
    assert len(scorer._token_cache) == 3
