"""Which code of a user's own a run depends on: its objective, and the scorers that it learns from."""

from diffalign import objectives
from diffalign.config import Config
from diffalign.jobs.scoring import scorers
from diffalign.jobs.training.human_labels import LABELS
from diffalign.jobs.training.online_judges import LATENT_REWARD


def sources(config: Config) -> dict[str, dict[str, str]]:
    """Return hashes of that code, and of the weights such scorers are given, under "own_code" by key; {} for none.

    Raises:
        ConfigError: a plug-in cannot be loaded, or is not what it should be.
    """
    found = {}
    if own := objectives.plugin(config.objective_name):
        found["objective"] = own.source
    wanted = {"rollout.scorer": config.rollout.scorer if config.is_online else None, "data.scorer": config.data.scorer}
    for key, entry in wanted.items():
        if entry is not None and entry.partition("=")[0].strip() not in (LABELS, LATENT_REWARD):
            found |= {f"{key} {name}": source for name, source in scorers.sources(entry).items()}
    return {"own_code": found} if found else {}
