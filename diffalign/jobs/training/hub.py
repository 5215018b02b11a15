"""`train.push_to_hub`: who we are is asked before training, the result goes up after it, and nothing is lost if not."""

import shlex
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from rich.console import Console

from diffalign.backbones.files import LORA_FILE
from diffalign.config import Config
from diffalign.errors import ConfigError

# Of a run. Checkpoints, logs, and the configuration with the paths of this machine stay here.
UPLOADED = ("README.md", LORA_FILE, "unet/*", "kohya/*.safetensors", "validation/*.png")
LOGIN = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def check(config: Config) -> str | None:
    """Return the repository a run will be uploaded to, None if it will not be.

    Raises:
        ConfigError: nobody is logged in, the token may not write, the hub does not answer, or the name is none.
    """
    if not config.train.push_to_hub:
        return None
    if constants.HF_HUB_OFFLINE:
        raise ConfigError("train.push_to_hub needs the hub, and HF_HUB_OFFLINE is set. Unset one of the two.")
    try:
        user = HfApi().whoami()
    except Exception as error:  # no token, a wrong one, no network: each has an error of its own, and so has httpx
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"train.push_to_hub: the hub does not know who you are ({reason}). {LOGIN}.") from error
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ConfigError(f"train.push_to_hub: this token may only read. {LOGIN}.")
    name = config.train.hub_model_id or Path(config.train.output_dir).resolve().name
    repo = name if "/" in name else f"{user['name']}/{name}"
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f'train.hub_model_id: "{repo}" is no name for a repository. {error}') from error
    return repo


def push(config: Config, repo: str, console: Console) -> bool:
    """Upload the result of a run; tell whether it is there. A failure is reported with the command that repeats it."""
    train, api = config.train, HfApi()
    try:
        api.create_repo(repo, private=train.hub_private or None, exist_ok=True)
        message = f"{config.objective_name}, {train.max_train_steps} steps"
        where = {"repo_id": repo, "folder_path": train.output_dir, "allow_patterns": list(UPLOADED)}
        api.upload_folder(**where, commit_message=message)
    except Exception as error:  # whatever it is, hours of training are on disk and must not end in a traceback
        private = ["--private"] if train.hub_private else []
        command = ["hf", "upload", repo, train.output_dir, ".", *private]
        command += [word for pattern in UPLOADED for word in ("--include", pattern)]
        said = (
            f"Not uploaded to {repo}: {' '.join(str(error).split())[:300]}\nThe run is complete. Upload it later with:"
        )
        console.print(f"{said}\n{shlex.join(command)}", markup=False, highlight=False, soft_wrap=True)
        return False
    console.print(f"Uploaded: {api.endpoint}/{repo}", markup=False, highlight=False, soft_wrap=True)
    return True
