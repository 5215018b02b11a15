"""The page for raters, and the few addresses behind it. Nothing it sends says which model drew what."""

import io
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from diffalign.errors import DataError, UserError
from diffalign.labelling.agreement import agreement_of
from diffalign.labelling.database import Database
from diffalign.labelling.rankings import MOST, Rankings, as_votes
from diffalign.labelling.store import Votes
from reward_models.pictures import PictureError, decode, format_of, read

PAGE = Path(__file__).with_name("page.html")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SHOWN = ("PNG", "JPEG", "WEBP", "GIF")  # formats that every browser shows


def create_app(votes: Votes | Rankings, allowed_hosts: Sequence[str] = ("127.0.0.1", "localhost", "[::1]")) -> Any:
    """Return the FastAPI application over a file of votes.

    Args:
        votes: tasks and where votes go: pairs to choose from, or lists to rank.
        allowed_hosts: names a browser may call this machine by. Others are refused, so that no page on the web can
            reach a server on loopback under a name of its own.
    """
    try:
        from fastapi import FastAPI, Request
        from fastapi.responses import HTMLResponse, JSONResponse
        from starlette.middleware.trustedhost import TrustedHostMiddleware
    except ImportError as error:
        raise UserError('`diffalign label` needs FastAPI and uvicorn: pip install "diffalign[label]".') from error

    app = FastAPI(title="diffalign label", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts), www_redirect=False)

    @app.exception_handler(DataError)
    def explain(_: Request, error: DataError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=404)

    @app.get("/")
    def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf8"), headers={"Cache-Control": "no-store"})

    _add_progress(app, votes)
    (_add_lists if isinstance(votes, Rankings) else _add_pairs)(app, votes)
    return app


def serve(
    votes: Votes | Rankings, host: str = "127.0.0.1", port: int = 8000, announce: Callable[[str], None] = print
) -> None:
    """Serve the page until interrupted.

    Args:
        votes: tasks and where votes go.
        host: where to listen; loopback reaches this machine only.
        port: 0 takes any free one.
        announce: is told the address once it can be reached.

    Raises:
        UserError: FastAPI or uvicorn is missing, or the address cannot be had.
    """
    hosts = ("127.0.0.1", "localhost", "[::1]") if host in LOOPBACK else ("*",)
    app = create_app(votes, hosts)
    import uvicorn

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(128)  # from here on browsers wait instead of being refused
    except (OSError, OverflowError) as error:
        listening.close()
        raise UserError(f"Cannot listen on {host}, port {port} ({error}). Choose another with --port.") from error
    announce(f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/")
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


def _add_progress(app: Any, votes: Votes | Rankings) -> None:
    """Add the addresses that pairs and lists share: what comes next, what came before, how far raters agree."""
    from fastapi import Query

    Rater = Annotated[str, Query(min_length=1, max_length=64)]

    @app.get("/api/next")
    def following(rater: Rater) -> dict[str, Any]:
        return _state(votes, rater)

    @app.get("/api/back")
    def back(rater: Rater, task: int | None = None) -> dict[str, Any]:
        previous = votes.previous(rater, task)
        return _state(votes, rater, task if previous is None else previous)

    @app.get("/api/agreement")
    def agreement() -> dict[str, Any]:
        table = votes.table()
        found = agreement_of(as_votes(table) if isinstance(votes, Rankings) else table)
        return {key: None if value != value else value for key, value in found.items() if key != "kappa"}


def _add_pairs(app: Any, votes: Votes) -> None:
    """Add the addresses of two pictures to choose from."""
    from fastapi import Body, Request
    from fastapi.responses import Response

    @app.get("/api/image/{number}/{side}")
    def image(number: int, side: Literal["left", "right"], rater: str) -> Response:
        return _picture(votes.file_of(number, rater, side), number)

    @app.post("/api/vote")
    def vote(
        request: Request,
        task: Annotated[int, Body()],
        rater: Annotated[str, Body(min_length=1, max_length=64)],
        choice: Annotated[Literal["left", "right", "tie"], Body()],
        seconds: Annotated[float | None, Body(ge=0)] = None,
    ) -> dict[str, Any]:
        _require_json(request)
        votes.vote(task, rater, choice, seconds)
        return _state(votes, rater)


def _add_lists(app: Any, rankings: Rankings) -> None:
    """Add the addresses of k pictures to rank."""
    from fastapi import Body, Request
    from fastapi.responses import Response

    @app.get("/api/image/{number}/{place}")
    def image(number: int, place: int, rater: str) -> Response:
        return _picture(rankings.file_of(number, rater, place), number)

    @app.post("/api/rank")
    def rank(
        request: Request,
        task: Annotated[int, Body()],
        rater: Annotated[str, Body(min_length=1, max_length=64)],
        ranks: Annotated[list[int], Body(max_length=MOST)],
        seconds: Annotated[float | None, Body(ge=0)] = None,
    ) -> dict[str, Any]:
        _require_json(request)
        rankings.rank(task, rater, ranks, seconds)
        return _state(rankings, rater)


def _picture(file: Path, number: int) -> Any:
    """Return a picture, by what it is and not by its name; of kinds that browsers do not show, as PNG."""
    from fastapi.responses import Response

    try:
        content = read(file)
        picture, kind = decode(content), format_of(content)
    except (OSError, PictureError) as error:
        why = "is gone: it was moved or deleted" if isinstance(error, FileNotFoundError) else "cannot be shown"
        raise DataError(f"The picture of task {number} {why}.") from error
    if kind not in _SHOWN:
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        content, kind = stream.getvalue(), "PNG"
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    return Response(content, media_type=f"image/{kind.lower()}", headers=headers)


def _state(votes: Database, rater: str, again: int | None = None) -> dict[str, Any]:
    """Return what the page shows next: a task, with the rater's answer if there is one; none when all are judged."""
    number = votes.next_task(rater) if again is None else again
    done, total = votes.progress(rater)
    state = {
        "task": number,
        "prompt": None if number is None else votes.prompt_of(number),
        "answer": None if number is None else votes.answer_of(number, rater),
        "done": done,
        "total": total,
    }
    if isinstance(votes, Rankings) and number is not None:
        state["pictures"] = len(votes.task(number).files)
    return state


def _require_json(request: Any) -> None:
    """Refuse what a form on another page could send without this server's leave."""
    from fastapi import HTTPException

    if not request.headers.get("content-type", "").startswith("application/json"):
        raise HTTPException(415, "Send JSON.")
