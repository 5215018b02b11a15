from itertools import islice

import pytest
from open_clip.tokenizer import SimpleTokenizer

from diffalign.shapes.captions import scenes, vocabulary
from diffalign.shapes.pipeline import PROMPT_LENGTH
from diffalign.shapes.tokenizer import build_tokenizer, world_merges
from reward_models import tokenization


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(PROMPT_LENGTH)


def test_every_word_is_one_token(tokenizer):
    for word in vocabulary():
        start, *tokens, end = tokenizer(word).input_ids
        assert len(tokens) == 1, word
        assert (start, end) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert tokenizer.decode(tokens).strip() == word
    assert len({tokenizer(word).input_ids[1] for word in vocabulary()}) == len(vocabulary())


def test_every_caption_fits(tokenizer):
    captions = [scene.caption() for scene in islice(scenes(0, held_out=False), 500)]
    lengths = [len(ids) for ids in tokenizer(captions).input_ids]
    assert max(lengths) <= PROMPT_LENGTH
    assert lengths == [len(caption.split()) + 2 for caption in captions]


def test_the_end_is_the_largest_id_and_padding_is_as_in_sdxl():
    first, second = build_tokenizer(PROMPT_LENGTH), build_tokenizer(PROMPT_LENGTH, pad_token="!")
    assert first.eos_token_id == len(first) - 1  # CLIP's text encoders look for it there
    assert first.pad_token_id == first.eos_token_id
    assert second.pad_token_id == second.convert_tokens_to_ids("!") == 0
    padded = second("a star", padding="max_length").input_ids
    assert len(padded) == PROMPT_LENGTH
    assert padded[-1] == 0


def test_words_outside_the_world_are_spelt_and_not_lost(tokenizer):
    ids = tokenizer("a cat", add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids[:-1]
    assert tokenizer.decode(ids).strip() == "a cat"


def test_open_clip_reads_the_same_tokens(tmp_path, tokenizer):
    file = tokenization.write_bpe_file(tmp_path / "bpe.txt.gz", world_merges())
    open_clip = SimpleTokenizer(bpe_path=str(file), context_length=PROMPT_LENGTH)
    assert open_clip.vocab_size == len(tokenizer)
    captions = [scene.caption() for scene in islice(scenes(1, held_out=True), 100)] + ["A Cat, 3 dogs!"]
    for caption in captions:
        assert open_clip.encode(caption) == tokenizer(caption, add_special_tokens=False).input_ids
