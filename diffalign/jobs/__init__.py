"""What the commands do: each file wires the layers below into one job, from a configuration to files on disk."""

from diffalign.jobs.moved import find_moved

find_moved()
