"""What `diffalign show` says of each objective."""

import pytest

from diffalign import objectives
from diffalign.jobs.about import describe_objective


@pytest.mark.parametrize("name", objectives.built_in())
def test_every_objective_is_explained(name):
    told = describe_objective(name)
    assert told.startswith(f"{name}: ")
    assert all(f"  {key} = " in told for key in objectives.fields(name))
    assert f"objectives/{name}.py" in told
