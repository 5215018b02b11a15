import pytest

from tests.training.toy import forget_accelerator


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    forget_accelerator()
    yield
    forget_accelerator()
