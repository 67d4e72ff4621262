"""The chat page, opened in a real Chromium from a real server."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from playwright.sync_api import expect, sync_playwright

from linnet.infer.updates import Progress, Update, Usage

expect.set_options(timeout=20_000)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


class Speaker:
    """A scripted engine that answers each request by the next of some texts, the last one again."""

    def __init__(self, engine, texts, cut: int = 8, pause_s: float = 0.0, progress=()):
        self._engine, self._texts = engine, list(texts)
        self._cut, self._pause_s, self._progress = cut, pause_s, progress
        self.max_model_len = 1 << 20
        self.error: Exception | None = None
        self.cancelled: list[threading.Event] = []

    def __getattr__(self, name: str):
        return getattr(self._engine, name)

    def submit(self, prompt, params, on_update: Callable[[Update], None]):
        if self.error:
            raise self.error
        text = self._texts.pop(0) if len(self._texts) > 1 else self._texts[0]
        cancelled = threading.Event()
        self.cancelled.append(cancelled)
        updates = self._updates(text, len(prompt))
        threading.Thread(target=self._play, args=(updates, cancelled, on_update)).start()
        return SimpleNamespace(cancel=cancelled.set)

    def _updates(self, text: str, num_prompt: int) -> list[Update]:
        pieces = [text[at : at + self._cut] for at in range(0, len(text), self._cut)]
        return [
            *(Update(progress=Progress(done, 1000, 200)) for done in self._progress),
            *(Update(text=piece, tokens=(5,)) for piece in pieces),
            Update(finish_reason="stop", usage=usage(num_prompt, len(pieces))),
        ]

    def _play(self, updates, cancelled: threading.Event, on_update) -> None:
        for update in updates:
            if cancelled.wait(self._pause_s):
                on_update(Update(finish_reason="cancelled", usage=usage(1, 1)))
                return
            on_update(update)


def usage(num_prompt: int, num_completion: int) -> Usage:
    return Usage(num_prompt, num_prompt // 2, num_completion, 0, 0.0, 0.01, 0.1)


class ChatPage:
    """A page of the browser, with what a reader does on it."""

    def __init__(self, page):
        self._page = page

    def __getattr__(self, name: str):
        return getattr(self._page, name)

    def send(self, text: str) -> None:
        self.fill("#message", text)
        self.keyboard.press("Enter")

    def answer(self, place: int = -1):
        """Return an answer, once it is complete."""
        answers = self.locator(".answer")
        view = answers.last if place < 0 else answers.nth(place)
        expect(view).to_have_attribute("aria-busy", "false")
        return view

    def ask(self, text: str):
        """Send a message, and return the answer."""
        count = self.locator(".answer").count()
        self.send(text)
        expect(self.locator(".answer")).to_have_count(count + 1)
        return self.answer()

    def posted(self, act: Callable[[], object]) -> dict:
        """Return the body of the chat completion request that an action makes."""
        with self.expect_request("**/v1/chat/completions") as info:
            act()
        return info.value.post_data_json


@pytest.fixture(scope="module")
def browser() -> Iterator:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser) -> Iterator[Callable]:
    """Return a function that opens the page of a server in a browser without a past."""
    contexts, complaints = [], []

    def open_page(address, **options):
        context = browser.new_context(base_url=address.url, **options)
        contexts.append(context)
        page = ChatPage(context.new_page())
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(complaint(message)))
        page.goto("/")
        expect(page.locator("#badge")).not_to_have_attribute("data-state", "unknown")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not [complaint for complaint in complaints if complaint]


def complaint(message) -> str:
    # What the network or the server refused is told on the page, and tested there.
    is_refusal = message.text.startswith("Failed to load resource")
    return message.text if message.type in ("error", "warning") and not is_refusal else ""


@pytest.fixture
def page(open_page, address):
    return open_page(address)


@pytest.fixture
def speaker(scripted) -> Callable[..., Speaker]:
    """Return a function that makes an engine which answers by given texts."""
    return lambda *texts, **script: Speaker(scripted(""), texts, **script)


@pytest.fixture
def speak(open_page, serve, speaker) -> Iterator[Callable]:
    """Return a function that opens the page of a server which answers by given texts."""
    servers = []

    def speak(*texts: str, viewport=None, **script):
        engine = speaker(*texts, **script)
        server = serve(engine)
        page = open_page(server.__enter__(), viewport=viewport)
        servers.append(server)
        return page, engine

    yield speak
    for server in servers:
        server.__exit__(None, None, None)


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], None]:
    """Return a function that waits until something is so."""

    def wait(is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not is_so():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    return wait
