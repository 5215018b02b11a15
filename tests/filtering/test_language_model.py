"""A language model rates prompts: a tiny GPT-2, taught in the fixture to answer, so that real answers are read."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from diffalign.errors import ModelError
from diffalign.filtering import Rating, rate
from diffalign.filtering.language_model import LanguageModelRater, parse_answer

QUESTION = "rate {prompt} :"
TAUGHT = {
    "a red circle": "7",
    "a red circle on a blue ground": "9",
    "gore": "0",
    "a naked king": "sorry",
    "blue": "hm",
    "two blue stars": "10",
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """Write a GPT-2 of two layers that has learnt the answers by heart."""
    torch.manual_seed(0)
    lines = [QUESTION.format(prompt=prompt) + " " + answer for prompt, answer in TAUGHT.items()]
    words = ["<pad>", "<end>", "<unk>", *sorted({word for line in lines for word in line.split()})]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", padding_side="right"
    )
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 2, "n_positions": 32}
    ends = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(words), resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **sizes, **ends)
    )
    batch = tokenizer([f"{line} <end>" for line in lines], return_tensors="pt", padding=True)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(120):
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rater(folder):
    return LanguageModelRater(str(folder), CPU, torch.float32, instruction=QUESTION)


def test_answers_are_read_and_harmful_prompts_refused(model_folder):
    ratings = rate(list(TAUGHT), rater(model_folder), batch_size=4)
    assert {prompt: (rating.score, rating.flag) for prompt, rating in ratings.items()} == {
        "a red circle": (7.0, ""),
        "a red circle on a blue ground": (9.0, ""),
        "gore": (0.0, "harmful"),
        "a naked king": (0.0, "harmful"),
        "blue": (5.0, "unparsed"),
        "two blue stars": (10.0, ""),
    }
    assert ratings["blue"].answer.strip() == "hm"


def test_the_batch_changes_nothing(model_folder):
    prompts = list(TAUGHT)
    assert rate(prompts, rater(model_folder), batch_size=1) == rate(prompts, rater(model_folder), batch_size=6)


def test_a_chat_template_is_used_where_there_is_one(model_folder, tmp_path):
    asked = rater(model_folder)
    asked._loaded[0].chat_template = "{% for m in messages %}rate {{ m.content }}{% endfor %} :"
    asked.instruction = "{prompt}"
    assert [rating.score for rating in asked(["a red circle", "two blue stars"])] == [7.0, 10.0]


def test_a_complete_cache_needs_no_model(model_folder, tmp_path):
    cache, first = tmp_path / "cache.jsonl", rater(model_folder)
    ratings = rate(list(TAUGHT), first, cache=cache, asked=first.asked())
    second = rater(model_folder)
    assert rate(list(TAUGHT), second, cache=cache, asked=second.asked()) == ratings
    assert "_loaded" not in vars(second)


def test_what_was_asked_names_weights_and_question(model_folder, tmp_path):
    other = LanguageModelRater(str(model_folder), CPU, torch.float32, instruction="{prompt}?")
    assert other.asked() != rater(model_folder).asked()
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in model_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert rater(copy).asked() == rater(model_folder).asked()
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert rater(copy).asked() != rater(model_folder).asked()


@pytest.mark.parametrize(
    ("answer", "score", "flag"),
    [
        ("8", 8.0, ""),
        (" 7/10 because", 7.0, ""),
        ("12", 10.0, ""),
        ("00", 0.0, "harmful"),
        ("Harmful.", 0.0, "harmful"),
        ("I'm sorry, but", 0.0, "harmful"),
        ("I can't rate this", 0.0, "harmful"),
        ("I can\u2019t", 0.0, "harmful"),
        ("I am unable to", 0.0, "harmful"),
        ("harmless: 9", 5.0, "unparsed"),
        ("-3", 5.0, "unparsed"),
        ("", 5.0, "unparsed"),
    ],
)
def test_parsing(answer, score, flag):
    assert parse_answer(answer) == Rating(score, flag, answer)


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"Cannot load the language model.*--text-quality-model"):
        rater(tmp_path / "none")(["a"])
