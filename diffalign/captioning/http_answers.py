"""One JSON request to a server, repeated while the failure may pass."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from diffalign.errors import ConfigError, ModelError

PASSING = (408, 409, 425, 429)  # and all of 500 and above
DENIED = (401, 403)
MOST_BYTES = 16 << 20  # of an answer
LONGEST_WAIT = 60.0
FIRST_WAIT = 1.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class PassingError(Exception):
    """Report a failure that may be over the next time: no connection, a full server, half an answer."""

    def __init__(self, detail: str, wait: float = 0.0, is_there: bool = True):
        super().__init__(detail)
        self.wait, self.is_there = wait, is_there  # seconds that the server asks for; it answered something


class RefusedError(Exception):
    """Report that the server will not answer this request, whenever it is made."""


class Endpoint:
    """Send JSON to the paths below an address.

    Args:
        address: e.g. http://127.0.0.1:8000/v1.
        key: is sent as a bearer token, if there is one.
        timeout: seconds to wait for a server that says nothing.
        retries: how often a request is repeated, with pauses of 1, 2, 4 ... seconds or as the server says.
        pause: waits so many seconds.
    """

    def __init__(
        self,
        address: str,
        key: str | None = None,
        *,
        timeout: float = 120.0,
        retries: int = 4,
        pause: Callable[[float], Any] = time.sleep,
    ):
        found = urlsplit(address)
        if found.scheme not in ("http", "https") or not found.hostname:
            raise ConfigError(f'"{address}" is no address of a server; expected e.g. http://127.0.0.1:8000/v1.')
        self.address, self.key = address.rstrip("/"), key
        self.timeout, self.retries, self.pause = timeout, retries, pause
        local = [urllib.request.ProxyHandler({})] if found.hostname in LOOPBACK else []
        self._opener = urllib.request.build_opener(_NoRedirect, *local)

    def send(self, path: str, body: dict[str, Any] | None, read: Callable[[Any], Any]) -> Any:
        """Return what `read` makes of the answer to a POST of `body` (None: to a GET), once there is one.

        Raises:
            PassingError: no answer that can be read, however often it was asked for.
            RefusedError: the server refuses this request.
            ModelError: the server lets nobody in.
        """
        for attempt in range(self.retries):
            try:
                return self.once(path, body, read)
            except PassingError as error:
                self.pause(min(max(error.wait, FIRST_WAIT * 2**attempt), LONGEST_WAIT))
        return self.once(path, body, read)

    def once(self, path: str, body: dict[str, Any] | None, read: Callable[[Any], Any]) -> Any:
        """Do as `send`, without a second attempt."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.address}/{path}", data, headers)
        try:
            with self._opener.open(request, timeout=self.timeout) as answer:
                return read(json.loads(answer.read(MOST_BYTES)))
        except urllib.error.HTTPError as error:
            raise self._of_status(error) from error
        except (OSError, http.client.HTTPException) as error:
            raise PassingError(f"{type(error).__name__}: {getattr(error, 'reason', error)}", is_there=False) from error
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise PassingError(f"an answer that cannot be read ({type(error).__name__}: {error})") from error

    def _of_status(self, error: urllib.error.HTTPError) -> Exception:
        detail = f"status {error.code}: {_said(error)}"
        if error.code in DENIED:
            return ModelError(f"{self.address} lets nobody in ({detail}). Set OPENAI_API_KEY to a key that it knows.")
        if error.code in PASSING or error.code >= 500:
            wait = error.headers.get("Retry-After", "")
            return PassingError(detail, float(wait) if wait.isdigit() else 0.0)
        return RefusedError(detail)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follow no redirection: a key is for one server."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _said(error: urllib.error.HTTPError) -> str:
    try:
        return " ".join(error.read(2000).decode(errors="replace").split())[:300] or str(error.reason)
    except (OSError, http.client.HTTPException):
        return str(error.reason)
