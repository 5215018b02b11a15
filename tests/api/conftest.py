"""A finished LoRA run, tiny scorers, and the configuration of a tiny run."""

from tests.e2e.conftest import cache_dir, content, pairs_folder
from tests.jobs.conftest import lora_run, scorer_folders

__all__ = ["cache_dir", "content", "lora_run", "pairs_folder", "scorer_folders"]
