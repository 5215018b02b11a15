import html
import json

import ftfy
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from transformers import CLIPTokenizer

from reward_models.base import ScorerError
from reward_models.tokenization import (
    bundled_bpe_file,
    hf_tokenizer,
    learn_merges,
    read_merges,
    vocabulary,
    write_bpe_file,
    write_hf_tokenizer,
)
from tests import golden
from tests.reward_models.toy import PROMPTS

RECORDS = {key: record for key, record in golden.load("rewards").items() if key.startswith("tokenizer_")}


@pytest.fixture(scope="module")
def official_merges():
    return read_merges(bundled_bpe_file())


@pytest.fixture(scope="module")
def official_hf_tokenizer(official_merges):
    return hf_tokenizer(official_merges)


def padded(expected):
    return expected["ids"] + [0] * (77 - len(expected["ids"]))


def test_the_official_vocabulary_has_its_size_and_special_tokens(official_merges):
    tokens = vocabulary(official_merges)
    assert len(tokens) == 49408
    assert (tokens["<|startoftext|>"], tokens["<|endoftext|>"]) == (49406, 49407)


@pytest.mark.parametrize("record_id", RECORDS)
def test_open_clip_tokenizer_matches_the_official_ids(record_id):
    expected = RECORDS[record_id]["expected"]
    ids = SimpleTokenizer(bpe_path=str(bundled_bpe_file()))(RECORDS[record_id]["inputs"]["prompt"])[0].tolist()
    assert ids == padded(expected)
    assert ids[76] == expected["last_id_at_76"]


@pytest.mark.parametrize("record_id", RECORDS)
def test_hf_tokenizer_matches_the_official_ids_of_clean_text(record_id, official_hf_tokenizer):
    """Hugging Face's tokenizer neither repairs text nor resolves HTML entities, so that is done here."""
    expected = RECORDS[record_id]["expected"]
    prompt = html.unescape(html.unescape(ftfy.fix_text(RECORDS[record_id]["inputs"]["prompt"]))).strip()
    ids = official_hf_tokenizer(prompt, truncation=True, max_length=77).input_ids
    assert ids == expected["ids"]


def test_hf_tokenizer_leaves_html_entities_as_the_official_pickscore_does(official_hf_tokenizer):
    expected = RECORDS["tokenizer_1"]["expected"]["ids"]
    assert official_hf_tokenizer(RECORDS["tokenizer_1"]["inputs"]["prompt"]).input_ids != expected


def test_learned_vocabularies_agree_in_both_formats(tmp_path):
    merges = learn_merges(PROMPTS, 25)
    assert len(merges) == 25
    open_clip = SimpleTokenizer(bpe_path=str(write_bpe_file(tmp_path / "bpe.txt.gz", merges)), context_length=16)
    hf = CLIPTokenizer.from_pretrained(write_hf_tokenizer(tmp_path / "hf", merges, text_length=16))
    assert open_clip.vocab_size == len(hf) == 512 + 25 + 2
    for prompt in [*PROMPTS, "", "an unseen Zebra!", "caf\u00e9 12"]:
        expected = open_clip(prompt)[0]
        length = int(expected.argmax()) + 1
        ids = hf(prompt, truncation=True, max_length=hf.model_max_length).input_ids
        assert ids == expected[:length].tolist()
    assert json.loads((tmp_path / "hf" / "vocab.json").read_text())["<|endoftext|>"] == 538


def test_learned_merges_compress_and_do_not_depend_on_the_order_of_captions():
    merges = learn_merges(PROMPTS, 200)
    assert merges == learn_merges(reversed(PROMPTS), 200)
    assert len(merges) < 200  # every word is one token before the budget is spent
    ids = hf_tokenizer(merges)("a red square").input_ids
    assert len(ids) == 5


def test_the_same_merges_give_the_same_file(tmp_path):
    merges = learn_merges(PROMPTS, 10)
    first, second = (write_bpe_file(tmp_path / name, merges) for name in ("a.gz", "b.gz"))
    assert first.read_bytes() == second.read_bytes()
    assert read_merges(first) == merges


def test_a_damaged_vocabulary_is_named(tmp_path):
    (tmp_path / "bpe.txt.gz").write_bytes(b"merges")
    with pytest.raises(ScorerError, match=r"bpe\.txt\.gz"):
        read_merges(tmp_path / "bpe.txt.gz")


def test_truncation_keeps_the_end_token(scorer):
    tokens = scorer.tokenize(["red " * 100, "red"])
    assert tokens.shape == (2, 32)
    assert tokens.dtype == torch.int64
    end = tokens.max()
    assert tokens[0, -1] == end
    assert (tokens[1] == end).nonzero()[0] == 2
