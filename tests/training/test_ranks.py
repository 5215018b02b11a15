"""A process that dies leaves the others with a sentence and not with a traceback of gloo's."""

import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist

from diffalign.training.ranks import RankLost, together

FORK = multiprocessing.get_context("fork")


def die_or_notice(rank, place):
    """Add twice over two processes; the second one dies in between."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=2)
    dist.all_reduce(torch.ones(1))
    if rank == 1:
        os._exit(9)
    try:
        with together(2):
            dist.all_reduce(torch.ones(1))
    except RankLost as error:
        (place / "said").write_text(str(error))


def test_the_death_of_another_process_is_one_sentence(tmp_path):
    jobs = [FORK.Process(target=die_or_notice, args=(rank, tmp_path)) for rank in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
        job.kill()
    assert "Another process of this run has ended" in (tmp_path / "said").read_text()
    assert "--resume latest goes on" in (tmp_path / "said").read_text()


@pytest.mark.parametrize(("processes", "text"), [(2, "CUDA error"), (1, "Connection closed by peer")])
def test_other_errors_stay_what_they_are(processes, text):
    with pytest.raises(RuntimeError, match=text) as caught, together(processes):
        raise RuntimeError(text)
    assert not isinstance(caught.value, RankLost)
