"""A process has its own accelerate, generators and flags back, whatever happened meanwhile."""

import pytest
import torch
from accelerate import Accelerator

from diffalign.training.undisturbed import undisturbed
from tests.training.toy import forget_accelerator


@pytest.fixture(autouse=True)
def _forget():
    forget_accelerator()
    yield
    forget_accelerator()


def test_the_users_accelerator_works_on():
    mine = Accelerator(gradient_accumulation_steps=3)
    with undisturbed():
        inner = Accelerator(mixed_precision="bf16")
        assert inner.mixed_precision == "bf16"
        assert inner.gradient_accumulation_steps == 1
    assert (mine.mixed_precision, mine.gradient_accumulation_steps) == ("no", 3)
    assert Accelerator().mixed_precision == "no"


def test_nothing_is_left_for_the_next_run():
    with undisturbed():
        Accelerator(mixed_precision="bf16")
    assert Accelerator(mixed_precision="no").mixed_precision == "no"


def test_an_error_puts_everything_back_too():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with pytest.raises(KeyboardInterrupt), undisturbed():
        _interrupt(torch.manual_seed(1))
    assert torch.equal(torch.rand(1), expected)


def _interrupt(_):
    raise KeyboardInterrupt


@pytest.mark.gpu
def test_flags_and_generators_of_gpus_are_put_back():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.cuda.manual_seed_all(5)
    expected = torch.rand(1, device="cuda")
    torch.cuda.manual_seed_all(5)
    with undisturbed():
        torch.backends.cuda.matmul.allow_tf32 = not before
        torch.cuda.manual_seed_all(1)
    assert torch.backends.cuda.matmul.allow_tf32 is before
    assert torch.equal(torch.rand(1, device="cuda"), expected)
