"""Sampling while training: candidates, trajectories, their scores, and the transitions to learn from."""

from diffalign.rollout.advantages import PerPromptTracker, normalised
from diffalign.rollout.differentiable import RewardGradients
from diffalign.rollout.guidance import WinnerGuidance
from diffalign.rollout.human_labels import HumanLabels
from diffalign.rollout.latent_reward import LatentReward, judged_levels
from diffalign.rollout.prompts import PromptBatch, PromptEncoder
from diffalign.rollout.sampler import Evaluations, Sampler
from diffalign.rollout.scoring import PictureScorer, StepScorer
from diffalign.rollout.selection import Selection, best_and_worst, dynamic_threshold, pareto, probability_gap
from diffalign.rollout.steps import StepPairs
from diffalign.rollout.trajectories import Trajectories, TrajectoryPairs

__all__ = [
    "Evaluations",
    "HumanLabels",
    "LatentReward",
    "PerPromptTracker",
    "PictureScorer",
    "PromptBatch",
    "PromptEncoder",
    "RewardGradients",
    "Sampler",
    "Selection",
    "StepPairs",
    "StepScorer",
    "Trajectories",
    "TrajectoryPairs",
    "WinnerGuidance",
    "best_and_worst",
    "dynamic_threshold",
    "judged_levels",
    "normalised",
    "pareto",
    "probability_gap",
]
