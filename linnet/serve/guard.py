"""What every request passes before it is read: host, key, and the size of its body.

DNS rebinding lets a web page reach a server on localhost under the page's own name; a server that
asks for no key therefore answers only to names of the machine itself.
"""

import asyncio
import hmac
import ipaddress
import logging
import secrets
from collections.abc import AsyncIterator
from hashlib import sha256

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from linnet.serve.errors import APIError, unavailable
from linnet.serve.settings import ServerSettings

_log = logging.getLogger(__name__)

GUARDED = ("/v1", "/tokenize", "/detokenize", "/metrics")
"""Paths that need a key; the page, its files, the documents and health checks do not."""
_MAX_DISCARDED_BYTES = 16 * 2**20
_SECURITY_HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}


class Guard:
    """ASGI middleware that refuses what must not reach the application."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        self._keys = [_digest(key) for key in settings.api_keys]
        self._buffered_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(12)}"
        has_started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                headers = MutableHeaders(scope=message)
                # OpenAI's and Anthropic's names for it.
                headers["x-request-id"] = headers["request-id"] = request_id
                headers.update(_SECURITY_HEADERS)
            await send(message)

        try:
            self._check_host(scope)
            self._check_key(scope)
            await self._serve(scope, receive, send_with_headers)
        except APIError as error:
            await error.response(scope["path"])(scope, receive, send_with_headers)
        except Exception:
            _log.exception("request %s failed", request_id)
            if not has_started:
                error = APIError(500, f"the server failed; see its log for request {request_id}")
                await error.response(scope["path"])(scope, receive, send_with_headers)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the whole body, then let the application answer."""
        reader = _BodyReader(self, scope, receive)
        try:
            body = await reader.read()
            await self._app(scope, _replay(body, receive), send)
        finally:
            self._buffered_bytes -= reader.num_bytes

    def _check_host(self, scope: Scope) -> None:
        if self._settings.allowed_hosts is None:
            return
        hosts = Headers(scope=scope).getlist("host")
        name = _host_name(hosts[0]) if len(hosts) == 1 else ""
        if not (is_local_name(name) or name in self._settings.allowed_hosts):
            raise APIError(
                403,
                f"this server does not answer to the host {name!r}; start it with "
                "--allowed-host to let it",
                code="host_not_allowed",
            )

    def _check_key(self, scope: Scope) -> None:
        if not self._keys or not scope["path"].startswith(GUARDED):
            return
        headers = Headers(scope=scope)
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")
        digest = _digest(given.strip())
        # Every key is compared, so that the time tells neither a match nor its place.
        if not sum(hmac.compare_digest(digest, key) for key in self._keys):
            raise APIError(
                401,
                "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def reserve(self, num_bytes: int) -> None:
        """Count bytes that a body takes up.

        Raises:
            APIError: too many bodies are held already.
        """
        if self._buffered_bytes + num_bytes > self._settings.max_buffered_bytes:
            raise unavailable("the server holds too many large requests; try again later", 1)
        self._buffered_bytes += num_bytes

    @property
    def settings(self) -> ServerSettings:
        """The settings of the server."""
        return self._settings


class _BodyReader:
    """Reads one body into memory within the limits."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive) -> None:
        self._guard, self._scope, self._receive = guard, scope, receive
        self._is_over = False
        self.num_bytes = 0
        """Bytes reserved so far."""

    async def read(self) -> bytes:
        limit = self._guard.settings.max_body_bytes
        declared = Headers(scope=self._scope).get("content-length", "0")
        if declared.isdecimal() and int(declared) > limit:
            await self._discard()
            raise _too_large(limit)
        pieces: list[bytes] = []
        async for piece in self._pieces():
            if self.num_bytes + len(piece) > limit:
                await self._discard()
                raise _too_large(limit)
            self._guard.reserve(len(piece))
            self.num_bytes += len(piece)
            pieces.append(piece)
        return b"".join(pieces)

    async def _pieces(self) -> AsyncIterator[bytes]:
        while not self._is_over:
            try:
                message = await asyncio.wait_for(
                    self._receive(), self._guard.settings.body_timeout_s
                )
            except TimeoutError:
                raise APIError(408, "the request body did not arrive in time") from None
            if message["type"] != "http.request":
                raise APIError(400, "the client went away while it sent the request")
            self._is_over = not message.get("more_body", False)
            yield message.get("body", b"")

    async def _discard(self) -> None:
        """Read on for a while: a client that is still sending would not see the answer."""
        num_discarded = 0
        async for piece in self._pieces():
            num_discarded += len(piece)
            if num_discarded > _MAX_DISCARDED_BYTES:
                return


def _too_large(limit: int) -> APIError:
    return APIError(
        413,
        f"the request body is larger than the {limit:,} bytes that this server takes",
        code="request_too_large",
    )


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives `body`, and then whatever comes, which is the disconnect."""
    is_given = False

    async def receive_again() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


def is_local_name(name: str) -> bool:
    """Tell whether a host name cannot be a foreign page's: an IP address or `localhost`."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _host_name(host: str) -> str:
    name = host.lower()
    if name.startswith("["):
        return name.partition("]")[0] + "]"
    return name.partition(":")[0]


def _digest(key: str) -> bytes:
    # Hashed, because compare_digest tells the length.
    return sha256(key.encode("utf-8", "surrogatepass")).digest()
