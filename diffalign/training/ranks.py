"""What the other processes of a run say when one of them has died."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import DistError

from diffalign.errors import UserError

SIGNS = ("by peer", "Broken pipe", "Socket closed", "gloo/transport")  # gloo has no error of its own


class RankLost(UserError):
    """Report that another process of the run has ended."""


@contextmanager
def together(processes: int) -> Iterator[None]:
    """Turn what a collective raises when a process of the run is gone into one sentence, and how to go on.

    Raises:
        RankLost: such an error.
    """
    try:
        yield
    except RuntimeError as error:
        gone = isinstance(error, DistError) or any(sign in str(error) for sign in SIGNS)
        if processes == 1 or not gone:
            raise
        raise RankLost(
            "Another process of this run has ended, so no step can be finished: its own message, or the system's "
            "(out of memory?), says why. The same command with --resume latest goes on from the last checkpoint."
        ) from error
