"""`--negative-lora`: what the command line says about Diffusion-NPO's negative network, and how models get it."""

from dataclasses import dataclass, replace

from torch import nn

from diffalign.errors import ModelError, UserError
from diffalign.evaluation.negative_branch import check_scales, with_negative_branch
from diffalign.jobs.drawing import checkpoints, models


@dataclass(frozen=True)
class Negative:
    """Name the negative network and say how much of it and of the policy make the unconditional branch."""

    spec: str  # a LoRA, a UNet, a run or its checkpoint
    negative_scale: float = 1.0  # >= 0
    policy_scale: float = 1.0  # >= 0

    def __post_init__(self) -> None:
        """Raise UserError for scales no network can be made with."""
        check_scales(**{"--negative-scale": self.negative_scale, "--policy-scale": self.policy_scale})

    @classmethod
    def of(cls, spec: str | None, negative_scale: float, policy_scale: float) -> "Negative | None":
        """Return what the options say; None without a network.

        Raises:
            UserError: scales of a network that is not given.
        """
        if spec is not None:
            return cls(spec, negative_scale, policy_scale)
        for name, value in (("--negative-scale", negative_scale), ("--policy-scale", policy_scale)):
            if value != 1:
                raise UserError(f"{name} {value:g} has no effect without --negative-lora. Give that or leave it out.")
        return None

    def check(self, guidance_scale: float, wanted: list[models.Model]) -> None:
        """Raise UserError if the network or a scale has no effect on the pictures, before anything is loaded."""
        if guidance_scale <= 1:
            raise UserError(
                f"--negative-lora needs guidance: --guidance-scale must be above 1, got {guidance_scale:g}. "
                "5 to 7.5 is usual."
            )
        if self.policy_scale != 1 and all(model.weights is None for model in wanted):
            names = ", ".join(model.name for model in wanted)
            raise UserError(
                f"--policy-scale {self.policy_scale:g} has no effect: {names} is a whole model, which nothing is known "
                "to have been trained from. Leave it out, or give a LoRA, a UNet or a run as MODEL."
            )


class NegativeLoader(models.ModelLoader):
    """Load models whose unconditional branch is another network's."""

    def __init__(self, negative: Negative, base: str | None = None, torch_dtype: str = "auto", device: str = "auto"):
        """Look for the negative network; nothing is loaded yet.

        Raises:
            ModelError: there is no LoRA, UNet or run of that name.
        """
        super().__init__(torch_dtype, device)
        self.negative = negative
        (self._model,) = models.resolve([negative.spec], base, base_is_used=True)
        if self._model.weights is None:
            raise ModelError(
                f'--negative-lora "{negative.spec}" is no LoRA, UNet or training run on this machine. Give one, e.g. '
                "runs/npo; for one on the hub give --base too."
            )

    def load(self, model: models.Model) -> models.LoadedModel:
        """Return the model with its negative branch; the one returned before must not be used any more."""
        loaded = super().load(model)
        negative = self.negative
        pipeline = with_negative_branch(
            loaded.pipeline,
            self._model.weights,
            negative_scale=negative.negative_scale,
            policy_scale=negative.policy_scale,
            base=loaded.backbone.denoiser,
            source_base=lambda: self._base_of_negative(model, loaded),
            load=checkpoints.load_weights,
        )
        scales = f"{negative.negative_scale!r}, policy x {negative.policy_scale!r}"
        return replace(loaded, pipeline=pipeline, note=f", negative branch {self._model.name} x {scales}")

    def _base_of_negative(self, model: models.Model, loaded: models.LoadedModel) -> nn.Module:
        if self._model.base == model.base:
            return loaded.backbone.denoiser
        return models.load_base(self._model, self.torch_dtype).denoiser


def loader(
    negative: Negative | None, base: str | None = None, torch_dtype: str = "auto", device: str = "auto"
) -> models.ModelLoader:
    """Return a loader of models, with the negative branch if one is asked for."""
    if negative is None:
        return models.ModelLoader(torch_dtype, device)
    return NegativeLoader(negative, base, torch_dtype, device)
