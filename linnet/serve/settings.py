"""What the operator of a server decides, apart from the engine."""

from dataclasses import dataclass, field

from linnet.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """How the HTTP side of a server behaves.

    Raises:
        ConfigError: a value outside its range.
    """

    model_name: str = "linnet"
    """What requests call the model."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Any one of them opens the API; none leaves it open to all."""
    allowed_hosts: tuple[str, ...] | None = None
    """Names that a `Host` header may give besides IP addresses; None allows every name."""
    allow_origins: tuple[str, ...] = ()
    """Origins whose pages may call the API from a browser; `*` for all."""
    max_body_bytes: int = 32 * 2**20
    """Largest request body."""
    max_buffered_bytes: int = 256 * 2**20
    """Bytes of request bodies that are held at one time, over all requests."""
    body_timeout_s: float = 30.0
    """Longest silence in the middle of a request body."""
    ping_s: float = 10.0
    """Silence after which a stream sends a comment, so that nobody between closes it."""

    def __post_init__(self) -> None:
        if not self.model_name:
            raise ConfigError("model_name is empty; give the name that requests use")
        if any(not key.isascii() or len(key) < 8 or " " in key for key in self.api_keys):
            raise ConfigError(
                "an API key is shorter than 8 characters, or holds spaces or characters that a "
                "header cannot; choose another"
            )
        for name in ("max_body_bytes", "max_buffered_bytes", "body_timeout_s", "ping_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be positive")
