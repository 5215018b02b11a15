"""Who captions and who perturbs: what the options of `diffalign caption` mean."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.captioning import LEVELS, Captioner, ChatServer, Dipper, DroppedWords, ImageToText, Missing, Question
from diffalign.captioning.base import Answered
from diffalign.captioning.chat_server import paraphrase
from diffalign.captioning.dipper import DIPPER
from diffalign.captioning.http_answers import Endpoint
from diffalign.data import RowError
from diffalign.errors import ConfigError, DataError, suggestion
from diffalign.filtering.files import weights_identity
from diffalign.jobs.devices import pick_device, pick_dtype
from diffalign.places import local
from diffalign.shapes.captioner import describe

PROMPT, SHAPES, DROPPING, PARAPHRASER = "prompt", "shapes", "words", "dipper"
MODELS = {"blip": "Salesforce/blip-image-captioning-large", "model": None}  # name: what it is without =PATH
SIDES = ("loser", "winner")
MEMO = ".digests.sqlite"
KEY = "OPENAI_API_KEY"  # the name that other programs give it


@dataclass(frozen=True, kw_only=True)
class Request:
    """Say which pairs are captioned, by whom, and whether the loser's caption is perturbed."""

    source: str
    out: Path
    captioner: str  # NAME[=PATH], a folder or hub id, the address of a server, shapes or prompt
    template: str | None = None
    model: str | None = None  # of a server
    new_tokens: int = 64
    perturb: str | None = None  # of LEVELS
    perturb_with: str = PARAPHRASER
    perturb_model: str | None = None  # of a server
    perturb_of: str = "loser"  # whose caption the loser gets, perturbed
    seed: int = 0
    concurrency: int = 8
    retries: int = 4
    timeout: float = 120.0
    split: str = "train"
    limit: int | None = None
    root: Path | None = None
    strict: bool = False
    batch_size: int = 8
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self):
        if self.out.suffix != ".parquet":
            raise ConfigError(f"--out {self.out} must end in .parquet: pictures and captions go into one table.")
        if self.perturb is not None and self.perturb not in LEVELS:
            hint = suggestion(self.perturb, LEVELS)
            raise ConfigError(f'Unknown level "{self.perturb}" of --perturb.{hint} Use {", ".join(LEVELS)}.')
        if self.perturb_of not in SIDES:
            raise ConfigError(f'--perturb-of must be {" or ".join(SIDES)}, got "{self.perturb_of}".')
        how = (self.perturb_with, self.perturb_model, self.perturb_of)
        if self.perturb is None and how != (PARAPHRASER, None, "loser"):
            raise ConfigError("--perturb-with, --perturb-model and --perturb-of belong to --perturb: say how strongly.")
        asks_server = _is_address(self.captioner) or _is_address(self.perturb_with)
        if (self.model and not asks_server) or (self.perturb_model and not _is_address(self.perturb_with)):
            raise ConfigError("--model and --perturb-model name what a server has: give its address (http://...) too.")
        if self.captioner == PROMPT and self.perturb is None:
            raise ConfigError("--with prompt says of both pictures the same, as DPO does: add --perturb weak (DCPO-p).")
        for name in ("batch_size", "new_tokens", "concurrency"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}.")
        if self.retries < 0 or self.timeout <= 0:
            raise ConfigError(f"--retries must be >= 0 and --timeout > 0, got {self.retries} and {self.timeout:g}.")

    @property
    def parts(self) -> Path:
        """Return the folder of what was answered."""
        return self.out.with_name(f"{self.out.name}.parts")


def _is_address(wanted: str) -> bool:
    return wanted.startswith(("http://", "https://"))


class _World(Captioner):
    """Ask the captioner of the embedded world."""

    asked = SHAPES

    def answers(self, questions: Sequence[Question]) -> Iterator[Answered]:
        """Yield them one by one."""
        for question in questions:
            try:
                yield [(question, describe(question.image.load(), question.text))]
            except RowError:
                raise
            except DataError as error:  # the prompt is no sentence of this world
                yield [(question, Missing(str(error)))]


def captioner_of(request: Request) -> Captioner | None:
    """Return who is asked; None stands for the prompt itself."""
    wanted = request.captioner
    if wanted in (PROMPT, SHAPES):
        if request.template is not None:
            raise ConfigError(f"--with {wanted} asks nobody: leave out --template.")
        return None if wanted == PROMPT else _World()
    settings: dict[str, Any] = {"template": request.template, "new_tokens": request.new_tokens}
    if _is_address(wanted):
        return _server(wanted, request, model=request.model, **settings)
    path = str(local(_path_of(wanted)))
    return ImageToText(path, **_machine(path, request), **settings)


def _path_of(wanted: str) -> str:
    """Return the folder or hub id that blip, blip=PATH, model=PATH or PATH means."""
    name, _, path = wanted.partition("=")
    path = path or MODELS.get(name)
    if path and name in MODELS:
        return path
    if "=" not in wanted and name not in MODELS and ("/" in wanted or local(wanted).is_dir()):
        return wanted
    raise ConfigError(
        f'Unknown captioner "{wanted}".{suggestion(name, [*MODELS, SHAPES, PROMPT])} Use blip, blip=PATH or model=PATH '
        "(a folder or hub id), the address of a server such as http://127.0.0.1:8000/v1, shapes or prompt."
    )


def perturber_of(request: Request) -> Captioner | None:
    """Return who perturbs the loser's caption; None where nobody does."""
    if request.perturb is None:
        return None
    wanted = request.perturb_with
    if _is_address(wanted):
        asked = {"template": paraphrase(request.perturb), "new_tokens": request.new_tokens}
        return _server(wanted, request, model=request.perturb_model or request.model, **asked)
    name, _, path = wanted.partition("=")
    if wanted == DROPPING:
        return DroppedWords(request.perturb, request.seed)
    if name != PARAPHRASER:
        hint = suggestion(name, (PARAPHRASER, DROPPING))
        raise ConfigError(f'Unknown "{wanted}" of --perturb-with.{hint} Use dipper[=PATH], words or an address.')
    path = str(local(path or DIPPER))
    return Dipper(request.perturb, path, seed=request.seed, **_machine(path, request))


def _server(address: str, request: Request, **asked: Any) -> ChatServer:
    settings = {"timeout": request.timeout, "retries": request.retries}
    return ChatServer(Endpoint(address, os.environ.get(KEY), **settings), concurrency=request.concurrency, **asked)


def _machine(path: str, request: Request) -> dict[str, Any]:
    device = pick_device(request.device)
    return {
        "device": device,
        "dtype": pick_dtype(request.dtype, device),
        "weights": weights_identity(path, request.parts / MEMO),
        "batch_size": request.batch_size,
    }
