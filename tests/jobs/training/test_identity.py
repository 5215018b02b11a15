"""What may change when a run is resumed, key by key: all else is refused by its name."""

import pytest

from diffalign import config as configuration
from diffalign.config import Config
from diffalign.data import open_pairs
from diffalign.jobs.training import assemble, identity
from diffalign.training import checkpoint
from diffalign.training.batching import BatchPlan
from tests.e2e.pairs import write_pairs

# Where things are, what is written down, how fast it goes, how many at a time.
MAY_CHANGE = {
    "lora.export_kohya",
    *("data.cache_dir", "data.train_data_dir", "data.dataset_name", "data.prompts_file", "data.annotations_file"),
    *("data.vae_encode_batch_size", "inversion.batch_size", "rollout.sample_batch_size", "rollout.decode_batch_size"),
    *("train.output_dir", "train.checkpointing_steps", "train.checkpoints_total_limit", "train.resume_from_checkpoint"),
    *("train.push_to_hub", "train.hub_model_id", "train.hub_private", "train.max_train_steps"),
    *("train.train_batch_size", "train.gradient_accumulation_steps", "train.global_batch_size"),
    *("train.gradient_checkpointing", "train.enable_xformers_memory_efficient_attention", "train.allow_tf32"),
    *("validation.validation_steps", "validation.validation_prompts", "validation.seeds"),
    *("validation.num_inference_steps", "validation.guidance_scale"),
    *("logging.logging_steps", "logging.report_to", "logging.tracker_name"),
    *("performance.compile", "performance.cuda_graphs", "performance.channels_last", "performance.attention"),
    *("performance.fused_lora", "performance.fused_activations", "performance.share_text", "performance.kernels"),
    "performance.sampling_buckets",
    # Of densities that are not in use.
    *("denoising.logit_mean", "denoising.logit_std", "denoising.mode_scale", "denoising.timesteps"),
    # The model itself is compared, not where it lies.
    *("model.pretrained_model_name_or_path", "model.pretrained_vae_model_name_or_path", "model.unet_init"),
    *("model.revision", "model.variant", "model.prediction_type"),
}
NAMED_OTHERWISE = {
    **dict.fromkeys(
        ("performance.pure_bf16", "performance.reference_dtype", "performance.sampling_dtype"), "train.precision"
    ),
    **dict.fromkeys(("denoising.timestep_density", "denoising.timestep_shift"), "denoising.timestep_sampling"),
}
KEYS = [
    f"{section}.{key}"
    for section, field in Config.model_fields.items()
    if section != "objective"
    for key in field.annotation.model_fields
]


@pytest.fixture(scope="module")
def made(tiny_sdxl, tmp_path_factory):
    """Return a configuration with every section in use, the model and the data."""
    folder = tmp_path_factory.mktemp("data")
    config = configuration.check(
        {
            "model": {"pretrained_model_name_or_path": str(tiny_sdxl)},
            "data": {"train_data_dir": str(write_pairs(folder / "pairs", 4)), "cache_dir": str(folder / "cache")},
            "objective": {"name": "dpo"},
            "train": {"mixed_precision": "bf16"},
        }
    )
    return config, assemble.load_backbone(config), open_pairs(config.data.train_data_dir)


def identified(config, made):
    return identity.run_identity(config, BatchPlan(4, 1, 1), *made[1:])


def other(value, key):
    """Return another value than `value`, of its kind."""
    if key in ("denoising.timestep_density", "denoising.timestep_shift"):
        return {"uniform": "logit_normal", None: 2.0}[value]
    if key == "data.annotations_file":
        return None  # its content is part of the identity: tested below
    if key.endswith(".scorer"):
        return "hpsv2" if value is None else None  # it must exist: code of a user's own would be part of the identity
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return [*value, "other"] if isinstance(value, list) else f"{value} other"


def with_key(config, name, value):
    section, _, key = name.partition(".")
    block = getattr(config, section)
    return config.model_copy(update={section: block.model_copy(update={key: value})})


def differing(first, second, path, parameters):
    """Return the names in the refusal of a checkpoint of `first` by a run of `second`."""
    saved = checkpoint.save(path, 1, {}, {}, first, None)
    try:
        checkpoint.load(saved, parameters, second)
    except checkpoint.CheckpointError as error:
        return [line.split(":")[0].strip() for line in str(error).splitlines()[1:-1]]
    return []


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("objective", ["dpo", "spo"])
def test_every_key_is_free_or_named(made, objective, tmp_path):
    config = made[0].model_copy(update={"objective": {"name": objective}})
    before, free, refused = identified(config, made), set(), {}
    for name in KEYS:
        section, _, key = name.partition(".")
        changed = with_key(config, name, other(getattr(getattr(config, section), key), name))
        found = differing(before, identified(changed, made), tmp_path, {})
        free |= set() if found else {name}
        refused |= {name: found} if found else {}
    offline = {name for name in KEYS if name.startswith("rollout.")} if objective == "dpo" else set()
    assert free == MAY_CHANGE | offline
    for name, found in refused.items():
        assert NAMED_OTHERWISE.get(name, name) in found
        assert len(found) == 1 or name in ("model.tune", "train.mixed_precision")  # on which others depend


def test_the_objective_is_compared_whole(made, tmp_path):
    before = identified(made[0], made)
    changed = made[0].model_copy(update={"objective": {"name": "dpo", "beta": 1.0, "label_smoothing": 0.0}})
    assert differing(before, identified(changed, made), tmp_path, {}) == ["objective.beta"]


def test_what_is_compared_by_content(made, tmp_path):
    config, _, source = made
    before = identified(config, made)
    for key, value in {"prediction_type": "v_prediction", "unet_init": None}.items():
        changed = with_key(config, f"model.{key}", value)
        backbone = assemble.load_backbone(changed)
        if key == "unet_init":
            next(backbone.denoiser.parameters()).data.add_(1)
        after = identified(changed, (config, backbone, source))
        assert differing(before, after, tmp_path, {}) == ["model.denoiser"]
    smaller = open_pairs(config.data.train_data_dir, max_samples=2)
    assert differing(before, identified(config, (*made[:2], smaller)), tmp_path, {}) == ["data.content"]
    (tmp_path / "scores").write_text("1")
    annotated = with_key(config, "data.annotations_file", str(tmp_path / "scores"))
    assert differing(before, identified(annotated, made), tmp_path, {}) == ["data.annotations"]


def test_the_length_counts_where_the_learning_rate_depends_on_it(made, tmp_path):
    cosine = with_key(made[0], "optimizer.lr_scheduler", "cosine")
    longer = with_key(cosine, "train.max_train_steps", 2000)
    assert differing(identified(cosine, made), identified(longer, made), tmp_path, {}) == ["train.max_train_steps"]
    batch = identity.run_identity(made[0], BatchPlan(4, 2, 1), *made[1:])
    assert differing(identified(made[0], made), batch, tmp_path, {}) == ["train.global_batch_size"]


def test_checkpoints_that_name_what_has_become_free(made, tmp_path):
    now = identified(made[0], made)
    before = {**now, "lora": {**now["lora"], "export_kohya": True}, "inversion": {**now["inversion"], "batch_size": 8}}
    assert differing(before, now, tmp_path, {}) == []
