"""Tiny scorers, built once: their folders are read-only, the loaded scorers must not be trained."""

import pytest

import reward_models
from reward_models.tiny import build_tiny_hpsv2, build_tiny_pickscore
from reward_models.tokenization import learn_merges, write_bpe_file, write_hf_tokenizer
from tests.reward_models.tiny_scorers import build_all
from tests.reward_models.toy import PROMPTS, SIZES


@pytest.fixture(scope="session")
def tiny_scorer_folders(tmp_path_factory):
    """Return the folder of each tiny scorer by name; both have the same vocabulary."""
    root = tmp_path_factory.mktemp("scorers")
    merges = learn_merges(PROMPTS, 60)
    tokenizer = write_hf_tokenizer(root / "tokenizer", merges, text_length=SIZES.text_length)
    bpe_file = write_bpe_file(root / "vocabulary.txt.gz", merges)
    return {
        "pickscore": build_tiny_pickscore(root / "tiny-pickscore", tokenizer, seed=0, sizes=SIZES),
        "hpsv2": build_tiny_hpsv2(root / "tiny-hpsv2", bpe_file, seed=0, sizes=SIZES),
    }


@pytest.fixture(params=["pickscore", "hpsv2"])
def scorer_name(request):
    return request.param


@pytest.fixture
def scorer_folder(tiny_scorer_folders, scorer_name):
    return tiny_scorer_folders[scorer_name]


@pytest.fixture
def scorer(scorer_name, scorer_folder):
    return reward_models.load(scorer_name, scorer_folder)


@pytest.fixture(scope="session")
def scorer_places(tiny_scorer_folders, tmp_path_factory):
    """Return where the tiny weights of every scorer are, by name; read-only."""
    folders = tiny_scorer_folders
    return build_all(tmp_path_factory.mktemp("all-scorers"), folders["pickscore"], folders["hpsv2"])
