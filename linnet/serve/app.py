"""The application: routes, what stands before them, and errors in one shape."""

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from linnet.infer.engine import Engine
from linnet.serve import chat, completions, messages, models, openapi, responses
from linnet.serve.errors import APIError, bad_request
from linnet.serve.guard import Guard
from linnet.serve.metrics import Metrics
from linnet.serve.page import page_routes
from linnet.serve.service import Service
from linnet.serve.settings import ServerSettings

CLIENT_GONE = 499


def create_app(engine: Engine, settings: ServerSettings | None = None) -> FastAPI:
    """Return an ASGI application that serves an engine.

    Args:
        engine: started; whoever started it stops it.
        settings: the operator's choices.

    Raises:
        ConfigError: the engine's model has no tokenizer.
    """
    settings = settings or ServerSettings()
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service = Service(engine, settings)
    for router in (
        chat.router,
        completions.router,
        responses.router,
        messages.router,
        models.router,
        openapi.router,
        page_routes(),
    ):
        app.include_router(router)
    openapi.set_document(app)
    app.add_exception_handler(APIError, _tell)
    app.add_exception_handler(RequestValidationError, _tell_invalid)
    app.add_exception_handler(HTTPException, _tell_http)
    app.add_exception_handler(ClientDisconnect, _tell_nobody)
    # The last one added is the first one passed.
    app.add_middleware(Guard, settings=settings)
    if settings.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allow_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(_Counting, metrics=service.metrics)
    return app


class _Counting:
    """ASGI middleware that counts answers by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # A route's own path: what a client made up would be a metric of its own.
                path = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, send_counted)


def _tell(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return error.response(request.url.path)


def _tell_invalid(request: Request, error: Exception) -> Response:
    """Tell one thing that is wrong with a body."""
    assert isinstance(error, RequestValidationError)
    # Of the ways that a union can be meant, the one that fits best: not another type altogether.
    problem = max(error.errors(), key=lambda e: (not e["type"].endswith("_type"), len(e["loc"])))
    where = ".".join(str(part) for part in problem["loc"] if part != "body")
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(error.body, bytes):
        message = "the body is no JSON object; send it with `Content-Type: application/json`"
    elif where:
        message = f"{where}: {message}"
    return bad_request(message, where or None, "invalid_value").response(request.url.path)


def _tell_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code in (404, 405):
        message = f"{request.method} {request.url.path}: {message}"
    answer = APIError(error.status_code, message, headers=error.headers)
    return answer.response(request.url.path)


def _tell_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)
