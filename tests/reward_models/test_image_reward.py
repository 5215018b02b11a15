import pytest
import torch

import reward_models
from reward_models.base import ScorerError
from reward_models.checkpoints import load_strict
from reward_models.image_reward import (
    MEAN,
    OFFICIAL_SIZES,
    STD,
    ImageReward,
    ImageRewardNetwork,
    from_official_names,
    to_official_names,
)
from reward_models.losses import pair_losses
from tests import golden
from tests.reward_models.tiny_scorers import REWARD_SIZES
from tests.reward_models.toy import noise_image

RECORDS = golden.load("rewards")
SIZES = REWARD_SIZES | {"text_length": 35}


@pytest.fixture(scope="module")
def network():
    """Return the golden's network in float64, loaded through the official names."""
    module = ImageRewardNetwork(SIZES).double().eval()
    shapes = {key: value.shape for key, value in to_official_names(module.state_dict()).items()}
    load_strict(module, from_official_names(golden.hash_weights(shapes)), "golden")
    return module


@pytest.fixture
def scorer(scorer_places):
    return reward_models.load("image_reward", scorer_places["image_reward"])


def test_the_network_has_the_official_names(network):
    assert sorted(to_official_names(network.state_dict())) == RECORDS["imagereward_tiny"]["expected"]["keys"]
    assert sum(value.numel() for value in network.state_dict().values()) == 127_465


@pytest.mark.parametrize("padding", [0, 5])
def test_features_and_rewards_match_the_official_network(network, padding):
    record = RECORDS["imagereward_tiny"]
    ids = torch.nn.functional.pad(torch.tensor(record["inputs"]["token_ids"]), (0, padding))
    with torch.no_grad():
        image = network.vision(pixel_values=golden.hash_fill((2, 3, 32, 32), 1000)).last_hidden_state
        mask = (ids != 0).long()
        arguments = {"attention_mask": mask, "encoder_hidden_states": image, "is_decoder": False}
        hidden = network.text(input_ids=ids, **arguments).last_hidden_state
        raw = network(image, ids, mask)
    golden.assert_close(record, "vision_first4", image[0, 0, :4])
    golden.assert_close(record, "cls_first4", hidden[0, 0, :4])
    golden.assert_close(record, "raw", raw)
    golden.assert_close(record, "score", (raw - MEAN) / STD)


def test_the_training_loss_is_that_of_raw_rewards():
    record = RECORDS["imagereward_train_loss"]
    rewards = torch.tensor(record["inputs"]["rewards_better_worse"], dtype=torch.float64, requires_grad=True)
    losses = pair_losses(rewards[:, 0], rewards[:, 1], torch.ones(4, dtype=torch.float64))
    losses.mean().backward()
    golden.assert_close(record, "per_example", losses)
    golden.assert_close(record, "loss", losses.mean())
    golden.assert_close(record, "grad", rewards.grad)
    golden.assert_close(record, "accuracy", (rewards[:, 0] > rewards[:, 1]).double().mean())
    standard = (rewards[:, 0] - MEAN) / STD
    golden.assert_close(record, "normalised_reward_of_first_column", standard)
    golden.assert_close(record, "refl_loss_of_first_column", (2 - standard).clamp(min=0).mean() * 1e-3)


def test_the_probability_is_that_of_the_raw_difference(scorer):
    images = [noise_image(0), noise_image(1)]
    raw = scorer.raw_rewards(scorer.image_features(scorer.pixels(images)), ["a red square"] * 2)
    expected = torch.sigmoid(raw[0] - raw[1])
    assert scorer.compare(images[0], images[1], "a red square").item() == pytest.approx(expected.item(), abs=1e-5)


def test_the_official_file_loads_with_its_leftovers(scorer, scorer_places, tmp_path):
    """ImageReward.pt holds BLIP's projections and position ids, which are not used."""
    state = to_official_names(scorer.module.state_dict())
    state["blip.vision_proj.weight"] = torch.zeros(256, 48)
    state["blip.text_proj.bias"] = torch.zeros(256)
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    torch.save(state, tmp_path / "ImageReward.pt")
    for name in ("image_reward.json", "vocab.txt"):
        (tmp_path / name).write_bytes((scorer_places["image_reward"] / name).read_bytes())
    images = [noise_image(0), noise_image(1)]
    for source in (tmp_path, tmp_path / "ImageReward.pt"):
        loaded = reward_models.load("image_reward", source)
        assert torch.equal(loaded.score(images, "a red square"), scorer.score(images, "a red square"))


def test_the_official_sizes_are_blip_large():
    with torch.device("meta"):
        state = to_official_names(ImageRewardNetwork(OFFICIAL_SIZES).state_dict())
    assert state["blip.visual_encoder.pos_embed"].shape == (1, 197, 1024)
    assert state["blip.text_encoder.embeddings.word_embeddings.weight"].shape == (30524, 768)
    assert state["blip.text_encoder.encoder.layer.11.crossattention.self.key.weight"].shape == (768, 1024)
    assert [state[f"mlp.layers.{index}.weight"].shape[0] for index in (0, 2, 4, 6, 7)] == [1024, 128, 64, 16, 1]
    renamed = from_official_names(state)
    assert to_official_names(renamed).keys() == state.keys()


def test_prompts_start_with_cls_and_end_with_sep_when_cut(scorer):
    ids, mask = scorer.tokenize(["a red square", "red " * 100])
    words = scorer.tokenizer.convert_ids_to_tokens(ids[1])
    assert ids.shape == mask.shape == (2, 12)
    assert words[0] == "[CLS]"
    assert words[-1] == "[SEP]"
    assert mask.sum(dim=1).tolist() == [5, 12]
    assert scorer.tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [
        len(scorer.tokenizer) - 2,
        len(scorer.tokenizer) - 1,
    ]


def test_a_vocabulary_that_is_too_large_is_refused(scorer_places, tmp_path):
    folder = scorer_places["image_reward"]
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(200))])
    )
    with pytest.raises(ScorerError, match="207 tokens, the network knows 100"):
        reward_models.load("image_reward", tmp_path)


def test_without_a_vocabulary_the_hub_is_asked(scorer_places, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("image_reward.json", "model.safetensors"):
        (tmp_path / name).write_bytes((scorer_places["image_reward"] / name).read_bytes())
    with pytest.raises(ScorerError, match=r"no vocab\.txt in .*that of bert-base-uncased"):
        reward_models.load("image_reward", tmp_path)


def test_the_card_carries_the_published_constants():
    assert "0.16717" in ImageReward.cards[0].formula
    assert "1.03334" in ImageReward.cards[0].formula
