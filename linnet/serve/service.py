"""What all endpoints share: one model in its engine, and the rules of the server."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from linnet.errors import ConfigError, EngineError
from linnet.infer.engine import Engine
from linnet.serve.errors import APIError, bad_request, from_engine, unavailable
from linnet.serve.metrics import Metrics
from linnet.serve.runs import EngineRequest, Run
from linnet.serve.settings import ServerSettings
from linnet.text import Tokenizer, ToolFormat, tool_format_of


class Service:
    """One model behind the API.

    Args:
        engine: started, with a model that has a tokenizer.
        settings: the operator's choices.

    Raises:
        ConfigError: the model has no tokenizer.
    """

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        tokenizer = engine.model.tokenizer
        if tokenizer is None:
            raise ConfigError("the model has no tokenizer; put tokenizer.json into its folder")
        self.engine, self.settings = engine, settings
        self.tokenizer: Tokenizer = tokenizer
        self.tool_format: ToolFormat | None = tool_format_of(tokenizer)
        self.vocab_size = engine.model.config.vocab_size
        self.metrics = Metrics(engine)
        self.created = int(time.time())
        self._num_preparing = 0

    @property
    def model_name(self) -> str:
        """What requests call the model."""
        return self.settings.model_name

    def check_model(self, name: str | None) -> None:
        """Refuse a request for a model that is not here.

        Raises:
            APIError: with status 404.
        """
        if name not in (None, self.model_name):
            raise APIError(
                404,
                f"the model {name!r} does not exist; this server has {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    async def start(self, requests: Sequence[EngineRequest], param: str) -> Run:
        """Submit the engine requests of one HTTP call.

        Args:
            requests: prompts and rules.
            param: the field of the HTTP request that holds the prompts.

        Raises:
            APIError: one of them cannot be meant, or there is no room for all of them.
        """
        settings = self.engine.settings
        most = settings.max_sequences + settings.max_queued_requests
        if len(requests) > most:
            # However often it were sent again, it would not fit.
            raise bad_request(
                f"the request asks for {len(requests)} completions; this server takes {most}", param
            )
        try:
            return await Run.start(self.engine, self.metrics, requests)
        except (EngineError, ValueError) as error:
            raise from_engine(error, param) from None

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Count a request until it is in the engine's queue, whose bound holds for it as well.

        Raises:
            APIError: too many requests wait, or the server is stopping.
        """
        if self.engine.is_draining:
            raise unavailable("the server is shutting down; send the request elsewhere", 10)
        num_waiting = self._num_preparing + self.engine.counters().waiting
        if num_waiting >= self.engine.settings.max_queued_requests:
            raise unavailable(f"{num_waiting} requests wait already; try again later", 1)
        self._num_preparing += 1
        try:
            yield
        finally:
            self._num_preparing -= 1
