"""Conditioning: move, select, concatenate."""

import torch

from diffalign.backbones import Conditioning


def _conditioning(n: int, start: int = 0) -> Conditioning:
    index = torch.arange(start, start + n).float()
    return Conditioning(
        index.view(n, 1, 1).expand(n, 3, 2).clone(), index.view(n, 1).repeat(1, 4), index.view(n, 1).repeat(1, 6) + 1001
    )


def test_cat_and_select_are_inverse():
    first, second = _conditioning(2), _conditioning(3, start=2)
    both = Conditioning.cat([first, second])
    assert len(both) == 5
    for index in (slice(2, 5), [2, 3, 4], torch.tensor([2, 3, 4]), torch.tensor([0, 0, 1, 1, 1]).bool()):
        part = both.select(index)
        assert torch.equal(part.prompt_embeds, second.prompt_embeds)
        assert torch.equal(part.pooled_prompt_embeds, second.pooled_prompt_embeds)
        assert torch.equal(part.add_time_ids, second.add_time_ids)


def test_parts_a_family_lacks_stay_none():
    text_only = Conditioning(torch.zeros(2, 3, 4))
    for result in (text_only.to("cpu", torch.bfloat16), text_only.select([0]), Conditioning.cat([text_only] * 2)):
        assert result.pooled_prompt_embeds is None
        assert result.add_time_ids is None


def test_casting_keeps_the_time_ids_exact():
    cast = _conditioning(2).to(dtype=torch.bfloat16)
    assert cast.prompt_embeds.dtype == cast.pooled_prompt_embeds.dtype == torch.bfloat16
    assert cast.add_time_ids.dtype == torch.float32
    assert cast.add_time_ids[0, 0] == 1001  # bfloat16 would round it to 1000
