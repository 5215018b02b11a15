import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import reward_models
from reward_models.aesthetic import fold_head
from reward_models.base import ScorerError
from reward_models.checkpoints import read_state_dict
from reward_models.clip_score import ClipScoreHessel, ClipScoreRaw, ClipScoreTorchmetrics
from reward_models.hf_clip import OPENAI_VIT_B_32, OPENAI_VIT_L_14, parse_config
from tests import golden
from tests.reward_models.tiny_scorers import published_head
from tests.reward_models.toy import PROMPTS, noise_image

RECORDS = golden.load("rewards")
HEADS = {
    "laion_aesthetic_sac": "sac+logos+ava1-l14-linearMSE.pth",
    "laion_aesthetic_ava": "ava+logos-l14-linearMSE.pth",
}
IMAGES = [noise_image(seed) for seed in range(4)]


def load(name, scorer_places):
    return reward_models.load(name, scorer_places[name])


def test_the_conventions_match_the_record(scorer_places):
    record = RECORDS["clipscore_conventions"]
    cosine = torch.tensor(record["inputs"]["cosine"])
    raw, hundred, hessel = (load(f"clip_score_{kind}", scorer_places) for kind in ("raw", "torchmetrics", "hessel"))
    golden.assert_close(record, "raw_mean", raw.summary(raw.from_cosine(cosine)))
    golden.assert_close(record, "mean_then_clamp_x100", hundred.summary(hundred.from_cosine(cosine)))
    golden.assert_close(record, "w2.5_per_sample", hessel.from_cosine(cosine))
    assert hundred.summary(hundred.from_cosine(-cosine)) == 0
    assert (hundred.from_cosine(-cosine) < 0).any()  # the clamp is not applied to single images


def test_the_conventions_are_of_one_cosine(scorer_places):
    raw, hundred, hessel = (load(f"clip_score_{kind}", scorer_places) for kind in ("raw", "torchmetrics", "hessel"))
    cosine = raw.score(IMAGES, PROMPTS[0])
    torch.testing.assert_close(hundred.score(IMAGES, PROMPTS[0]), 100 * cosine)
    prefixed = raw.score(IMAGES, f"A photo depicts {PROMPTS[0]}")
    torch.testing.assert_close(hessel.score(IMAGES, PROMPTS[0]), 2.5 * prefixed)
    logits = [torch.logit(scorer.compare(IMAGES[:1], IMAGES[1:2], PROMPTS[0])) for scorer in (raw, hundred)]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)
    assert logits[0].item() == pytest.approx(float(raw.logit_scale) * float(cosine[0] - cosine[1]), abs=1e-4)
    assert {cls.cards[0].name for cls in (ClipScoreRaw, ClipScoreTorchmetrics, ClipScoreHessel)} == {
        name for name in reward_models.names() if name.startswith("clip_score")
    }


def test_the_official_sizes_are_openais():
    from transformers import CLIPModel

    for content, total in ((OPENAI_VIT_L_14, 427_616_513), (OPENAI_VIT_B_32, 151_277_313)):
        with torch.device("meta"):
            module = CLIPModel(parse_config(content, "test", activation="quick_gelu"))
        assert sum(value.numel() for value in module.state_dict().values()) == total


@pytest.mark.parametrize(
    ("name", "trained_with", "file"),
    [
        ("pickscore", "gelu", "config.json"),
        ("mps", "gelu", "config.json"),
        ("step_aware", "gelu", "config.json"),
        ("aesthetic", "quick_gelu", "config.json"),
        ("hpsv2", "exact GELU", "open_clip_config.json"),
    ],
)
def test_the_wrong_activation_is_an_error(name, trained_with, file, scorer_places, tmp_path):
    folder = shutil.copytree(scorer_places[name], tmp_path / "copy")
    config = json.loads((folder / file).read_text())
    if name == "hpsv2":
        config["model_cfg"]["quick_gelu"] = True
    else:
        config.get("vision_config", config)["hidden_act"] = "gelu" if trained_with == "quick_gelu" else "quick_gelu"
    (folder / file).write_text(json.dumps(config))
    with pytest.raises(ScorerError, match=rf"(?s)config\.json.*trained with.*{trained_with}"):
        reward_models.load(name, folder)


def test_folding_is_exact_and_happens_once():
    state = published_head(16)
    folded = fold_head(state, "test")
    x = torch.nn.functional.normalize(torch.randn(5, 16, dtype=torch.float64), dim=-1)
    expected = x
    for index in (0, 2, 4, 6, 7):
        expected = expected @ state[f"layers.{index}.weight"].double().T + state[f"layers.{index}.bias"].double()
    got = x @ folded["head.weight"].double().T + folded["head.bias"].double()
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert fold_head(folded, "test") == folded
    assert fold_head({f"predictor.{key}": value for key, value in state.items()}, "test").keys() == folded.keys()


@pytest.mark.parametrize("layers", [(0, 3, 6, 9, 11), (0, 2, 4, 6)])
def test_other_heads_are_refused(layers):
    state = {f"layers.{index}.{kind}": torch.zeros(1) for index in layers for kind in ("weight", "bias")}
    with pytest.raises(ScorerError, match=r"not LAION's linear head.*reluMSE"):
        fold_head(state, "head.pth")
    with pytest.raises(ScorerError, match="version 1"):
        fold_head({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, "head.pth")


def test_a_lone_head_takes_the_clip_beside_it(scorer_places, tmp_path):
    """The published head file, next to a whole CLIP whose text tower is left alone."""
    folder = shutil.copytree(scorer_places["clip_score_raw"], tmp_path / "clip")
    head = published_head(16)
    torch.save(head, tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    scorer = reward_models.load("aesthetic", tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    embeddings = reward_models.load("clip_score_raw", folder).image_embeddings(scorer.pixels(IMAGES))
    folded = fold_head(head, "test")
    expected = embeddings @ folded["head.weight"][0] + folded["head.bias"]
    torch.testing.assert_close(scorer.score(IMAGES), expected.detach(), atol=1e-5, rtol=1e-5)


def test_a_lone_head_without_a_clip_asks_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    torch.save(published_head(768), tmp_path / "head.pth")
    with pytest.raises(ScorerError, match="openai/clip-vit-large-patch14"):
        reward_models.load("aesthetic", tmp_path / "head.pth")


def test_the_embedding_is_normalised(scorer_places, tmp_path):
    """Twice as large a projection changes nothing."""
    folder = shutil.copytree(scorer_places["aesthetic"], tmp_path / "copy")
    state = load_file(folder / "model.safetensors")
    state["visual_projection.weight"] *= 2
    save_file(state, folder / "model.safetensors")
    expected = load("aesthetic", scorer_places).score(IMAGES)
    torch.testing.assert_close(reward_models.load("aesthetic", folder).score(IMAGES), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.weights
@pytest.mark.parametrize("record_id", HEADS)
def test_the_published_heads_match_their_records(record_id):
    """Set LAION_HEADS to a folder with the two published files."""
    file = Path(os.environ.get("LAION_HEADS", "")) / HEADS[record_id]
    if not file.is_file():
        pytest.skip(f"no {file}: set LAION_HEADS")
    record, folded = RECORDS[record_id], fold_head(read_state_dict(file), file)
    index = torch.arange(768, dtype=torch.float64)
    vectors = {
        "ones": torch.ones(768, dtype=torch.float64),
        "sin(i+1)": (index + 1).sin(),
        "e_0": (index == 0).double(),
    }
    weight, bias = folded["head.weight"][0].double(), folded["head.bias"].double()
    for key, vector in vectors.items():
        for name, x in (("score", vector / vector.norm()), ("score_without_normalisation", vector)):
            assert (weight @ x + bias).item() == pytest.approx(record["expected"][name][key], abs=3e-5, rel=1e-5)
