import pytest

from diffalign.errors import ConfigError
from diffalign.training.batching import BatchPlan
from diffalign.training.settings import TrainSettings


def test_the_global_batch_is_the_product():
    plan = BatchPlan.of(TrainSettings(train_batch_size=4, gradient_accumulation_steps=3), world_size=2)
    assert plan.global_batch_size == 24
    assert plan.describe() == "4 pairs x 3 accumulation steps x 2 processes = 24 pairs per optimizer step"


def test_accumulation_follows_from_the_global_batch():
    plan = BatchPlan.of(TrainSettings(train_batch_size=4, global_batch_size=2048), world_size=8)
    assert plan == BatchPlan(4, 64, 8)
    assert plan.global_batch_size == 2048


def test_a_global_batch_that_cannot_be_split_names_the_nearest_that_can():
    settings = TrainSettings(train_batch_size=4, global_batch_size=64)
    with pytest.raises(ConfigError) as caught:
        BatchPlan.of(settings, world_size=6)
    assert str(caught.value) == (
        "train.global_batch_size 64 is not divisible by world_size 6 x train_batch_size 4 (= 24). "
        "Use 48 or 72, or change train_batch_size."
    )


def test_a_global_batch_below_one_pass_has_only_a_larger_neighbour():
    with pytest.raises(ConfigError, match=r"\(= 24\)\. Use 24, or change train_batch_size"):
        BatchPlan.of(TrainSettings(train_batch_size=4, global_batch_size=16), world_size=6)


@pytest.mark.parametrize("plan", [BatchPlan(1, 1, 1), BatchPlan(3, 2, 4), BatchPlan(1, 4, 3), BatchPlan(2, 1, 5)])
def test_ranks_and_micro_batches_partition_the_batch(plan):
    indices = [100 - i for i in range(plan.global_batch_size)]
    micro_batches = [plan.micro_batches(indices, rank) for rank in range(plan.world_size)]
    assert [len(of_rank) for of_rank in micro_batches] == [plan.gradient_accumulation_steps] * plan.world_size
    assert {len(micro) for of_rank in micro_batches for micro in of_rank} == {plan.train_batch_size}
    assert sorted(i for of_rank in micro_batches for micro in of_rank for i in micro) == sorted(indices)


def test_two_ranks_see_the_micro_batches_of_one():
    indices = list(range(8))
    alone, together = BatchPlan(2, 4, 1), BatchPlan(2, 2, 2)
    assert alone.micro_batches(indices, 0) == together.micro_batches(indices, 0) + together.micro_batches(indices, 1)


def test_both_ways_to_accumulate_are_refused():
    with pytest.raises(ValueError, match="global_batch_size: null switches it off"):
        TrainSettings(global_batch_size=8, gradient_accumulation_steps=2)
