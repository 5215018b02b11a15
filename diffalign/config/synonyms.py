"""What other trainers, and people, call the keys of this one."""

from typing import NamedTuple


class Meant(NamedTuple):
    """The key that is meant by another name; `value`, if that is not the one given; `note`, if there is more to it."""

    key: str
    value: str | None = None
    note: str = ""


_EPOCHS = (
    "Steps are counted, not epochs: max_train_steps = epochs x examples / (train_batch_size x "
    "gradient_accumulation_steps x processes)."
)
_RESUME = "The option --resume latest does the same."
_FILES = "Files go into data.train_data_dir."

# By key: the names that mean it.
_NAMES = {
    "model.pretrained_model_name_or_path": (
        "base_model model model_id model_name model_name_or_path model_path pretrained_model pretrained_model_path "
        "pretrained_model_name checkpoint ckpt"
    ),
    "model.pretrained_vae_model_name_or_path": "vae vae_path vae_model pretrained_vae vae_name_or_path",
    "model.unet_init": "unet unet_path transformer transformer_path sft_model init_from pretrained_unet",
    "lora.rank": "lora_rank lora_r network_dim lora_dim r",
    "lora.lora_alpha": "alpha network_alpha",
    "lora.lora_dropout": "network_dropout",
    "lora.lora_target_modules": "target_modules lora_layers lora_modules",
    "data.dataset_name": "dataset hub_dataset",
    "data.train_data_dir": "data data_dir data_path train_data train_dir train_file dataset_dir dataset_path data_file",
    "data.prompts_file": "prompt_file prompts prompts_path prompt_path",
    "data.dataset_split_name": "split dataset_split split_name",
    "data.dataset_config_name": "dataset_config config_name subset",
    "data.caption_column": "text_column prompt_column caption_key",
    "data.image_columns": "image_column",
    "data.resolution": "image_size img_size size res image_resolution",
    "data.proportion_empty_prompts": "caption_dropout caption_dropout_rate cfg_dropout prompt_dropout text_dropout",
    "data.max_train_samples": "max_samples num_train_samples num_samples limit",
    "data.random_flip": "flip hflip horizontal_flip",
    "objective.name": "objective loss loss_type method algorithm train_method",
    "objective.beta": "beta_dpo beta_mapo dpo_beta",
    "denoising.snr_gamma": "min_snr_gamma",
    "denoising.timestep_density": "weighting_scheme timestep_sampling timestep_type density",
    "denoising.timestep_shift": "shift flow_shift flow_schedule_shift discrete_flow_shift",
    "optimizer.name": "optimizer optim optimizer_type optimizer_name",
    "optimizer.learning_rate": "lr learningrate step_size base_lr",
    "optimizer.lr_scheduler": "scheduler lr_scheduler_type lr_schedule schedule",
    "optimizer.lr_warmup_steps": "warmup warmup_steps num_warmup_steps lr_warmup",
    "optimizer.adam_weight_decay": "weight_decay wd",
    "optimizer.adam_beta1": "beta1",
    "optimizer.adam_beta2": "beta2",
    "optimizer.adam_epsilon": "eps epsilon adam_eps",
    "optimizer.max_grad_norm": "grad_clip clip_grad clip_grad_norm gradient_clip gradient_clip_val max_norm grad_norm",
    "optimizer.use_ema": "ema",
    "train.output_dir": "output out out_dir output_path save_dir save_path results_dir",
    "train.train_batch_size": (
        "batch_size batch bs bsz per_device_batch_size per_device_train_batch_size per_gpu_train_batch_size "
        "micro_batch_size local_batch_size"
    ),
    "train.gradient_accumulation_steps": "accumulation accumulate accumulation_steps grad_accum grad_accum_steps "
    "grad_acc gradient_accumulation accumulate_grad_batches gas",
    "train.global_batch_size": "total_batch_size effective_batch_size",
    "train.max_train_steps": "steps num_steps max_steps train_steps num_train_steps training_steps total_steps iters "
    "iterations num_iterations max_iterations",
    "train.mixed_precision": "precision amp dtype weight_dtype",
    "train.gradient_checkpointing": "activation_checkpointing grad_checkpointing use_gradient_checkpointing",
    "train.enable_xformers_memory_efficient_attention": "xformers use_xformers enable_xformers",
    "train.allow_tf32": "tf32",
    "train.checkpointing_steps": "save_steps save_every save_freq checkpoint_steps checkpoint_every",
    "train.checkpoints_total_limit": "save_total_limit max_checkpoints keep_checkpoints",
    "validation.validation_steps": "eval_steps val_steps validation_epochs eval_every sample_every",
    "validation.validation_prompts": "validation_prompt val_prompt val_prompts eval_prompts sample_prompts",
    "validation.seeds": "validation_seed validation_seeds num_validation_images",
    "rollout.scorer": "reward reward_fn reward_model reward_function",
    "rollout.samples_per_prompt": "num_generations group_size num_image_per_prompt num_images_per_prompt",
    "rollout.collect": "rollout",
    "logging.report_to": "logger log_with loggers tracker trackers",
    "logging.logging_steps": "log_every log_steps log_freq log_interval",
    "logging.tracker_name": "project project_name wandb_project tracker_project_name",
}
SYNONYMS = {name: Meant(key) for key, names in _NAMES.items() for name in names.split()} | {
    **dict.fromkeys(
        ("epochs", "num_epochs", "max_epochs", "n_epochs", "num_train_epochs", "max_train_epochs"),
        Meant("train.max_train_steps", value="STEPS", note=_EPOCHS),
    ),
    **dict.fromkeys(("resume", "resume_from", "resume_path"), Meant("train.resume_from_checkpoint", note=_RESUME)),
    "dataset": Meant("data.dataset_name", note=_FILES),
    "fp16": Meant("train.mixed_precision", value="fp16"),
    "bf16": Meant("train.mixed_precision", value="bf16"),
    **dict.fromkeys(("use_8bit_adam", "adam8bit", "use_8bit"), Meant("optimizer.name", value="adamw_8bit")),
    "use_adafactor": Meant("optimizer.name", value="adafactor"),
    **dict.fromkeys(("use_lora", "lora"), Meant("model.tune", value="lora")),
    **dict.fromkeys(("full_finetune", "full_finetuning", "full"), Meant("model.tune", value="full")),
    "sft": Meant("objective.name", value="sft"),
    "wandb": Meant("logging.report_to", value="wandb"),
    "tensorboard": Meant("logging.report_to", value="tensorboard"),
    "min_snr": Meant("denoising.snr_weighting", value="min_snr"),
}
