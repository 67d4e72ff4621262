"""A real server: uvicorn on a port of this machine, the engine, and a tiny random model.

For what a random model does not say there is an engine whose answers are written beforehand.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from types import SimpleNamespace

import httpx2
import openai
import pytest
import torch

from linnet.infer.engine import Engine, EngineCounters, EngineSettings
from linnet.infer.updates import Progress, Update, Usage
from linnet.model import Model, ModelConfig
from linnet.serve import Server, ServerSettings, create_app
from linnet.text import Tokenizer

MODEL = "tiny"
CORPUS = "system user name=user ai name=assistant tool the cat and the hat 🦜 你好 {}:,\n"


@dataclass(frozen=True)
class Address:
    """Where a server listens, and what is behind it."""

    url: str
    engine: Engine
    server: Server
    thread: threading.Thread

    def http(self, **options) -> httpx2.Client:
        # Without certificates, which take longer to load than a request takes.
        return httpx2.Client(base_url=self.url, timeout=30, verify=False, **options)

    def openai(self, key: str = "none", is_strict: bool = True) -> openai.OpenAI:
        """Return a client; a strict one checks every field of every answer."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=key,
            max_retries=0,
            timeout=30,
            http_client=httpx2.Client(verify=False),
            _strict_response_validation=is_strict,
        )


Serve = Callable[..., AbstractContextManager[Address]]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([CORPUS] * 3, vocab_size=320)


@pytest.fixture(scope="session")
def model(tokenizer) -> Model:
    """Build a model that writes all sorts of tokens: its logits are not flat and not stuck."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attn_type_list=(0, 0, 1),
        rotary_dim=4,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = Model(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5, generator=generator)
        model.embed_tokens.weight.mul_(5)
    model.tokenizer = tokenizer
    return model.eval()


ENGINE = EngineSettings(
    max_sequences=4, max_model_len=2048, memory_bytes=64 << 20, max_queued_requests=8
)


@pytest.fixture(scope="session")
def make_engine(model) -> Callable[..., Engine]:
    return lambda settings=ENGINE: Engine(model, settings)


@pytest.fixture(scope="session")
def serve() -> Serve:
    """Return a context manager that serves an engine in a thread."""
    return serving


@contextmanager
def serving(engine, drain_s: float = 5.0, **settings) -> Iterator[Address]:
    settings = {"model_name": MODEL} | settings
    app = create_app(engine, ServerSettings(**settings))
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = Server(app, engine, drain_s=drain_s)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    engine.start()
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        yield Address(url, engine, server, thread)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="module")
def address(make_engine, serve) -> Iterator[Address]:
    """A server that the tests of a module share."""
    with serve(make_engine()) as address:
        yield address


@pytest.fixture(scope="module")
def client(address) -> Iterator[openai.OpenAI]:
    with address.openai() as client:
        yield client


@pytest.fixture(scope="module")
def http(address) -> Iterator[httpx2.Client]:
    with address.http() as http:
        yield http


@dataclass
class ScriptedTicket:
    is_cancelled: bool = False

    def cancel(self) -> None:
        self.is_cancelled = True


class ScriptedEngine:
    """Answers every request by the same updates, `pause_s` apart."""

    def __init__(self, tokenizer, updates: Iterable[Update], pause_s: float = 0.0) -> None:
        config = SimpleNamespace(vocab_size=tokenizer.vocab_size)
        self.model = SimpleNamespace(tokenizer=tokenizer, config=config)
        self.settings, self.max_model_len = EngineSettings(), 2048
        self.plan = SimpleNamespace(total_bytes=0)
        self.is_healthy, self.is_draining = True, False
        self.tickets: list[ScriptedTicket] = []
        self.prompts: list[list[int]] = []
        self.params = []
        self._updates, self._pause_s = list(updates), pause_s

    def submit(self, prompt, params, on_update: Callable[[Update], None]) -> ScriptedTicket:
        ticket = ScriptedTicket()
        self.tickets.append(ticket)
        self.prompts.append(prompt)
        self.params.append(params)
        threading.Thread(target=self._play, args=(ticket, on_update), daemon=True).start()
        return ticket

    def _play(self, ticket: ScriptedTicket, on_update: Callable[[Update], None]) -> None:
        for update in self._updates:
            time.sleep(self._pause_s)
            if ticket.is_cancelled:
                on_update(Update(finish_reason="cancelled", usage=USAGE))
                return
            on_update(update)

    def start(self) -> None: ...

    def stop(self, drain_s: float = 0.0) -> None:
        self.is_draining = True

    def counters(self) -> EngineCounters:
        values = {field.name: 0 for field in fields(EngineCounters)}
        return EngineCounters(**values | {"finished_total": {}, "prefix_misses_total": {}})


USAGE = Usage(
    prompt_tokens=10,
    cached_tokens=4,
    completion_tokens=6,
    reasoning_tokens=2,
    queue_s=0.01,
    first_token_s=0.02,
    total_s=0.05,
)


def script(text: str, cut: int = 1, finish="stop", **end) -> list[Update]:
    """Return the updates of a completion that comes in pieces of `cut` characters."""
    pieces = [text[start : start + cut] for start in range(0, len(text), cut)]
    return [
        Update(progress=Progress(4, 10, 4)),
        *(Update(text=piece, tokens=(5,)) for piece in pieces),
        Update(finish_reason=finish, usage=USAGE, **end),
    ]


@pytest.fixture(scope="session")
def scripted(tokenizer) -> Callable[..., ScriptedEngine]:
    """Return a function that makes an engine which answers `text`; see `script`."""

    def make(text, pause_s=0.0, tokenizer=tokenizer, **rules) -> ScriptedEngine:
        return ScriptedEngine(tokenizer, script(text, **rules), pause_s)

    return make
