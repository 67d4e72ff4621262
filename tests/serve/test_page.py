"""The chat page in a real Chromium, at the real server."""

import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from linnet.errors import Overloaded
from linnet.infer.updates import Progress, Update, Usage

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
expect.set_options(timeout=20_000)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
WEATHER = json.dumps([{"name": "get_weather", "parameters": {"type": "object"}}])


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


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as driver:
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
        page = context.new_page()
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
def speak(open_page, serve, scripted) -> Iterator[Callable]:
    """Return a function that opens the page of a server which answers by given texts."""
    servers = []

    def speak(*texts: str, viewport=None, **script):
        engine = Speaker(scripted(""), texts, **script)
        server = serve(engine)
        page = open_page(server.__enter__(), viewport=viewport)
        servers.append(server)
        return page, engine

    yield speak
    for server in servers:
        server.__exit__(None, None, None)


def send(page, text: str) -> None:
    page.fill("#message", text)
    page.keyboard.press("Enter")


def answer(page, place: int = -1):
    """Return an answer, once it is complete."""
    answers = page.locator(".answer")
    view = answers.last if place < 0 else answers.nth(place)
    expect(view).to_have_attribute("aria-busy", "false")
    return view


def ask(page, text: str):
    """Send a message, and return the answer."""
    count = page.locator(".answer").count()
    send(page, text)
    expect(page.locator(".answer")).to_have_count(count + 1)
    return answer(page)


def posted(page, act: Callable[[], object], path="/v1/chat/completions") -> dict:
    """Return the body of the request that an action makes."""
    with page.expect_request(lambda request: path in request.url) as info:
        act()
    return info.value.post_data_json


def test_page_loads_from_one_origin_and_names_the_model(page, address):
    urls = page.evaluate("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert len(urls) > 30
    assert all(url.startswith(address.url) for url in urls)
    expect(page.locator("#badge")).to_have_text("tiny2K")
    expect(page.locator(".example")).to_have_count(6)


def test_answer_has_its_figures(page):
    page.click("#toggle-settings")
    page.fill("#max_tokens", "40")
    page.fill("#temperature", "2")  # so that a random model does not end at once
    page.fill("#system", "be brief")
    page.locator("#thinking-budget").fill("3")
    body = posted(page, lambda: ask(page, "the cat"))
    stats = answer(page).locator(".stats")
    expect(stats).to_contain_text("tok/s")
    expect(stats).to_contain_text("first token")
    expect(stats).to_contain_text("cached")
    assert (body["max_tokens"], body["temperature"]) == (40, 2)
    assert body["thinking_token_budget"] == 64
    assert body["stream"] and body["return_progress"] and "seed" not in body
    assert body["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "the cat"},
    ]


def test_second_turn_finds_the_first_in_the_cache(page):
    page.click("#toggle-settings")
    page.fill("#max_tokens", "4")
    ask(page, "the cat and the hat " * 30)
    ask(page, "and the hat")
    cached = answer(page).locator(".stats").inner_text().split("\N{NO-BREAK SPACE}cached")[0]
    assert int(cached.split()[-1].split("\N{NO-BREAK SPACE}")[0].replace(",", "")) > 100


def test_regenerate_and_edit_branch_the_history(speak):
    page, _ = speak("one", "two", "three")
    ask(page, "first question")
    ask(page, "second question")
    page.click(".answer >> nth=0 >> [aria-label='Write another answer']")
    expect(answer(page, 0)).to_contain_text("three")
    expect(page.locator(".user")).to_have_count(1)
    branches = page.locator(".answer .turn-tools .branches").first
    expect(branches).to_contain_text("2 / 2")
    branches.locator("[aria-label='Previous version']").click()
    expect(page.locator(".answer")).to_contain_text(["one", "two"])

    page.click(".user >> nth=1 >> [aria-label='Edit and send again']")
    page.fill(".edit textarea", "another question")
    body = posted(page, lambda: page.click(".edit >> text=Send"))
    contents = [message["content"] for message in body["messages"]]
    assert contents == ["first question", "one", "another question"]
    expect(page.locator(".user .branches").nth(1)).to_contain_text("2 / 2")


def test_stop_cancels_on_the_server(speak):
    page, engine = speak("word " * 2000, pause_s=0.02)
    send(page, "go on")
    expect(page.locator(".answer")).to_contain_text("word word")
    page.keyboard.press("Escape")
    expect(answer(page).locator(".stats")).to_contain_text("stopped")
    until(engine.cancelled[0].is_set)
    expect(page.locator("#send")).to_have_attribute("aria-label", "Send")


def test_thoughts_are_folded_and_counted(speak):
    page, _ = speak("<think>\nfirst this, then that\n</think>\nIt is 7.", cut=4, pause_s=0.02)
    send(page, "What is 3 + 4?")
    thinking = page.locator(".thinking")
    expect(thinking.locator("summary")).to_contain_text("Thinking · ")
    expect(answer(page).locator(".markdown")).to_have_text("It is 7.")
    expect(thinking.locator("summary")).to_contain_text("Thought · ")
    expect(thinking.locator(".thinking-text")).to_be_hidden()
    thinking.locator("summary").click()
    expect(thinking.locator(".thinking-text")).to_have_text("first this, then that")
    body = posted(page, lambda: ask(page, "and 4 + 4?"))
    assert "first this, then that" in body["messages"][1]["reasoning_content"]


def test_tool_result_continues_the_chat(speak):
    call = '<tool_calls>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_calls>'
    page, _ = speak(call, "It is sunny.", "It is cold.")
    page.click("#toggle-settings")
    page.fill("#tools", "[{")
    expect(page.locator("#tools-problem")).to_contain_text("not JSON")
    send(page, "weather?")
    expect(page.locator(".answer")).to_have_count(0)
    page.fill("#tools", WEATHER)
    body = posted(page, lambda: page.click("#send"))
    assert body["tools"][0]["function"]["name"] == "get_weather"
    card = answer(page, 0).locator(".call")
    expect(card).to_contain_text("get_weather")
    expect(card.locator("code")).to_have_text('{\n  "city": "Oslo"\n}')
    send_result = page.locator("text=Send the result")
    expect(send_result).to_be_disabled()
    card.locator("textarea").fill("sunny")
    messages = posted(page, send_result.click)["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool"]
    assert messages[1]["tool_calls"][0]["id"] == messages[2]["tool_call_id"]
    assert messages[2]["content"] == "sunny"
    expect(answer(page, 1)).to_contain_text("It is sunny.")

    page.click("text=Change results")
    card.locator("textarea").fill("cold")
    send_result.click()
    expect(answer(page, 1)).to_contain_text("It is cold.")
    page.click(".calls [aria-label='Previous version']")
    expect(answer(page, 1)).to_contain_text("It is sunny.")


def test_files_are_counted_before_and_read_after(page, http, tmp_path):
    text = "the cat and the hat\n" * 20
    (tmp_path / "notes.txt").write_text(text)
    page.set_input_files("#pick-files", tmp_path / "notes.txt")
    wanted = f"File: notes.txt\n```\n{text}```"
    counted = http.post("/tokenize", json={"prompt": wanted, "add_special_tokens": False})
    count = counted.json()["count"]
    expect(page.locator(".chip")).to_contain_text(f"notes.txt{count} tokens")
    expect(page.locator("#meter")).to_contain_text("/ 2K")
    assert count < int(page.locator("#meter span").inner_text().split(" ")[0]) < count + 40
    body = posted(page, lambda: send(page, "Where is the cat?"))
    assert body["messages"][0]["content"] == f"{wanted}\n\nWhere is the cat?"
    expect(page.locator(".user .file")).to_contain_text(f"notes.txt{count} tokens")


def test_folder_is_packed_without_what_is_no_text(page, tmp_path):
    folder = tmp_path / "project"
    (folder / "node_modules").mkdir(parents=True)
    (folder / "a.py").write_text("print(1)\n")
    (folder / "b.md").write_text("```\nfence\n```\n")
    (folder / "c.bin").write_bytes(b"\0\1\2")
    (folder / "node_modules" / "d.js").write_text("no")
    page.set_input_files("#pick-folder", folder)
    expect(page.locator(".chip")).to_contain_text("project/")
    expect(page.locator("#toasts")).to_contain_text("1 file left out")
    body = posted(page, lambda: send(page, "?"))
    assert body["messages"][0]["content"] == (
        "File: project/a.py\n```\nprint(1)\n```\n\n"
        "File: project/b.md\n````\n```\nfence\n```\n````\n\n?"
    )


@pytest.mark.slow
def test_dropped_file_is_attached(page):
    transfer = page.evaluate_handle(
        """() => {
            const transfer = new DataTransfer();
            transfer.items.add(new File(["the hat"], "<img src=x onerror=alert(1)>.txt"));
            return transfer;
        }"""
    )
    page.dispatch_event("main", "dragenter", {"dataTransfer": transfer})
    expect(page.locator("#drop")).to_be_visible()
    page.dispatch_event("main", "drop", {"dataTransfer": transfer})
    expect(page.locator("#drop")).to_be_hidden()
    expect(page.locator(".chip")).to_contain_text("<img src=x onerror=alert(1)>.txt")


@pytest.mark.slow
def test_prefill_shows_its_progress(speak):
    page, _ = speak("done", progress=(200, 400, 600, 800), pause_s=0.15)
    send(page, "read this")
    expect(page.locator(".prefill")).to_contain_text(
        "Reading 400 of 1,000 tokens", use_inner_text=True
    )
    expect(page.locator(".prefill progress")).to_have_attribute("max", "1000")
    expect(answer(page).locator(".prefill")).to_be_hidden()


def test_history_is_kept_until_it_is_deleted(page):
    text = ask(page, "the hat").locator(".markdown").inner_text()
    page.reload()
    assert answer(page).locator(".markdown").inner_text() == text
    page.click("#new-chat")
    expect(page.locator("#empty")).to_be_visible()
    page.click(".chat-title")
    expect(page.locator(".bubble")).to_have_text("the hat")
    page.click("[aria-label='Delete the chat the hat']")
    expect(page.locator(".chat-title")).to_have_count(0)
    page.click("text=Undo")
    expect(page.locator(".chat-title")).to_have_text("the hat")
    page.click("[aria-label='Delete the chat the hat']")
    expect(page.locator(".chat-title")).to_have_count(0)
    page.reload()
    expect(page.locator("#empty")).to_be_visible()
    expect(page.locator(".chat-title")).to_have_count(0)


@pytest.mark.slow
def test_export_holds_the_chat(speak):
    page, _ = speak("<think>\nhm\n</think>\nIt is **7**.")
    ask(page, "What is 3 + 4?")
    exported = {}
    for kind in ("Markdown", "JSON"):
        page.click("[aria-label='Export the chat']")
        with page.expect_download() as info:
            page.click(f"#export-menu >> text={kind}")
        exported[kind] = Path(info.value.path()).read_text()
        assert info.value.suggested_filename.startswith("What-is-3-4.")
    assert exported["Markdown"].startswith("# What is 3 + 4?\n\n**You**\n\nWhat is 3 + 4?\n")
    assert "It is **7**." in exported["Markdown"] and "hm" in exported["Markdown"]
    turns = json.loads(exported["JSON"])["turns"].values()
    assert [turn["role"] for turn in turns] == ["root", "user", "assistant"]


def test_error_of_the_server_is_shown(page):
    send(page, "x " * 3000)
    expect(page.locator(".error-box")).to_contain_text("maximum context length is 2048")
    expect(page.locator("#meter")).to_have_attribute("data-level", "over")


@pytest.mark.slow
def test_busy_server_is_asked_again_later(speak):
    page, engine = speak("here I am")
    engine.error = Overloaded("the queue is full", retry_after_s=1)
    send(page, "hello")
    retry = page.locator(".error-box button")
    expect(page.locator(".error-box")).to_contain_text("the queue is full")
    expect(retry).to_be_disabled()
    engine.error = None
    retry.click()  # waits until it may
    expect(answer(page)).to_contain_text("here I am")
    expect(page.locator(".answer .branches").first).to_be_hidden()


def test_lost_connection_is_told_and_retried(open_page, serve, scripted):
    engine = Speaker(scripted(""), ["word " * 500, "word " * 500, "all is well"], pause_s=0.02)
    with serve(engine) as address, Cable(address.url) as cable:
        page = open_page(cable)
        page.context.set_offline(True)
        send(page, "hello")
        expect(page.locator(".error-box")).to_contain_text("The server cannot be reached.")
        page.context.set_offline(False)
        page.click(".error-box >> text=Retry")
        expect(page.locator(".answer")).to_contain_text("word word")
        cable.cut()
        expect(page.locator(".error-box")).to_contain_text("The connection was lost")
        until(engine.cancelled[0].is_set)
        page.click(".error-box >> text=Retry")
        expect(page.locator(".answer .turn-tools .branches")).to_contain_text("2 / 2")
        expect(page.locator(".answer")).to_contain_text("word word")
        page.reload()
        expect(page.locator(".error-box")).to_contain_text("The page was closed")
        until(engine.cancelled[1].is_set)
        page.click(".error-box >> text=Retry")
        expect(answer(page)).to_contain_text("all is well")


class Cable:
    """Connections to a server that can be cut, as when a network fails."""

    def __init__(self, url: str):
        self._port = int(url.rsplit(":", 1)[1])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Cable":
        self._start(self._accept)
        return self

    def __exit__(self, *error: object) -> None:
        shut(self._listener)
        self.cut()
        for thread in self._threads:
            thread.join()
        for end in (self._listener, *self._ends):
            end.close()

    def cut(self) -> None:
        for end in self._ends:
            shut(end)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                there = socket.create_connection(("127.0.0.1", self._port))
                self._ends += [here, there]
                self._start(carry, here, there)
                self._start(carry, there, here)

    def _start(self, work, *arguments) -> None:
        thread = threading.Thread(target=work, args=arguments)
        self._threads.append(thread)
        thread.start()


def carry(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    shut(target)


def shut(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


def test_key_is_asked_for_and_forgotten(open_page, make_engine, serve):
    with serve(make_engine(), api_keys=("secret-key",)) as address:
        page = open_page(address)
        expect(page.locator("#badge")).to_contain_text("API key needed")
        page.click("#badge")
        page.fill("#api-key", "secret-key")
        page.keyboard.press("Tab")
        expect(page.locator("#badge")).to_contain_text("tiny")
        ask(page, "the cat")
        stored = page.evaluate("JSON.stringify([localStorage, document.cookie])")
        assert "linnet.settings" not in stored or "secret-key" not in stored
        assert "secret-key" in page.evaluate("JSON.stringify(sessionStorage)")


ATTACKS = """\
<script>window.ran = 1</script> <img src=x onerror="window.ran = 2"> [link](javascript:window.ran=3)
![picture](https://example.com/a.png) [data](data:text/html,<script>window.ran=4</script>)

<iframe src="javascript:parent.ran = 5"></iframe>

<a href="javascript:window.ran = 6" onclick="window.ran = 7">click</a> <svg onload="window.ran = 8">
<style>body { display: none }</style> <form action="https://example.com"><button>go</button></form>
<div id="message" class="toast" style="position: fixed">over</div> <base href="https://example.com">

```<img src=x onerror="window.ran = 9">
</code></pre><img src=x onerror="window.ran = 10">
```

| <img src=x onerror="window.ran = 11"> | [x](vbscript:1) |
|---|---|
| <math><mtext></form><form><mglyph><style></math><img src onerror="window.ran = 12"> | `</td>` |
"""


def test_nothing_runs_that_a_model_says(speak):
    calls = json.dumps(
        {"name": "<img src=x onerror='window.ran = 13'>", "arguments": {"a": ATTACKS}}
    )
    page, _ = speak(
        f"<think>\n{ATTACKS}</think>\n{ATTACKS}", f"<tool_calls>\n{calls}\n</tool_calls>", cut=5
    )
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    ask(page, ATTACKS)
    page.click("#toggle-settings")
    page.fill("#tools", WEATHER)
    ask(page, ATTACKS)
    page.reload()
    answer(page)
    assert page.evaluate("window.ran") is None
    assert not [url for url in requests if "example.com" in url or url.endswith("/x")]
    expect(
        page.locator("#thread :is(script, img, iframe, svg[onload], style, base)")
    ).to_have_count(0)
    links = page.locator("#thread a[href]").evaluate_all("links => links.map(link => link.href)")
    assert links == ["https://example.com/a.png"]
    assert page.locator("#thread [style], #thread [id]").count() == 0


MARKDOWN = """\
# Title

Some *text* with `code`, **more**
and a [link](https://example.com).

1. one
   - nested

     far
2. two

```python
def f():
    return "```"
```
* a
* b
~~~
plain

~~~
> quote
> > deeper

| a | b |
|--:|---|
| 1 | 2 |

Setext
======
- [x] done

    indented

---
last line"""


def test_streamed_markdown_is_what_the_whole_would_be(page):
    drawn = page.evaluate(
        """async (text) => {
            const { MarkdownView } = await import("/js/markdown_view.js");
            const draw = (cuts) => {
                const element = document.createElement("div");
                const view = new MarkdownView(element);
                for (const cut of cuts) view.show(text.slice(0, cut), false);
                while (!view.show(text, true));
                return element.innerHTML.replace(/\\n+(?=<|$)/g, "");
            };
            const all = Array.from(text, (_, index) => index);
            const cuts = [all, ...all.map((index) => [index])];
            for (const rest of [0, 1, 2, 3, 4, 5, 6])
                cuts.push(all.filter((index) => index % 7 === rest));
            return [draw([]), [...new Set(cuts.map(draw))]];
        }""",
        MARKDOWN,
    )
    whole, streamed = drawn
    assert streamed == [whole]
    for tag in ("<h1>", "<ol>", "<figure", "<blockquote>", "<table>", 'type="checkbox"', "<hr>"):
        assert tag in whole


@pytest.mark.slow
def test_reader_who_scrolls_up_is_left_alone(speak):
    page, _ = speak("A line of text.\n\n" * 400, cut=40, pause_s=0.02)
    send(page, "go on")
    scroller = page.locator("#scroller")
    distance = "area => area.scrollHeight - area.scrollTop - area.clientHeight"
    until(lambda: scroller.evaluate("area => area.scrollTop") > 300)
    assert scroller.evaluate(distance) < 60
    page.mouse.move(640, 300)
    page.mouse.wheel(0, -200)
    expect(page.locator("#to-end")).to_be_visible()
    top = scroller.evaluate("area => area.scrollTop")
    time.sleep(0.3)
    assert scroller.evaluate("area => area.scrollTop") == top
    assert scroller.evaluate(distance) > 150
    page.click("#to-end")
    answer(page)
    assert scroller.evaluate(distance) < 2


@pytest.mark.slow
def test_what_is_drawn_stays_in_its_place(speak):
    page, _ = speak(MARKDOWN, cut=6, pause_s=0.02)
    page.evaluate(
        """() => {
            window.shifts = [];
            new PerformanceObserver((list) => {
                for (const { value, hadRecentInput } of list.getEntries())
                    if (!hadRecentInput) window.shifts.push(value);
            }).observe({ type: "layout-shift", buffered: false });
        }"""
    )
    ask(page, "write")
    assert sum(page.evaluate("window.shifts")) < 0.05


PARAGRAPHS = "Some *text* with `code` and a [link](https://example.com).\n" * 10 + "\n"


@pytest.mark.slow
def test_page_answers_while_it_draws_a_megabyte(speak):
    text = (MARKDOWN + "\n\n" + PARAGRAPHS * 10) * 130 + "```\n" + "code\n" * 40_000 + "```\n"
    assert len(text) > 1_000_000
    page, _ = speak(text, cut=20_000)
    send(page, "write")
    page.locator(".markdown h1").nth(20).wait_for(state="attached")
    page.fill("#message", "meanwhile")
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "true", timeout=1)
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "false", timeout=240_000)
    assert page.locator(".markdown h1").count() == 260
    expect(page.locator("#message")).to_have_value("meanwhile")


@pytest.mark.slow
@pytest.mark.parametrize(
    "unit",
    [PARAGRAPHS, "word ", "- item\n", "> quote\n", "| a | b |\n", "**a ", "[a](", "`"],
    ids=["paragraphs", "words", "list", "quote", "table", "stars", "links", "ticks"],
)
def test_drawing_takes_time_in_proportion_to_length(page, unit):
    times = page.evaluate(
        """async (unit) => {
            const { MarkdownView } = await import("/js/markdown_view.js");
            const time = (length) => {
                const text = "```\\n" + "code\\n".repeat(1000) + "```\\n" +
                    unit.repeat(length / unit.length);
                const view = new MarkdownView(document.createElement("div"));
                const start = performance.now();
                for (let end = 0; end < text.length; end += 5000)
                    view.show(text.slice(0, end), false);
                while (!view.show(text, true));
                return performance.now() - start;
            };
            time(50_000);
            return [time(100_000), time(400_000)];
        }""",
        unit,
    )
    assert times[1] < 10 * times[0]  # 4 times the length; 16 if each step began anew


@pytest.mark.slow
def test_page_fits_a_phone(speak):
    page, _ = speak(MARKDOWN, viewport={"width": 360, "height": 640})
    ask(page, "w" * 400)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    expect(page.locator("#sidebar")).to_be_hidden()
    page.click("#toggle-sidebar")
    expect(page.locator("#sidebar")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#sidebar")).to_be_hidden()
    for control in page.locator("button:visible").all():
        box = control.bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= 360


@pytest.mark.slow
def test_every_control_has_a_name_and_can_be_reached(page):
    ask(page, "the cat")
    page.click("#toggle-settings")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, select, summary")]
            .filter((control) => control.checkVisibility() && !control.ariaLabel)
            .filter((control) => !control.labels?.length && !control.innerText)
            .map((control) => control.outerHTML)"""
    )
    assert unnamed == []
    expect(page.locator("#announcer")).to_contain_text("complete")
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    page.locator("#message").blur()
    page.keyboard.press("/")
    expect(page.locator("#message")).to_be_focused()


@pytest.mark.slow
def test_theme_follows_the_system_until_it_is_chosen(open_page, address):
    page = open_page(address, color_scheme="dark")
    background = "() => getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.click("#theme")
    expect(page.locator("#theme")).to_have_attribute("aria-label", "Theme: light")
    light = page.evaluate(background)
    assert light != dark
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "light")
    assert page.evaluate(background) == light


def until(is_so: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)
