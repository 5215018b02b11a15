"""The words that settings choose from and that the code behind them answers to.

They stand apart from that code because settings are checked before torch is imported: a typo is answered at once.
"""

# Noisings that are random alone, those that need a network (denoising/inversion.py), and the noise that each picture
# was drawn from (denoising/initial_noise.py).
INVERSIONS = ("ddim_inversion", "renoise_inversion")
GENERATING = "generating"
NOISINGS = ("shared", "independent", *INVERSIONS, GENERATING)

# How often each level of noise is met (denoising/densities.py).
DENSITIES = ("uniform", "logit_normal", "mode", "list")

# How transitions are collected: k candidates a step from one latent; pairs of whole trajectories; single trajectories.
ROLLOUTS = ("step_pairs", "trajectory_pairs", "trajectories")
# Through which steps a reward is differentiated: one, whose prediction is judged; the last; those from a random one on.
BACKPROPAGATIONS = ("one_step", "last_steps", "random_steps")
# With what rewards are compared (rollout/advantages.py), and how strongly winners are guided (rollout/guidance.py).
ADVANTAGES = ("per_prompt", "group", "batch")
GUIDANCE_SCHEDULES = ("constant", "variance")

# How the weights of a frozen base are kept (backbones/quantization.py), from the most bits to the fewest.
QUANTIZATIONS = ("none", "int8", "fp8", "nf4")

# What of a UNet is adapted by a LoRA: its blocks, and the linear layers of its attention.
BLOCKS = ("down", "mid", "up")
ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
