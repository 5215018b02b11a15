import json
import shutil

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPProcessor

import reward_models
from reward_models.base import ScorerError
from reward_models.checkpoints import is_hub_id, read_state_dict, skip_random_init, write_folder
from tests.reward_models.toy import noise_image

IMAGES = [noise_image(seed, 32, 32) for seed in range(3)]
TEXTS = ["a red square", "a blue wall", "a green flag"]
WEIGHTS = {"pickscore": "model.safetensors", "hpsv2": "open_clip_model.safetensors"}


@pytest.fixture
def folder(scorer_folder, tmp_path):
    """Return a copy of the scorer's folder that a test may damage."""
    return shutil.copytree(scorer_folder, tmp_path / "copy")


@pytest.fixture
def weights(folder, scorer_name):
    return folder / WEIGHTS[scorer_name]


def test_saving_and_loading_gives_the_same_scores(scorer, scorer_name, tmp_path):
    saved = scorer.save(tmp_path / "saved")
    loaded = reward_models.load(scorer_name, saved)
    assert torch.equal(loaded.score(IMAGES, TEXTS), scorer.score(IMAGES, TEXTS))
    assert loaded.spec == scorer.spec
    again = loaded.save(tmp_path / "again")
    names = sorted(file.name for file in saved.iterdir())
    assert names == sorted(file.name for file in again.iterdir())
    assert all((saved / name).read_bytes() == (again / name).read_bytes() for name in names)


def test_the_same_seed_builds_the_same_weights(tiny_scorer_folders, tmp_path):
    from reward_models.tiny import build_tiny_hpsv2
    from tests.reward_models.toy import SIZES

    folder, before = tiny_scorer_folders["hpsv2"], torch.get_rng_state()
    build_tiny_hpsv2(tmp_path / "same", folder / "bpe.txt.gz", seed=0, sizes=SIZES)
    build_tiny_hpsv2(tmp_path / "other", folder / "bpe.txt.gz", seed=1, sizes=SIZES)
    name = WEIGHTS["hpsv2"]
    assert (tmp_path / "same" / name).read_bytes() == (folder / name).read_bytes()
    assert (tmp_path / "other" / name).read_bytes() != (folder / name).read_bytes()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_embedded_sizes_are_the_default(tiny_scorer_folders, tmp_path):
    from reward_models.tiny import build_tiny_hpsv2, build_tiny_pickscore

    built = {
        "pickscore": build_tiny_pickscore(tmp_path / "p", tiny_scorer_folders["pickscore"], seed=0),
        "hpsv2": build_tiny_hpsv2(tmp_path / "h", tiny_scorer_folders["hpsv2"] / "bpe.txt.gz", seed=0),
    }
    for name, folder in built.items():
        scorer = reward_models.load(name, folder)
        assert scorer.spec.size == 64
        assert scorer.tokenize(["red"]).shape == (1, 32)
        assert scorer.score(IMAGES, TEXTS).shape == (3,)
        assert 1_000_000 < sum(parameter.numel() for parameter in scorer.module.parameters()) < 2_000_000


def test_pickscore_equals_the_official_inference_code(tiny_scorer_folders):
    """The published snippet, with transformers' own processor, tokenizer and loader on the folder we wrote."""
    folder = tiny_scorer_folders["pickscore"]
    model = CLIPModel.from_pretrained(folder, use_safetensors=True).eval()
    processor = CLIPProcessor.from_pretrained(folder)
    pixels = processor.image_processor(images=IMAGES, return_tensors="pt")
    tokens = processor.tokenizer(TEXTS, padding=True, truncation=True, max_length=32, return_tensors="pt")
    with torch.no_grad():
        image, text = model.get_image_features(**pixels), model.get_text_features(**tokens)
        image, text = (getattr(features, "pooler_output", features) for features in (image, text))
        cosine = torch.nn.functional.cosine_similarity(image, text)
        expected = model.logit_scale.exp() * cosine
    torch.testing.assert_close(reward_models.load("pickscore", folder).score(IMAGES, TEXTS), expected)


def test_hpsv2_equals_open_clip_on_the_same_folder(tiny_scorer_folders):
    folder = tiny_scorer_folders["hpsv2"]
    scorer = reward_models.load("hpsv2", folder)
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}", bpe_path=str(folder / "bpe.txt.gz"))
    with torch.no_grad():
        image = model.encode_image(torch.stack([scorer.preprocess(image) for image in IMAGES]), normalize=True)
        text = model.encode_text(tokenizer(TEXTS), normalize=True)
    torch.testing.assert_close(scorer.score(IMAGES, TEXTS), (image * text).sum(-1))


def test_official_layout_of_hpsv2(tiny_scorer_folders, tmp_path):
    scorer = reward_models.load("hpsv2", tiny_scorer_folders["hpsv2"])
    shutil.copytree(tiny_scorer_folders["hpsv2"], tmp_path / "folder", dirs_exist_ok=True)
    (tmp_path / "folder" / WEIGHTS["hpsv2"]).unlink()
    file = scorer.save_official(tmp_path / "folder" / "HPS_v2_compressed.pt")
    assert list(torch.load(file, weights_only=True)) == ["state_dict"]
    for source in (file, file.parent):
        assert torch.equal(reward_models.load("hpsv2", source).score(IMAGES, TEXTS), scorer.score(IMAGES, TEXTS))


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_wrapped_and_prefixed_weights_are_recognised(folder, weights, scorer, scorer_name, wrapper, prefix):
    state = {prefix + key: value for key, value in load_file(weights).items()}
    file = folder / "weights.pt"
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, file)
    assert torch.equal(reward_models.load(scorer_name, file).score(IMAGES, TEXTS), scorer.score(IMAGES, TEXTS))


def test_stored_position_ids_are_ignored(folder, weights, scorer_name):
    state = load_file(weights)
    save_file({**state, "text_model.embeddings.position_ids": torch.arange(32)}, weights)
    reward_models.load(scorer_name, folder)


def test_a_pickled_module_is_refused_with_the_conversion(folder, scorer, scorer_name):
    torch.save(scorer.module, folder / "whole.pt")
    with pytest.raises(ScorerError, match=r"(?s)run code.*save_file\(model\.state_dict\(\), \"whole\.safetensors\""):
        reward_models.load(scorer_name, folder / "whole.pt")


def test_code_in_a_pickle_does_not_run(folder, scorer_name, tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"state_dict": Payload()}, folder / "evil.pt")
    with pytest.raises(ScorerError, match="run code stored in the file"):
        reward_models.load(scorer_name, folder / "evil.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.999])
def test_a_truncated_file_is_named_with_its_size(folder, weights, scorer_name, kind, kept):
    if kind == "pt":
        torch.save(load_file(weights), folder / "weights.pt")
        weights = folder / "weights.pt"
    content = weights.read_bytes()
    content = content[: kept if isinstance(kept, int) else int(kept * len(content))]
    weights.write_bytes(content)
    with pytest.raises(ScorerError, match=rf"{weights.name} \({len(content)} bytes\) is truncated or damaged"):
        reward_models.load(scorer_name, weights)


def test_missing_and_foreign_keys_are_counted(folder, weights, scorer_name):
    state = load_file(weights)
    removed = sorted(state)[0]
    save_file({**{key: value for key, value in state.items() if key != removed}, "extra": torch.zeros(1)}, weights)
    with pytest.raises(
        ScorerError, match=rf"1 missing \(first: {removed}\); 1 not part of the network \(first: extra\)"
    ):
        reward_models.load(scorer_name, folder)


def test_wrong_shapes_are_counted(folder, weights, scorer_name):
    state = load_file(weights)
    key = next(key for key in sorted(state) if key.endswith("token_embedding.weight"))
    save_file({**state, key: state[key][:-1].contiguous()}, weights)
    rows, width = state[key].shape
    with pytest.raises(
        ScorerError, match=rf"1 of another shape.*\[{rows - 1}, {width}\] instead of \[{rows}, {width}\]"
    ):
        reward_models.load(scorer_name, folder)


def test_weights_of_the_other_scorer_are_refused(tiny_scorer_folders, scorer_name, folder):
    other = {"pickscore": "hpsv2", "hpsv2": "pickscore"}[scorer_name]
    source = tiny_scorer_folders[other] / WEIGHTS[other]
    shutil.copy(source, folder / WEIGHTS[scorer_name])
    with pytest.raises(ScorerError, match="does not fit the network"):
        reward_models.load(scorer_name, folder)


def test_a_file_of_other_things_is_refused(tmp_path, scorer_name):
    torch.save({"epoch": 3, "loss": 0.5}, tmp_path / "log.pt")
    with pytest.raises(ScorerError, match=r"no state dict.*epoch"):
        reward_models.load(scorer_name, tmp_path / "log.pt")


@pytest.mark.parametrize("name", ["nowhere", "nowhere/at/all.safetensors", "./nowhere.pt"])
def test_a_missing_path_is_named(name, scorer_name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ScorerError, match="nowhere"):
        reward_models.load(scorer_name, name)


def test_a_folder_without_weights_lists_what_it_holds(folder, weights, scorer_name):
    weights.unlink()
    with pytest.raises(ScorerError, match=rf"expected one of {weights.name}.*it holds .*json"):
        reward_models.load(scorer_name, folder)


def test_a_vocabulary_larger_than_the_network_is_refused(folder, scorer_name):
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "bpe.txt.gz"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ScorerError, match=r"49408 tokens, the network knows 545"):
        reward_models.load(scorer_name, folder)


def test_preprocessing_of_another_size_is_refused(tiny_scorer_folders, tmp_path):
    folder = shutil.copytree(tiny_scorer_folders["pickscore"], tmp_path / "copy")
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**config, "crop_size": 224}))
    with pytest.raises(ScorerError, match=r"crop_size = 224 \(expected 32\)"):
        reward_models.load("pickscore", folder)


def test_own_mean_and_std_are_used(tiny_scorer_folders, tmp_path):
    for name, file, section in (
        ("pickscore", "preprocessor_config.json", None),
        ("hpsv2", "open_clip_config.json", "preprocess_cfg"),
    ):
        folder = shutil.copytree(tiny_scorer_folders[name], tmp_path / name)
        config = json.loads((folder / file).read_text())
        target = config[section] if section else config
        for key in list(target):
            if key.removeprefix("image_") in ("mean", "std"):
                target[key] = [0.5, 0.5, 0.5]
        (folder / file).write_text(json.dumps(config))
        scorer = reward_models.load(name, folder)
        black = scorer.pixels([torch.zeros(3, 32, 32)])
        assert torch.equal(black, torch.full((1, 3, 32, 32), -1.0))


@pytest.mark.parametrize("damage", ["{", "{}", '{"model_cfg": {"vision_cfg": {}}}', None])
def test_a_damaged_open_clip_config_is_named(tiny_scorer_folders, tmp_path, damage):
    folder = shutil.copytree(tiny_scorer_folders["hpsv2"], tmp_path / "copy")
    if damage is None:
        config = json.loads((folder / "open_clip_config.json").read_text())
        config["model_cfg"]["text_cfg"]["hf_model_name"] = "roberta-base"
        damage = json.dumps(config)
    (folder / "open_clip_config.json").write_text(damage)
    with pytest.raises(ScorerError, match=r"open_clip_config\.json|hf_model_name is not supported"):
        reward_models.load("hpsv2", folder)


def test_hub_ids_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not is_hub_id("owner/name")
    assert is_hub_id("yuvalkirstain/PickScore_v1")
    assert is_hub_id("xswu/HPSv2/HPS_v2_compressed.pt")
    for path in ("runs/weights.pt", "/a/b", "./a/b", "~/a", "a", "a/b/c/d"):
        assert not is_hub_id(path)


def test_a_failed_write_leaves_the_old_files(scorer, tmp_path):
    folder = scorer.save(tmp_path / "saved")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def fail(temporary):
        (temporary / "config.json").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ScorerError, match=r"No space left on device.*intact"):
        write_folder(folder, fail)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]


def test_skipping_initialisation_draws_no_random_numbers():
    before = torch.get_rng_state()
    with skip_random_init():
        layer = torch.nn.Linear(64, 64)
    assert torch.equal(torch.get_rng_state(), before)
    assert layer.weight.shape == (64, 64)
    torch.nn.Linear(64, 64)
    assert not torch.equal(torch.get_rng_state(), before)


def test_an_unknown_suffix_is_named(tmp_path):
    (tmp_path / "weights.h5").write_bytes(b"x")
    with pytest.raises(ScorerError, match=r"weights\.h5: unknown kind"):
        read_state_dict(tmp_path / "weights.h5")
