"""The command line: thin wrappers that read arguments and call `diffalign.jobs`."""

from diffalign.cli.app import app, main

__all__ = ["app", "main"]
