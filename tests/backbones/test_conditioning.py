"""Conditioning: move, select, concatenate, share."""

import pytest
import torch

from diffalign.backbones import Conditioning


def _conditioning(n: int, start: int = 0) -> Conditioning:
    """Return entries that say their number in every column, in the time ids plus 1001."""
    index = torch.arange(start, start + n).float()
    return Conditioning(
        {
            "prompt_embeds": index.view(n, 1, 1).expand(n, 3, 2).clone(),
            "pooled_prompt_embeds": index.view(n, 1).repeat(1, 4),
            "add_time_ids": index.view(n, 1).repeat(1, 6) + 1001,
        }
    )


def _masked(*lengths: int) -> Conditioning:
    """Return entries of so many tokens each, padded to the most."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    embeds = torch.randn(len(lengths), max(lengths), 2) * mask[..., None]
    return Conditioning({"prompt_embeds": embeds, "prompt_embeds_mask": mask})


def _same(left: Conditioning, right: Conditioning) -> bool:
    """Tell whether two hold the same entries, however they are stored."""
    return list(left.columns) == list(right.columns) and all(torch.equal(left[c], right[c]) for c in left.columns)


def test_cat_and_select_are_inverse():
    first, second = _conditioning(2), _conditioning(3, start=2)
    both = Conditioning.cat([first, second])
    assert len(both) == 5
    for index in (slice(2, 5), [2, 3, 4], torch.tensor([2, 3, 4]), torch.tensor([0, 0, 1, 1, 1]).bool()):
        assert _same(both.select(index), second)


def test_casting_keeps_the_time_ids_and_masks_exact():
    cast = _conditioning(2).to(dtype=torch.bfloat16)
    assert cast["prompt_embeds"].dtype == cast["pooled_prompt_embeds"].dtype == torch.bfloat16
    assert cast["add_time_ids"].dtype == torch.float32
    assert cast["add_time_ids"][0, 0] == 1001  # bfloat16 would round it to 1000
    assert _masked(2, 3).to(dtype=torch.bfloat16)["prompt_embeds_mask"].dtype == torch.bool


def test_all_columns_move():
    moved = _conditioning(2).to("meta")
    assert moved.device.type == "meta"
    assert {column.device.type for column in moved.columns.values()} == {"meta"}


@pytest.mark.parametrize("prompts", [_conditioning(2), _masked(2, 3)], ids=["pooled", "masked"])
def test_shared_columns_count_select_move_and_concatenate_like_repeated_ones(prompts):
    repeated = Conditioning.cat([prompts] * 3)
    shared = repeated.shared(3)
    assert len(shared) == len(repeated) == 6
    stored = {name: len(column) for name, column in shared.columns.items()}
    assert stored == {name: 2 if name.startswith("prompt_embeds") else 6 for name in prompts.columns}
    assert _same(shared, repeated)
    rows = torch.tensor([5, 0, 3])
    for value, right in (
        (shared.select(rows), repeated.select(rows)),
        (shared.select(slice(1, 4)), repeated.select(slice(1, 4))),
        (Conditioning.cat([shared, repeated]), Conditioning.cat([repeated, repeated])),
    ):
        assert value.copies == 1
        assert _same(value, right)
    moved = shared.to(dtype=torch.bfloat16)
    assert len(moved) == 6
    assert len(moved.columns["prompt_embeds"]) == 2


def test_cat_pads_prompts_of_fewer_tokens_if_a_mask_can_say_so():
    short, long = _masked(1, 2), _masked(4, 3)
    both = Conditioning.cat([short, long])
    assert both["prompt_embeds_mask"].sum(1).tolist() == [1, 2, 4, 3]
    assert both["prompt_embeds_mask"].dtype == torch.bool
    assert torch.equal(both["prompt_embeds"][:2, :2], short["prompt_embeds"])
    assert not both["prompt_embeds"][:2, 2:].any()
    assert _same(both.select([2, 3]), long)


def test_cat_repeats_prompts_of_fewer_chunks_where_there_is_no_mask():
    # Attention over keys and values that stand there twice is attention over them once.
    short, long = (Conditioning({"prompt_embeds": _masked(n, 2)["prompt_embeds"]}) for n in (2, 4))
    both = Conditioning.cat([short, long])["prompt_embeds"]
    tokens, n = short["prompt_embeds"].shape[1], len(short)
    assert both.shape[1] == long["prompt_embeds"].shape[1] == 2 * tokens
    assert torch.equal(both[:n], short["prompt_embeds"].repeat(1, 2, 1))
    assert torch.equal(both[n:], long["prompt_embeds"])


def test_columns_of_two_families_are_not_concatenated():
    with pytest.raises(ValueError, match="Columns differ"):
        Conditioning.cat([_conditioning(2), _masked(2, 3)])
