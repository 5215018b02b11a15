"""The configuration of a whole training run."""

from typing import Any

from diffalign import objectives
from diffalign.config.performance import PerformanceSettings
from diffalign.config.rollout import RolloutSettings
from diffalign.config.sections import (
    DataSettings,
    DenoisingSettings,
    InversionSettings,
    LoraSettings,
    LossSettings,
    ModelSettings,
    ReferenceSettings,
)
from diffalign.training.settings import (
    LoggingSettings,
    OptimizerSettings,
    Settings,
    TrainSettings,
    ValidationSettings,
)


class Config(Settings):
    """A whole training run."""

    model: ModelSettings
    lora: LoraSettings = LoraSettings()
    data: DataSettings
    objective: dict[str, Any]
    denoising: DenoisingSettings = DenoisingSettings()
    inversion: InversionSettings = InversionSettings()
    reference: ReferenceSettings = ReferenceSettings()
    loss: LossSettings = LossSettings()
    rollout: RolloutSettings = RolloutSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    train: TrainSettings = TrainSettings()
    validation: ValidationSettings = ValidationSettings()
    performance: PerformanceSettings = PerformanceSettings()
    logging: LoggingSettings = LoggingSettings()

    @property
    def objective_name(self) -> str:
        """Return the name of the objective."""
        return self.objective["name"]

    @property
    def entry(self) -> objectives.Entry:
        """Return what is known of the objective without building it."""
        return objectives.entry(self.objective_name)

    @property
    def needs(self) -> frozenset[str]:
        """Return what the objective asks of the engine; built only where that follows from its hyperparameters."""
        return self.build_objective().needs if self.entry.needs is None else self.entry.needs

    @property
    def noising(self) -> str:
        """Return how latents are noised: what is set, else what the objective's paper does."""
        return self.denoising.noising or self.entry.noising

    @property
    def is_online(self) -> bool:
        """Tell whether the objective learns from what the policy samples while it trains."""
        return self.entry.layout in ("transition", "reward")

    @property
    def pure_bf16(self) -> bool:
        """Return whether the network runs in bfloat16 without autocast: only frozen weights can."""
        return self.performance.pure_bf16 and self.train.mixed_precision == "bf16" and self.model.tune == "lora"

    @property
    def collect(self) -> str:
        """Return how an online objective samples: what is set, else what its paper does."""
        return self.rollout.collect or self.entry.rollout

    @property
    def shared_noise(self) -> bool:
        """Tell whether trajectories of a prompt start from the same noise: what is set, else what D3PO and DDPO do."""
        chosen = self.rollout.shared_noise
        return self.collect == "trajectory_pairs" if chosen is None else chosen

    def build_objective(self) -> "objectives.Objective":
        """Build the objective from its block; this imports torch."""
        return objectives.load(**self.objective)
