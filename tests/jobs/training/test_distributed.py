"""What FSDP2 and DeepSpeed cannot run is refused with what to use instead."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from diffalign import config as configuration
from diffalign.errors import ConfigError
from diffalign.jobs.training import distributed, preflight
from diffalign.training import sharding, zero


def launched(processes: int = 2):
    """Return what is asked of an accelerator."""
    return SimpleNamespace(num_processes=processes)


LAUNCHES = sorted((Path(__file__).parents[3] / "configs" / "accelerate").glob("*.yaml"))
KINDS = {"fsdp2": DistributedType.FSDP, "deepspeed-zero2": DistributedType.DEEPSPEED}


@pytest.mark.parametrize("file", LAUNCHES, ids=lambda file: file.stem)
def test_accelerate_reads_the_shipped_launches(file):
    read = load_config_from_file(str(file))  # refuses keys it does not know
    assert read.num_processes == 8 * read.num_machines
    assert read.distributed_type == KINDS.get(file.stem, DistributedType.MULTI_GPU)
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
    (
        "performance.reference_dtype=fp8 performance.compile=regional",
        r'performance\.reference_dtype "fp8" does not work with FSDP2\. Use policy',
    ),
]


@pytest.mark.parametrize(("override", "message"), REFUSED)
def test_what_needs_the_whole_network_is_refused_under_fsdp(fsdp, override, message):
    config = configuration.load("configs/tiny/dpo.yaml", override.split())
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


@pytest.fixture
def deepspeed(monkeypatch):
    """Launch with DeepSpeed, installed or not: settings are read by accelerate."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(zero, "is_deepspeed_available", lambda: True)


@pytest.mark.parametrize(
    ("config", "override", "message"),
    [
        ("dpo", "optimizer.name=adafactor", r'optimizer\.name "adafactor" does not work with DeepSpeed\. Use adamw'),
        ("dpo", "performance.compile=full", r'performance\.compile "full"'),
        ("draft", "", r'objective\.name "draft" does not work with DeepSpeed'),
    ],
)
def test_what_its_engine_cannot_do_is_refused_under_deepspeed(deepspeed, config, override, message):
    config = configuration.load(f"configs/tiny/{config}.yaml", override.split())
    with pytest.raises(ConfigError, match=message):
        distributed.check(config, launched())
    distributed.check(config, launched(processes=1))


@pytest.mark.parametrize("name", ["spo", "inpo", "dpo", "dpo-full"])
def test_every_process_of_deepspeed_samples_alone(deepspeed, name):
    distributed.check(configuration.load(f"configs/tiny/{name}.yaml"), launched())


@pytest.mark.parametrize(
    ("variable", "value", "precision", "message"),
    [
        ("ZERO_STAGE", "3", "no", r"zero_stage 3 is not supported: 1 and 2 are.*fsdp2\.yaml"),
        ("ZERO_STAGE", "0", "no", r"zero_stage 0 is not supported"),
        ("OFFLOAD_OPTIMIZER_DEVICE", "cpu", "no", 'offload_optimizer_device "cpu" is not supported'),
        ("ZERO_STAGE", "1", "fp16", 'mixed_precision "fp16" does not work with DeepSpeed'),
    ],
)
def test_other_kinds_of_deepspeed_are_refused(deepspeed, monkeypatch, variable, value, precision, message):
    monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{variable}", value)
    with pytest.raises(ConfigError, match=message):
        zero.check(precision)


def test_deepspeed_that_is_not_installed_is_named(deepspeed, monkeypatch):
    monkeypatch.setattr(zero, "is_deepspeed_available", lambda: False)
    with pytest.raises(ConfigError, match=r'pip install "diffalign\[deepspeed\]"'):
        zero.check("no")


def test_accelerate_sees_ddp_while_an_accelerator_is_made(deepspeed):
    with zero.as_ddp():
        assert not zero.asked()
    assert zero.asked()


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


def test_processes_that_would_each_train_alone_are_refused(monkeypatch):
    """As accelerate would let them where it finds no device and was not told of the CPUs."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"2 processes were launched, but each would train alone.*ACCELERATE_USE_CPU"):
        distributed.require_all(launched(processes=1))
    distributed.require_all(launched(processes=2))
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="4 processes"):
        distributed.require_all(launched(processes=1))
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE")
    distributed.require_all(launched(processes=1))


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    (fault,) = preflight.launch(configuration.load("configs/tiny/dpo.yaml", ["logging.report_to=[]"]))
    assert "4 processes were launched on a machine of 2 GPU(s)" in str(fault)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert not list(preflight.launch(configuration.load("configs/tiny/dpo.yaml", ["logging.report_to=[]"])))
