"""Prompts longer than CLIP reads, in chunks: what A1111's encoder gives, whoever else is in a batch."""

import pytest
import torch

from diffalign import backbones
from diffalign.backbones.conditioning import Conditioning
from diffalign.backbones.long_prompts import repeated
from diffalign.errors import UserError
from diffalign.evaluation import SamplingSettings, generate

LONG = "a red circle " + "very " * 40 + "big on a blue background"
SETTINGS = SamplingSettings(num_inference_steps=2, long_prompts="chunk", guidance_scale=4.0)


@pytest.fixture(scope="module", params=["tiny_sd15", "tiny_sdxl"])
def backbone(request):
    return backbones.load(request.getfixturevalue(request.param)).reading("chunk")


def by_hand(backbone, prompt):
    """Encode a prompt as A1111 does, chunk by chunk: the states behind one another, and the first pooled output."""
    states, pooled = [], None
    for tokenizer, encoder in zip(backbone.tokenizers, backbone.text_encoders, strict=True):
        ids, size = tokenizer(prompt, add_special_tokens=False).input_ids, tokenizer.model_max_length - 2
        parts = []
        for start in range(0, max(len(ids), 1), size):
            chunk = [tokenizer.bos_token_id, *ids[start : start + size], tokenizer.eos_token_id]
            chunk += [tokenizer.pad_token_id] * (size + 2 - len(chunk))
            output = encoder(torch.tensor([chunk]), output_hidden_states=True)
            parts.append(output.hidden_states[-2] if backbone.family == "sdxl" else output[0])
            if start == 0 and backbone.family == "sdxl":
                pooled = output[0]
        states.append(torch.cat(parts, dim=1))
    return torch.cat(states, dim=2), pooled


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["", "a red circle", LONG])
def test_chunks_stand_behind_one_another(backbone, prompt):
    found = backbone.encode_prompts([prompt])
    states, pooled = by_hand(backbone, prompt)
    torch.testing.assert_close(found["prompt_embeds"], states)
    assert states.shape[1] == (backbone.tokenizers[0].model_max_length if prompt != LONG else states.shape[1])
    if pooled is not None:
        torch.testing.assert_close(found["pooled_prompt_embeds"], pooled)


@torch.no_grad()
def test_short_prompts_are_as_they_are_without(backbone):
    plain = backbones.load(backbone.source)
    for name, column in plain.encode_prompts(["a red circle", ""]).items():
        torch.testing.assert_close(backbone.encode_prompts(["a red circle", ""])[name], column)
    assert plain.fingerprint() != backbone.fingerprint()  # their caches are apart


@torch.no_grad()
def test_what_is_beyond_the_limit_is_read(backbone):
    other = LONG.replace("blue", "green")
    both = backbone.encode_prompts([LONG, other])["prompt_embeds"]
    assert not torch.equal(both[0], both[1])
    cut = backbones.load(backbone.source).encode_prompts([LONG, other])["prompt_embeds"]
    assert torch.equal(cut[0], cut[1])


@torch.no_grad()
def test_a_prediction_does_not_depend_on_the_batch(backbone):
    """Texts of one, two and three chunks together, and each alone; also with the empty prompt of guidance."""
    length = backbone.tokenizers[0].model_max_length
    prompts = ["a red circle", " ".join(["circle"] * length), LONG]
    denoiser = backbone.denoiser.eval()
    xt = torch.randn(3, backbone.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(3, 1)
    times = torch.tensor([10, 500, 900])

    def predict(rows, cond):
        return backbone.predict(denoiser, xt[rows], times[rows], cond)

    text = backbone.encode_prompts(prompts)
    together = predict([0, 1, 2], backbone.condition(text, sizes))
    alone = [backbone.condition(backbone.encode_prompts([prompt]), sizes[:1]) for prompt in prompts]
    apart = torch.cat([predict([row], cond) for row, cond in enumerate(alone)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        predict([0, 2], Conditioning.cat([alone[0], alone[2]])), apart[[0, 2]], rtol=1e-4, atol=1e-5
    )


def test_zeros_are_one_chunk():
    assert torch.equal(repeated(torch.zeros(2, 8, 3), 4), torch.zeros(2, 4, 3))


def test_pictures_show_all_of_a_prompt_whoever_is_beside_it(backbone):
    pipeline, other = backbone.pipeline(), LONG.replace("blue", "green")
    drawn = generate(pipeline, [LONG, "a red circle", other], [0, 0, 0], SETTINGS, progress=False)
    assert drawn[0].tobytes() != drawn[2].tobytes()
    alone = generate(pipeline, ["a red circle"], [0], SETTINGS, progress=False)[0]
    plain = generate(pipeline, ["a red circle"], [0], SamplingSettings(num_inference_steps=2, guidance_scale=4.0))[0]
    far = [abs(a - b) for a, b in zip(alone.convert("L").getdata(), drawn[1].convert("L").getdata(), strict=True)]
    assert max(far) <= 2
    far = [abs(a - b) for a, b in zip(alone.convert("L").getdata(), plain.convert("L").getdata(), strict=True)]
    assert max(far) <= 2


def test_others_say_that_it_means_nothing(tiny_sd3):
    pipeline = backbones.load(tiny_sd3).pipeline()
    with pytest.raises(UserError, match=r'--long-prompts "chunk" means nothing for sd3'):
        generate(pipeline, ["a red circle"], [0], SETTINGS, progress=False)


FAMILIES = ["tiny_sd15", "tiny_sdxl", "tiny_sd3", "tiny_flux", "tiny_klein", "tiny_qwen", "tiny_lumina2", "tiny_sana"]


@pytest.mark.parametrize("name", [*FAMILIES, "tiny_pixart_sigma", "tiny_zimage"])
def test_every_family_knows_how_long_prompts_are(request, name):
    """What has as many tokens as are read is encoded like what has one more, and one less is not."""
    backbone = backbones.load(request.getfixturevalue(name))
    kind, tokenizers = type(backbone), backbone.tokenizers
    (short,), read = kind.token_counts(tokenizers, ["circle"])
    (longer,), _ = kind.token_counts(tokenizers, ["circle circle"])
    assert short < longer <= read
    each = longer - short
    words = ["circle"] * (-(-(read - short) // each) + 25)  # a chat goes on behind the prompt
    (beyond,), _ = kind.token_counts(tokenizers, [" ".join(words)])
    assert beyond > read
    with torch.no_grad():
        cut = backbone.encode_prompts([" ".join([*words, end]) for end in ("red", "blue")])["prompt_embeds"]
    assert torch.equal(cut[0], cut[1])
