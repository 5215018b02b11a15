"""What FSDP2 and DeepSpeed cannot run is refused with what to use instead."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from diffalign import config as configuration
from diffalign.errors import ConfigError
from diffalign.jobs import distributed
from diffalign.training import sharding


def launched(processes: int = 2, kind: DistributedType = DistributedType.MULTI_GPU):
    """Return what is asked of an accelerator."""
    return SimpleNamespace(num_processes=processes, distributed_type=kind)


LAUNCHES = sorted((Path(__file__).parents[2] / "configs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("file", LAUNCHES, ids=lambda file: file.stem)
def test_accelerate_reads_the_shipped_launches(file):
    read = load_config_from_file(str(file))  # refuses keys it does not know
    assert read.num_processes == 8 * read.num_machines
    assert (read.distributed_type == DistributedType.FSDP) == (file.stem == "fsdp2")
    assert read.mixed_precision == "no"  # train.mixed_precision decides


@pytest.fixture
def fsdp(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")


REFUSED = [
    ("reference.update=ema", r'reference\.update "ema"'),
    ("denoising.noising=ddim_inversion", r'denoising\.noising "ddim_inversion"'),
    ("optimizer.name=adafactor", r'optimizer\.name "adafactor" does not work with FSDP2\. Use adamw, or launch with'),
    ("performance.compile=full", r'performance\.compile "full"'),
]


@pytest.mark.parametrize(("override", "message"), REFUSED)
def test_what_needs_the_whole_network_is_refused_under_fsdp(fsdp, override, message):
    config = configuration.load("configs/tiny/dpo.yaml", [override])
    with pytest.raises(ConfigError, match=message):
        distributed.check(config, launched())
    distributed.check(config, launched(processes=1))  # nothing is sharded


def test_objectives_that_sample_are_refused_under_fsdp(fsdp):
    with pytest.raises(ConfigError, match=r'objective\.name "spo" does not work with FSDP2'):
        distributed.check(configuration.load("configs/tiny/spo.yaml"), launched())


@pytest.mark.parametrize("name", ["dpo", "dpo-full", "kto", "rankdpo", "mapo"])
def test_objectives_on_given_images_pass(fsdp, name):
    distributed.check(configuration.load(f"configs/tiny/{name}.yaml"), launched())


def test_ddp_runs_everything():
    for name in ("spo", "inpo", "dpo"):
        distributed.check(configuration.load(f"configs/tiny/{name}.yaml"), launched())


def test_deepspeed_is_refused_with_the_way_out():
    config = configuration.load("configs/tiny/dpo.yaml")
    with pytest.raises(ConfigError, match=r"DeepSpeed is not supported.*fsdp2\.yaml"):
        distributed.check(config, launched(kind=DistributedType.DEEPSPEED))


@pytest.mark.parametrize(
    ("variable", "value", "precision", "message"),
    [
        ("FSDP_VERSION", "1", "no", "FSDP version 1 is not supported"),
        ("FSDP_OFFLOAD_PARAMS", "true", "no", "fsdp_offload_params: true is not supported"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "no", "fsdp_cpu_ram_efficient_loading: true is not"),
        ("FSDP_OFFLOAD_PARAMS", "false", "fp16", 'mixed_precision "fp16" does not work with FSDP'),
    ],
)
def test_other_kinds_of_fsdp_are_refused(fsdp, monkeypatch, variable, value, precision, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=message):
        sharding.check(precision)
