"""The chat page: every file in `static/`, and the rules a browser must keep for it."""

from hashlib import sha256
from pathlib import Path

from fastapi import APIRouter, Request, Response

STATIC = Path(__file__).parent / "static"
CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "font-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
# Not from the system's table, which may call JavaScript plain text.
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".map": "application/json",
    ".mjs": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".webmanifest": "application/manifest+json",
    ".woff2": "font/woff2",
}


def page_routes(folder: Path = STATIC) -> APIRouter:
    """Return a route for each file of a folder; `index.html` is at `/` as well.

    The files are listed once, so that no request can name any other.
    """
    router = APIRouter()
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.name.startswith("."):
            path = f"/{file.relative_to(folder).as_posix()}"
            for place in (path, "/") if path == "/index.html" else (path,):
                router.add_route(place, _serve(file), include_in_schema=False)
    return router


def _serve(file: Path):
    async def serve(request: Request) -> Response:
        content = file.read_bytes()
        tag = f'"{sha256(content).hexdigest()[:32]}"'
        headers = page_headers() | {"ETag": tag, "Cache-Control": "no-cache"}
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        kind = _TYPES.get(file.suffix, "application/octet-stream")
        if file.name.startswith("LICENSE"):
            kind = _TYPES[".txt"]
        return Response(content, headers=headers, media_type=kind)

    return serve


def page_headers() -> dict[str, str]:
    """Return the headers of a page that runs only what this server sends."""
    return {"Content-Security-Policy": CONTENT_SECURITY_POLICY, "X-Frame-Options": "DENY"}
