import json

import pytest
import torch
from safetensors.torch import save_file

from reward_models.hf_clip import VIT_H_14
from reward_models.hpsv2 import OFFICIAL_MODEL, HPSv2, build_clip
from reward_models.pickscore import PickScore
from reward_models.preprocess import PixelSpec
from reward_models.tokenization import bundled_bpe_file
from tests import golden
from tests.reward_models.toy import to_hf_keys

RECORDS = golden.load("rewards")
MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2},
}


def hash_weights():
    """Return the weights of the golden network: each a hash of its rank among the sorted names."""
    return golden.hash_weights(dict(RECORDS["tiny_clip_state_keys"]["expected"]["keys"]))


def hf_config(activation, end_token):
    shared = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": activation,
        "projection_dim": 16,
    }
    return {
        "projection_dim": 16,
        "text_config": {**shared, "vocab_size": 64, "max_position_embeddings": 8, "eos_token_id": end_token},
        "vision_config": {**shared, "image_size": 28, "patch_size": 14},
    }


def open_clip_scorer(activation, dtype):
    config = {**MODEL, "quick_gelu": activation == "quickgelu"}
    module = build_clip(config, source="golden").to(dtype)
    module.load_state_dict(hash_weights())
    return HPSv2(HPSv2.cards[0], module, PixelSpec(size=28), config, bundled_bpe_file(), source="golden")


def hf_scorer(activation, dtype, end_token):
    from transformers import CLIPConfig, CLIPModel

    config = hf_config({"quickgelu": "quick_gelu"}.get(activation, activation), end_token)
    module = CLIPModel(CLIPConfig(**config)).to(dtype)
    module.load_state_dict(to_hf_keys(hash_weights()))
    return PickScore(PickScore.cards[0], module, PixelSpec(size=28), None, source="golden")


SCORERS = {
    "open_clip": open_clip_scorer,
    "hf": lambda activation, dtype: hf_scorer(activation, dtype, end_token=63),
    "hf, legacy end token": lambda activation, dtype: hf_scorer(activation, dtype, end_token=2),
}


def features(scorer, record, dtype):
    pixels = golden.hash_fill((3, 3, 28, 28), 1000).to(dtype)
    tokens = torch.tensor(record["inputs"]["token_ids"])
    with torch.no_grad():
        return scorer.embed_pixels(pixels), scorer.embed_tokens(tokens)


def test_the_network_has_the_keys_of_the_official_one():
    keys = [[key, list(value.shape)] for key, value in sorted(build_clip(MODEL, source="test").state_dict().items())]
    assert keys == RECORDS["tiny_clip_state_keys"]["expected"]["keys"]
    assert len(keys) == RECORDS["tiny_clip_gelu"]["expected"]["n_float_keys"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("activation", ["gelu", "quickgelu"])
@pytest.mark.parametrize("kind", SCORERS)
def test_embeddings_and_scores_match_the_official_network(kind, activation, dtype):
    record = RECORDS[f"tiny_clip_{activation}"]
    scorer = SCORERS[kind](activation, dtype)
    image, text = (torch.nn.functional.normalize(value.double(), dim=-1) for value in features(scorer, record, dtype))
    golden.assert_close(record, "cosine", image @ text.T)
    golden.assert_close(record, "hpsv2_score", (image * text).sum(-1))
    golden.assert_close(record, "image_feature_0_first4", image[0, :4])
    golden.assert_close(record, "text_feature_0_first4", text[0, :4])
    pickscores = scorer.logit_scale.double() * text @ image.T
    expected = torch.tensor(record["expected"]["pickscore_by_prompt"], dtype=torch.float64)
    torch.testing.assert_close(pickscores, expected, atol=2e-3, rtol=1e-4)  # the record's note: 100 x cosine
    golden.assert_close(record, "pickscore_probs_by_prompt", pickscores.softmax(dim=-1))


@pytest.mark.parametrize("kind", ["open_clip", "hf, legacy end token"])
def test_cutting_off_the_end_token_changes_the_feature(kind):
    """The reason tokens are never sliced after tokenisation: pooling then takes the largest id, which means nothing."""
    record = RECORDS["tiny_clip_eot_dropped"]
    scorer = SCORERS[kind]("gelu", torch.float64)
    good, bad = scorer.embed_tokens(torch.tensor([record["inputs"]["good"], record["inputs"]["bad"]]))
    golden.assert_close(record, "cosine", torch.nn.functional.cosine_similarity(good, bad, dim=0))


def test_both_official_configs_describe_the_same_network():
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        hf = CLIPModel(CLIPConfig(**VIT_H_14)).state_dict()
        renamed = to_hf_keys(build_clip(OFFICIAL_MODEL, source="test").state_dict())
    assert {key: value.shape for key, value in hf.items()} == {key: value.shape for key, value in renamed.items()}
    assert sum(value.numel() for value in hf.values()) == 986_109_441  # the published ViT-H-14


def test_a_checkpoint_file_gives_the_golden_embeddings(tmp_path):
    """Loading goes through the folder reader: exact GELU from the config, strict keys, fast initialisation."""
    record = RECORDS["tiny_clip_gelu"]
    # the bundled vocabulary is larger than 64 tokens, so the loaded network gets more rows; they are never read
    state = {key: value.float() for key, value in to_hf_keys(hash_weights()).items()}
    tokens = "text_model.embeddings.token_embedding.weight"
    state[tokens] = torch.cat([state[tokens], torch.zeros(49408 - 64, 32)])
    config = hf_config("gelu", end_token=63)
    config["text_config"]["vocab_size"] = 49408
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "model.safetensors")
    scorer = PickScore.from_pretrained(PickScore.cards[0], str(tmp_path))
    image, text = (torch.nn.functional.normalize(value, dim=-1) for value in features(scorer, record, torch.float32))
    golden.assert_close(record, "cosine", image @ text.T)
    assert scorer.spec == PixelSpec(size=28)
    assert len(scorer.tokenizer) == 49408
