"""What a reader does on the chat page: ask, stop, branch, call tools, add files, keep, export."""

import json
import socket
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from playwright.sync_api import expect

from linnet.errors import Overloaded

WEATHER = json.dumps([{"name": "get_weather", "parameters": {"type": "object"}}])


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
    body = page.posted(lambda: page.ask("the cat"))
    stats = page.answer().locator(".stats")
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


def test_answers_are_bounded_unless_the_reader_says_otherwise(page):
    assert page.posted(lambda: page.ask("the cat"))["max_tokens"] == 2048
    page.click("#toggle-settings")
    page.fill("#max_tokens", "")
    page.fill("#temperature", "2")
    assert "max_tokens" not in page.posted(lambda: page.ask("the hat"))
    page.click("#reset-sampling")
    assert page.input_value("#max_tokens") == "2048"


def test_second_turn_finds_the_first_in_the_cache(page):
    page.click("#toggle-settings")
    page.fill("#max_tokens", "4")
    page.ask("the cat and the hat " * 30)
    page.ask("and the hat")
    cached = page.answer().locator(".stats").inner_text().split("\N{NO-BREAK SPACE}cached")[0]
    assert int(cached.split()[-1].split("\N{NO-BREAK SPACE}")[0].replace(",", "")) > 100


def test_regenerate_and_edit_branch_the_history(speak):
    page, _ = speak("one", "two", "three")
    page.ask("first question")
    page.ask("second question")
    page.click(".answer >> nth=0 >> [aria-label='Write another answer']")
    expect(page.answer(0)).to_contain_text("three")
    expect(page.locator(".user")).to_have_count(1)
    branches = page.locator(".answer .turn-tools .branches").first
    expect(branches).to_contain_text("2 / 2")
    branches.locator("[aria-label='Previous version']").click()
    expect(page.locator(".answer")).to_contain_text(["one", "two"])

    page.click(".user >> nth=1 >> [aria-label='Edit and send again']")
    page.fill(".edit textarea", "another question")
    body = page.posted(lambda: page.click(".edit >> text=Send"))
    contents = [message["content"] for message in body["messages"]]
    assert contents == ["first question", "one", "another question"]
    expect(page.locator(".user .branches").nth(1)).to_contain_text("2 / 2")


def test_stop_cancels_on_the_server(speak, until):
    page, engine = speak("word " * 2000, pause_s=0.02)
    page.send("go on")
    expect(page.locator(".answer")).to_contain_text("word word")
    page.keyboard.press("Escape")
    expect(page.answer().locator(".stats")).to_contain_text("stopped")
    until(engine.cancelled[0].is_set)
    expect(page.locator("#send")).to_have_attribute("aria-label", "Send")


def test_thoughts_are_folded_and_counted(speak):
    page, _ = speak("<think>\nfirst this, then that\n</think>\nIt is 7.", cut=4, pause_s=0.02)
    page.send("What is 3 + 4?")
    thinking = page.locator(".thinking")
    expect(thinking.locator("summary")).to_contain_text("Thinking · ")
    expect(page.answer().locator(".markdown")).to_have_text("It is 7.")
    expect(thinking.locator("summary")).to_contain_text("Thought · ")
    expect(thinking.locator(".thinking-text")).to_be_hidden()
    thinking.locator("summary").click()
    expect(thinking.locator(".thinking-text")).to_have_text("first this, then that")
    body = page.posted(lambda: page.ask("and 4 + 4?"))
    assert "first this, then that" in body["messages"][1]["reasoning_content"]


def test_tool_result_continues_the_chat(speak):
    call = '<tool_calls>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_calls>'
    page, _ = speak(call, "It is sunny.", "It is cold.")
    page.click("#toggle-settings")
    page.fill("#tools", "[{")
    expect(page.locator("#tools-problem")).to_contain_text("not JSON")
    page.send("weather?")
    expect(page.locator(".answer")).to_have_count(0)
    page.fill("#tools", WEATHER)
    body = page.posted(lambda: page.click("#send"))
    assert body["tools"][0]["function"]["name"] == "get_weather"
    card = page.answer(0).locator(".call")
    expect(card).to_contain_text("get_weather")
    expect(card.locator("code")).to_have_text('{\n  "city": "Oslo"\n}')
    send_result = page.locator("text=Send the result")
    expect(send_result).to_be_disabled()
    card.locator("textarea").fill("sunny")
    messages = page.posted(send_result.click)["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool"]
    assert messages[1]["tool_calls"][0]["id"] == messages[2]["tool_call_id"]
    assert messages[2]["content"] == "sunny"
    expect(page.answer(1)).to_contain_text("It is sunny.")

    page.click("text=Change results")
    card.locator("textarea").fill("cold")
    send_result.click()
    expect(page.answer(1)).to_contain_text("It is cold.")
    page.click(".calls [aria-label='Previous version']")
    expect(page.answer(1)).to_contain_text("It is sunny.")


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
    body = page.posted(lambda: page.send("Where is the cat?"))
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
    body = page.posted(lambda: page.send("?"))
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
    page.send("read this")
    expect(page.locator(".prefill")).to_contain_text(
        "Reading 400 of 1,000 tokens", use_inner_text=True
    )
    expect(page.locator(".prefill progress")).to_have_attribute("max", "1000")
    expect(page.answer().locator(".prefill")).to_be_hidden()


def test_history_is_kept_until_it_is_deleted(page):
    text = page.ask("the hat").locator(".markdown").inner_text()
    page.reload()
    assert page.answer().locator(".markdown").inner_text() == text
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
    page.ask("What is 3 + 4?")
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
    page.send("x " * 3000)
    expect(page.locator(".error-box")).to_contain_text("maximum context length is 2048")
    expect(page.locator("#meter")).to_have_attribute("data-level", "over")


@pytest.mark.slow
def test_busy_server_is_asked_again_later(speak):
    page, engine = speak("here I am")
    engine.error = Overloaded("the queue is full", retry_after_s=1)
    page.send("hello")
    retry = page.locator(".error-box button")
    expect(page.locator(".error-box")).to_contain_text("the queue is full")
    expect(retry).to_be_disabled()
    engine.error = None
    retry.click()  # waits until it may
    expect(page.answer()).to_contain_text("here I am")
    expect(page.locator(".answer .branches").first).to_be_hidden()


def test_lost_connection_is_told_and_retried(open_page, serve, speaker, until):
    engine = speaker("word " * 500, "word " * 500, "all is well", pause_s=0.02)
    with serve(engine) as address, Cable(address.url) as cable:
        page = open_page(cable)
        page.context.set_offline(True)
        page.send("hello")
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
        expect(page.answer()).to_contain_text("all is well")


def test_key_is_asked_for_and_forgotten(open_page, make_engine, serve):
    with serve(make_engine(), api_keys=("secret-key",)) as address:
        page = open_page(address)
        expect(page.locator("#badge")).to_contain_text("API key needed")
        page.click("#badge")
        page.fill("#api-key", "secret-key")
        page.keyboard.press("Tab")
        expect(page.locator("#badge")).to_contain_text("tiny")
        page.ask("the cat")
        stored = page.evaluate("JSON.stringify([localStorage, document.cookie])")
        assert "linnet.settings" not in stored or "secret-key" not in stored
        assert "secret-key" in page.evaluate("JSON.stringify(sessionStorage)")


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
