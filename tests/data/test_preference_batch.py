import pytest
import torch

from diffalign.data import PreferenceBatch


def make(examples=3, k=2, pooled=True, preference=True):
    """Return a batch in which every number says which image of which example it belongs to."""
    rows = torch.tensor([10.0 * image + b for image in range(k) for b in range(examples)])
    text = {
        "prompt_embeds": rows.view(-1, 1, 1).expand(-1, 5, 6).clone(),
        "pooled_prompt_embeds": rows.view(-1, 1).expand(-1, 6).clone(),
    }
    return PreferenceBatch(
        example_ids=torch.arange(examples) + 7,
        latent_mean=rows.view(-1, 1, 1, 1).expand(-1, 4, 2, 2).clone(),
        latent_std=rows.view(-1, 1, 1, 1).expand(-1, 4, 2, 2) + 0.5,
        text={name: column for name, column in text.items() if pooled or name == "prompt_embeds"},
        sizes=rows.view(-1, 1).expand(-1, 6).clone(),
        preference=torch.tensor([0.9, 0.6, 1.0])[:examples] if preference else None,
        prompts=[f"image {int(row) // 10} of {int(row) % 10}" for row in rows],
        scores=torch.tensor([[float(k * b - image) for image in range(k)] for b in range(examples)]),
        weights=torch.arange(examples) + 1.0,
    )


def rows_of(batch):
    """Return the row numbers of a batch after checking that all that belongs to a row went along."""
    rows = batch.sizes[:, 0]
    for value in (batch.latent_mean, *batch.text.values()):
        assert torch.equal(value.flatten(1)[:, 0], rows)
    assert torch.equal(batch.latent_std[:, 0, 0, 0], rows + 0.5)
    assert batch.prompts == [f"image {int(row) // 10} of {int(row) % 10}" for row in rows]
    return rows.tolist()


@pytest.mark.parametrize("k", [1, 2, 4])
def test_images_of_an_example(k):
    batch = make(k=k)
    assert batch.images_per_example == k
    assert len(batch) == 3
    assert batch.winners().images_per_example == 1
    assert rows_of(batch.winners()) == [0, 1, 2]
    assert batch.winners().scores.tolist() == batch.scores[:, :1].tolist()
    assert batch.winners().preference is None
    assert torch.equal(batch.winners().weights, batch.weights)


@pytest.mark.parametrize("pooled", [True, False])
def test_swapping_takes_everything_along(pooled):
    batch = make(pooled=pooled)
    turned = batch.swapped(torch.tensor([True, False, True]))
    assert rows_of(batch) == [0, 1, 2, 10, 11, 12]
    assert rows_of(turned) == [10, 1, 12, 0, 11, 2]
    torch.testing.assert_close(turned.preference, torch.tensor([0.1, 0.6, 0.0]))
    assert turned.scores.tolist() == [[-1, 0], [2, 1], [3, 4]]
    for name in ("example_ids", "weights"):
        assert torch.equal(getattr(turned, name), getattr(batch, name))
    back = turned.swapped(torch.tensor([True, False, True]))
    assert rows_of(back) == rows_of(batch)
    assert torch.equal(back.scores, batch.scores)


def test_swapping_without_preference_and_scores():
    from dataclasses import replace

    plain = replace(make(preference=False), scores=None, weights=None)
    turned = plain.swapped(torch.tensor([False, True, False]))
    assert rows_of(turned) == [0, 11, 2, 10, 1, 12]
    assert turned.preference is turned.scores is turned.weights is None


def test_only_pairs_can_be_swapped_and_masks_must_fit():
    with pytest.raises(ValueError, match=r"have 3 image\(s\)"):
        make(k=3).swapped(torch.tensor([True, False, False]))
    with pytest.raises(ValueError, match=r"mask must be bool \[3\], got torch.int64 \[3\]"):
        make().swapped(torch.tensor([1, 0, 0]))
    with pytest.raises(ValueError, match=r"got torch.bool \[2\]"):
        make().swapped(torch.tensor([True, False]))


@pytest.mark.parametrize("indices", [[2, 0], torch.tensor([2, 0]), [-1, -3]])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_selecting_keeps_all_images_of_an_example(indices, k):
    some = make(k=k).select(indices)
    assert rows_of(some) == [10 * image + b for image in range(k) for b in (2, 0)]
    assert some.example_ids.tolist() == [9, 7]
    assert some.weights.tolist() == [3, 1]
    assert some.scores.tolist() == make(k=k).scores[[2, 0]].tolist()
    assert some.preference.tolist() == make(k=k).preference[[2, 0]].tolist()


def test_selecting_and_joining_order_does_not_matter():
    batch = make(k=3)
    whole = batch.select([1, 2])
    for b in range(2):
        assert rows_of(batch.select([1 + b])) == rows_of(whole.select([b]))


def test_selecting_nothing_or_what_is_not_there():
    assert len(make().select([])) == 0
    with pytest.raises(IndexError):
        make().select([3])
    with pytest.raises(ValueError, match="not a mask"):
        make().select(torch.tensor([True, False, True]))


def test_moving_to_a_device_moves_every_tensor():
    moved = make().to("meta")
    tensors = [v for v in (*vars(moved).values(), *moved.text.values()) if isinstance(v, torch.Tensor)]
    assert {v.device.type for v in tensors} == {"meta"}
    assert len(tensors) == 9
