"""Models through transformers: tiny ones of the true classes say what they say, in any batch, without the question."""

import pytest
import torch
from transformers import AutoProcessor, BlipForConditionalGeneration

from diffalign.captioning import ImageToText, Missing, Question
from diffalign.captioning.base import INSTRUCTION
from diffalign.data.pairs import ImageRef
from diffalign.errors import ModelError
from tests.captioning.models import write_blip, write_llava, write_vit_gpt2
from tests.data.world import picture

CPU = torch.device("cpu")
PROMPTS = ("a red circle", "the cat on the square", "a photo", "blue")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioners")
    writers = {"blip": write_blip, "llava": write_llava, "vit": write_vit_gpt2}
    return {name: write(folder / name) for name, write in writers.items()}


def captioner(folder, batch_size=3, **settings):
    settings = {"new_tokens": 6, "batch_size": batch_size, "weights": "w", **settings}
    return ImageToText(str(folder), CPU, torch.float32, **settings)


def questions(prompts=PROMPTS):
    return [Question(prompt, ImageRef(data=picture(seed))) for seed, prompt in enumerate(prompts)]


def said(by, asked):
    return [answer for batch in by.answers(asked) for _, answer in batch]


@pytest.mark.parametrize("name", ["blip", "llava", "vit"])
def test_the_batch_changes_nothing(folders, name):
    together = said(captioner(folders[name], batch_size=4), questions())
    assert together == said(captioner(folders[name], batch_size=1), questions())
    assert len(set(together)) > 1  # they look at the pictures


def test_blip_says_what_its_own_code_says(folders):
    processor = AutoProcessor.from_pretrained(folders["blip"])
    model = BlipForConditionalGeneration.from_pretrained(folders["blip"]).eval()
    asked = questions()
    pixels = processor(images=[question.image.load() for question in asked], return_tensors="pt")
    own = processor.batch_decode(model.generate(**pixels, max_new_tokens=6), skip_special_tokens=True)
    assert said(captioner(folders["blip"]), asked) == [text or Missing("empty answer") for text in own]


def test_a_beginning_is_gone_on_with_and_left_out(folders):
    by = captioner(folders["blip"], template="{prompt} on the")
    processor = AutoProcessor.from_pretrained(folders["blip"])
    model = BlipForConditionalGeneration.from_pretrained(folders["blip"]).eval()
    for question, answer in zip(asked := questions(), said(by, asked), strict=True):
        given = processor(images=question.image.load(), text=f"{question.text} on the", return_tensors="pt")
        [own] = processor.batch_decode(model.generate(**given, max_new_tokens=6), skip_special_tokens=True)
        assert own.startswith(f"{question.text} on the")
        rest = own.removeprefix(f"{question.text} on the").strip()
        assert answer == (rest or Missing("empty answer"))


def test_what_reads_the_prompt(folders):
    assert not captioner(folders["blip"]).reads_prompt
    assert captioner(folders["blip"], template="{prompt}:").reads_prompt
    assert captioner(folders["llava"]).template == INSTRUCTION
    assert not captioner(folders["llava"], template="user:").reads_prompt
    with pytest.raises(ModelError, match="reads no text: leave out --template"):
        captioner(folders["vit"], template="a photo of")


def test_a_model_that_chats_is_shown_the_prompt(folders):
    by = captioner(folders["llava"], template="Prompt : {prompt}")
    same = [Question(prompt, ImageRef(data=picture(0))) for prompt in PROMPTS]
    answers = said(by, same)
    assert len(set(answers)) > 1
    assert not any("user" in answer and "Prompt" in answer for answer in answers if isinstance(answer, str))


def test_what_was_asked_names_weights_template_and_length(folders):
    kinds = ({}, {"weights": "v"}, {"template": "a"}, {"new_tokens": 7})
    assert len({captioner(folders["blip"], **kind).asked for kind in kinds}) == 4


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(ModelError, match=r'Cannot load the captioner ".*none".*--with'):
        captioner(tmp_path / "none")
