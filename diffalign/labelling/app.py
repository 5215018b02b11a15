"""The page for raters, and the few addresses behind it. Nothing it sends says which model drew what."""

import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from diffalign.errors import DataError, UserError
from diffalign.labelling.agreement import agreement_of
from diffalign.labelling.store import Votes

PAGE = Path(__file__).with_name("page.html")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}


def create_app(votes: Votes, allowed_hosts: Sequence[str] = ("127.0.0.1", "localhost", "[::1]")) -> Any:
    """Return the FastAPI application over a file of votes.

    Args:
        votes: tasks and where votes go.
        allowed_hosts: names a browser may call this machine by. Others are refused, so that no page on the web can
            reach a server on loopback under a name of its own.
    """
    try:
        from fastapi import Body, FastAPI, HTTPException, Query, Request
        from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
        from starlette.middleware.trustedhost import TrustedHostMiddleware
    except ImportError as error:
        raise UserError('`diffalign label` needs FastAPI and uvicorn: pip install "diffalign[label]".') from error

    Rater = Annotated[str, Query(min_length=1, max_length=64)]
    app = FastAPI(title="diffalign label", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts), www_redirect=False)

    @app.exception_handler(DataError)
    def explain(_: Request, error: DataError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=404)

    @app.get("/")
    def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf8"), headers={"Cache-Control": "no-store"})

    @app.get("/api/next")
    def following(rater: Rater) -> dict[str, Any]:
        return _state(votes, rater)

    @app.get("/api/image/{number}/{side}")
    def image(number: int, side: Literal["left", "right"], rater: Rater) -> FileResponse:
        file = votes.file_of(number, rater, side)
        if not file.is_file():
            raise HTTPException(404, f"The picture of task {number} is gone: it was moved or deleted.")
        kind = _TYPES.get(file.suffix.lower(), "application/octet-stream")
        return FileResponse(file, media_type=kind, headers={"Cache-Control": "no-store"})

    @app.post("/api/vote")
    def vote(
        request: Request,
        task: Annotated[int, Body()],
        rater: Annotated[str, Body(min_length=1, max_length=64)],
        choice: Annotated[Literal["left", "right", "tie"], Body()],
        seconds: Annotated[float | None, Body(ge=0)] = None,
    ) -> dict[str, Any]:
        _require_json(request, HTTPException)
        votes.vote(task, rater, choice, seconds)
        return _state(votes, rater)

    @app.post("/api/undo")
    def undo(request: Request, rater: Annotated[str, Body(min_length=1, max_length=64, embed=True)]) -> dict[str, Any]:
        _require_json(request, HTTPException)
        return _state(votes, rater, votes.undo(rater))

    @app.get("/api/agreement")
    def agreement() -> dict[str, Any]:
        found = agreement_of(votes.table())
        return {key: None if value != value else value for key, value in found.items() if key != "kappa"}

    return app


def serve(votes: Votes, host: str = "127.0.0.1", port: int = 8000, announce: Callable[[str], None] = print) -> None:
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


def _state(votes: Votes, rater: str, again: int | None = None) -> dict[str, Any]:
    """Return what the page shows next: a task, or none when all are judged."""
    number = votes.next_task(rater) if again is None else again
    done, total = votes.progress(rater)
    prompt = None if number is None else votes.task(number).prompt
    return {"task": number, "prompt": prompt, "done": done, "total": total}


def _require_json(request: Any, exception: type[Exception]) -> None:
    """Refuse what a form on another page could send without this server's leave."""
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise exception(415, "Send JSON.")
