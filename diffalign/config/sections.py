"""The sections of a configuration that say what is aligned, on which data, and how the loss is made."""

from typing import Literal

from pydantic import Field, model_validator

from diffalign.training.settings import Settings
from diffalign.vocabulary import BLOCKS, DENSITIES, NOISINGS, QUANTIZATIONS


class ModelSettings(Settings):
    """Which model is aligned."""

    pretrained_model_name_or_path: str
    """A hub id or a diffusers folder of a supported family (docs/families.md), or one .safetensors file of SD1.5 or
    SDXL; a transformer in one file is given as unet_init."""
    pretrained_vae_model_name_or_path: str | None = None
    """Another VAE, such as madebyollin/sdxl-vae-fp16-fix."""
    unet_init: str | None = None
    """Start policy and reference from this UNet or transformer (its folder, one with unet/ or transformer/, or a
    .safetensors file such as flux1-dev.safetensors), e.g. an SFT model."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    variant: str | None = None
    """fp16 reads the weights in *.fp16.safetensors; null: those without such a word."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """Only for checkpoints whose scheduler config is wrong; null takes what the model says."""
    zero_terminal_snr: bool = False
    """Rescale the noise schedule so that the last level is pure noise (Lin et al. 2023)."""
    tune: Literal["lora", "full"] = "lora"
    """What is trained: adapters beside the frozen UNet (section lora), or all of the UNet."""
    quantization: Literal[QUANTIZATIONS] = "none"
    """Keep the frozen linear layers of a LoRA run in few bits: int8 or fp8 halve a bfloat16 base, nf4 quarters it
    (docs/quantization.md)."""


class LoraSettings(Settings):
    """The adapter, if model.tune is lora. Names are those of diffusers' scripts."""

    rank: int = Field(8, ge=1)
    """Columns of B in the update B A of a layer's weights."""
    lora_alpha: float | None = Field(None, gt=0)
    """The update is scaled by lora_alpha / rank; null means rank."""
    lora_target_modules: list[str] | None = Field(None, min_length=1)
    """Names of the layers to adapt, or the ends of their names; null: those of the attention, of a UNet [to_k, to_q,
    to_v, to_out.0], of other families see docs/families.md."""
    blocks: list[Literal[BLOCKS]] = Field(list(BLOCKS), min_length=1)
    """Which blocks of the UNet are adapted. Without down, the reference computes them for the policy too."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that an input of an adapter is dropped in training."""
    export_kohya: bool = False
    """Also write the LoRA in the kohya layout that ComfyUI and A1111 read."""


class DataSettings(Settings):
    """Where the preference pairs come from and how they are prepared."""

    dataset_name: str | None = None
    """A data set on the hub with Pick-a-Pic's columns, e.g. yuvalkirstain/pickapic_v2."""
    train_data_dir: str | None = None
    """A parquet file, a folder of them, a .jsonl file, or a folder with w/ and l/."""
    prompts_file: str | None = None
    """Prompts, one a line or a table, for objectives that draw the images themselves (such as spo)."""
    root: str | None = None
    """Images that the data names by path may lie in this folder too; null: only beside the data."""
    dataset_config_name: str | None = None
    """Which configuration of the data set, where it has several."""
    dataset_split_name: str = "train"
    """Which split of the data set, or of the files in train_data_dir."""
    format: Literal["pickapic", "jsonl", "folders", "lists", "singles", "rankings"] | None = None
    """null tells it from the files. lists: ranked images of a prompt; rankings: pairs of these; singles: images with a
    label each."""
    image_columns: list[str] | None = Field(None, min_length=2, max_length=2)
    """null: jpg_0 and jpg_1, in .jsonl files image_0 and image_1."""
    label_columns: list[str] = Field(["label_0", "label_1"], min_length=2, max_length=2)
    """Columns that say how much each image is preferred, in [0, 1]; the second may be missing."""
    caption_column: str = "caption"
    """Column with the prompt."""
    image_caption_columns: list[str] | None = Field(None, min_length=2, max_length=2)
    """Columns with a caption of each image (DCPO), e.g. [caption_0, caption_1]; null: caption_column for both."""
    list_labels: Literal["win_rate", "as_is"] = "win_rate"
    """Of ranked lists: the share of comparisons an image wins over all scorers (Syn-Pic), or the scores themselves."""
    max_train_samples: int | None = Field(None, ge=1)
    """Use only the first so many examples; null: all."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do about rows that cannot be used: stop at the first, or count, list and skip them."""
    resolution: int = Field(512, ge=8)
    """Side of the square that images are resized and cropped to, in pixels."""
    random_crop: bool = False
    """Crop at random instead of in the middle; needs cache_latents: false."""
    random_flip: bool = True
    """Flip both images of a pair together, half of the time."""
    proportion_empty_prompts: float = Field(0.0, ge=0, le=1)
    """Share of pairs trained without their caption, so that guidance keeps working (0.2 in Diffusion-DPO)."""
    long_prompts: Literal["truncate", "chunk"] = "truncate"
    """What becomes of captions beyond the 75 tokens that CLIP reads. truncate: they are cut, as in diffusers; chunk:
    they are read as a whole, 75 tokens at a time, as in A1111 (SD1.5 and SDXL; the encoders of others read on)."""
    cache_latents: bool = True
    """Encode images and prompts once, into cache_dir, instead of at every step."""
    cache_dir: str = "cache"
    """Folder of the cache; runs on the same data share it."""
    cache_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Precision that latents and encoded prompts are kept in."""
    cache_text_dtype: Literal["float16", "bfloat16", "float32"] | None = None
    """Precision that encoded prompts are kept in; null: of SD3, FLUX.1 and Z-Image with a LoRA in half precision, that
    of the denoiser (train.mixed_precision), else cache_dtype (docs/caches.md)."""
    vae_encode_batch_size: int = Field(8, ge=1)
    """Images encoded at a time."""

    annotations_file: str | None = None
    """A parquet with scores (as `diffalign score` writes for pairs) or weights, joined by example_id."""
    scorer: str | None = None
    """A reward model, NAME or NAME=PATH, that scores all pairs before training; with annotations_file, whose scores.
    NAME may be code of your own, e.g. my_judges.py:Brightness (docs/plugins.md)."""
    preference_from: Literal["label", "scores"] = "label"
    """scores: P(winner preferred) = sigmoid((s_w - s_l) / (max - min)), as in SmPO."""
    score_range: list[float] | None = Field(None, min_length=2, max_length=2)
    """[min, max] of the scores; null takes those of the data."""
    label_source: Literal["human", "reward"] = "human"
    """reward: of two images the one with the higher score is the winner."""
    flip_labels: float = Field(0.0, ge=0, le=1)
    """Probability that the label of a pair is flipped, for studies of label noise."""
    desirable: Literal["won_once", "never_lost", "drop_mixed"] = "won_once"
    """Which images of pairs count as desirable for an objective of single images (KTO)."""
    positive_ratio: float | None = Field(None, gt=0, lt=1)
    """Share of desirable images in what KTO sees (0.8 in the paper); null: as they come."""
    curriculum_stages: int | None = Field(None, ge=2)
    """Easy to hard: start with the pairs of the largest score gap and add a share of harder ones at every stage."""
    curriculum_steps: int = Field(500, ge=1)
    """Optimizer steps of a stage."""

    @model_validator(mode="after")
    def _scores_for_what_needs_them(self) -> "DataSettings":
        wanted = {
            "data.preference_from: scores": self.preference_from == "scores",
            "data.label_source: reward": self.label_source == "reward",
            "data.curriculum_stages": self.curriculum_stages is not None,
        }
        for key, set_ in wanted.items():
            if set_ and self.scorer is None and self.annotations_file is None:
                raise ValueError(f"{key} needs data.scorer (a reward model) or data.annotations_file (its scores)")
        if self.score_range is not None and self.score_range[0] >= self.score_range[1]:
            raise ValueError(f"data.score_range must be [min, max] with min < max, got {self.score_range}")
        return self

    @model_validator(mode="after")
    def _one_source(self) -> "DataSettings":
        if [self.dataset_name, self.train_data_dir, self.prompts_file].count(None) != 2:
            raise ValueError(
                "Give exactly one of data.dataset_name (hub) and data.train_data_dir (local files); null clears one. "
                "Objectives that draw the images themselves take data.prompts_file instead"
            )
        if self.random_crop and self.cache_latents:
            raise ValueError("data.random_crop needs data.cache_latents: false (a cached latent has one crop)")
        return self


class DenoisingSettings(Settings):
    """How latents are noised."""

    noising: Literal[NOISINGS] | None = None
    """null: that of the objective's paper. shared: one noise for both images of a pair, as in the code of
    Diffusion-DPO; independent: its Eq. 14; ddim_inversion: InPO; renoise_inversion: SmPO; generating: what each picture
    was drawn from (PNAPO; flow models, data of `diffalign generate`)."""
    timestep_low: int = Field(0, ge=0)
    """Smallest timestep that is drawn, of 1000 in all known models; 0 is the least noise."""
    timestep_high: int | None = Field(None, ge=1)
    """Timesteps are drawn from [timestep_low, timestep_high) as timestep_density says; null means all. Of whole
    trajectories (d3po, ddpo, dpok), which are drawn to the end, only the steps that start there are learnt from."""

    timestep_density: Literal[DENSITIES] = "uniform"
    """How often each noise level is met. logit_normal and mode: those of SD3's paper, most often in the middle; list:
    only denoising.timesteps."""
    logit_mean: float = 0.0
    """Of logit_normal: above 0 towards noise."""
    logit_std: float = Field(1.0, gt=0)
    """Of logit_normal: how wide it is."""
    mode_scale: float = Field(1.29, ge=-1, le=1.75)
    """Of mode: above 0 favours the middle, below 0 the ends."""
    timesteps: list[float] | None = Field(None, min_length=1)
    """Of list: timesteps from 0 (clean) to 1000 (noise), each met equally often, e.g. [801, 694, 548, 338]."""
    timestep_shift: float | None = Field(None, gt=0)
    """Flow models: move levels s to k s / (1 + (k - 1) s), towards noise where k > 1; null: as the model's scheduler
    does for pictures of this resolution; 1: not at all."""

    snr_weighting: Literal["none", "min_snr"] = "none"
    """min_snr: multiply every error by min(SNR, snr_gamma) / SNR (Hang et al. 2023)."""
    snr_gamma: float = Field(5.0, gt=0)
    """Of min_snr: the signal-to-noise ratio from which on errors count less."""

    @model_validator(mode="after")
    def _some_timestep(self) -> "DenoisingSettings":
        low, high = self.timestep_low, self.timestep_high
        if high is not None and low >= high:
            raise ValueError(f"denoising.timestep_low must be below denoising.timestep_high, got {low} and {high}")
        if (self.timesteps is None) == (self.timestep_density == "list"):
            raise ValueError("denoising.timesteps goes with denoising.timestep_density: list, and is needed there")
        return self


class InversionSettings(Settings):
    """How latents are inverted, if the noising is ddim_inversion or renoise_inversion."""

    num_steps: int = Field(10, ge=1)
    """Levels of the whole schedule."""
    mode: Literal["exact", "official_compat"] = "exact"
    """exact ends every image on its own timestep; official_compat: as the authors' code."""
    grid: Literal["stride", "proportional"] = "stride"
    """Of exact: steps of T / num_steps, 5.5 of 10 needed on average; or num_steps equal parts of [0, t]."""
    eta: float = Field(0.0, ge=0)
    """Fresh noise in every step; 0.1 in InPO's code, not mentioned in its paper."""
    network: Literal["policy", "reference"] = "policy"
    """What is inverted: the policy as it is now (the authors), or the reference (an approximation)."""
    renoise_iterations: int = Field(1, ge=1)
    """Of renoise_inversion; each doubles the evaluations once more."""
    renoise_at: Literal["source", "destination"] = "source"
    """Timestep of these evaluations: source as in SmPO's code, destination as in ReNoise."""
    batch_size: int = Field(32, ge=1)
    """Images in one pass without gradient."""


class ReferenceSettings(Settings):
    """Whether the reference stays where training started."""

    update: Literal["fixed", "ema", "refresh"] = "fixed"
    """ema: a moving average of the policy; refresh: a copy of it, renewed every so many steps."""
    decay: float = Field(0.999, ge=0, lt=1)
    """Of ema: how much of the average an update keeps."""
    every: int = Field(1, ge=1)
    """Of ema and refresh: optimizer steps between two updates."""
    cache_draws: int | None = Field(None, ge=1)
    """K: noise, timestep, flip and caption drop of an example repeat after K visits, and the reference's error at each
    is computed once and kept in data.cache_dir, for later epochs and other runs (docs/reference-cache.md)."""


class LossSettings(Settings):
    """Terms and rules that go with any objective."""

    anchor_weight: float = Field(0.0, ge=0)
    """Adds anchor_weight * mean (policy - reference)^2 of the predictions."""
    sft_weight: float = Field(0.0, ge=0)
    """Adds sft_weight * denoising error of the winner."""
    auto_beta: float | None = Field(None, gt=0, lt=0.5)
    """Choose beta so that a pair of average margin keeps this gradient factor, e.g. 0.2; null: objective.beta."""
    auto_beta_decay: float = Field(0.99, ge=0, lt=1)
    """Of auto_beta: how much of the moving average of margins an optimizer step keeps."""
    auto_beta_limits: list[float] = Field([1.0, 1e5], min_length=2, max_length=2)
    """Smallest and largest beta that auto_beta may choose."""
