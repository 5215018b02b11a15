"""Scripts from before jobs had wings find their modules."""

import importlib

import pytest

from diffalign.jobs import moved


@pytest.mark.parametrize("name", sorted(moved.NAMES))
def test_the_old_name_is_the_very_module(name):
    module = importlib.import_module(moved.NAMES[name])
    assert importlib.import_module(name) is module
    assert module.__spec__.name == module.__name__ == moved.NAMES[name]


def test_they_are_imported_from_the_package_too():
    from diffalign.jobs import examples, models
    from diffalign.jobs.drawing import models as now

    assert models is now
    assert examples.__name__ == "diffalign.jobs.training.examples"
    with pytest.raises(ImportError):
        importlib.import_module("diffalign.jobs.nothing")
