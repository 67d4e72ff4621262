"""Talking in the terminal: streams, stops, remembers, and obeys its commands."""

import builtins
import fcntl
import io
import json
import os
import pty
import select
import shlex
import signal
import subprocess
import sys
import termios
import time

import pytest
from rich.console import Console

import linnet
from linnet.cli import build_parser, main
from linnet.cli.conversation import Conversation
from linnet.cli.keyboard import Keyboard
from linnet.cli.screen import PlainDisplay, PromptBar, TerminalDisplay, printable
from linnet.data.dialogues import DialogueFile
from linnet.errors import DataError, PromptTooLong
from linnet.infer import SamplingParams
from linnet.infer.generate import stream_tokens
from linnet.infer.updates import Progress
from linnet.text import Delta, Tokenizer, chat_template_of, encode_chat

GREEDY = SamplingParams(max_tokens=24, temperature=0.0)


class Recorder:
    """A display that remembers, and acts after some tokens."""

    def __init__(self, after=None, act=lambda: None):
        self.deltas, self.progress, self.is_finished = [], [], False
        self._tokens_to_go, self._act = after, act

    def show_progress(self, progress):
        self.progress.append(progress)

    def show(self, delta, num_tokens):
        self.deltas.append(delta)
        if self._tokens_to_go is not None:
            self._tokens_to_go -= num_tokens
            if self._tokens_to_go <= 0:
                self._act()
                self._tokens_to_go = None

    def finish(self):
        self.is_finished = True


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


def user(text):
    return {"role": "user", "content": text}


def prompt_ids(engine, *messages):
    return encode_chat(engine.model.tokenizer, messages)


# Answers and turns


def test_answer_is_what_generate_gives_and_comes_in_pieces(chat_engine):
    display = Recorder()
    answer = Conversation(chat_engine, GREEDY, display).ask("the cat")
    prompt = prompt_ids(chat_engine, user("the cat"))
    assert list(answer.tokens)[:24] == list(stream_tokens(chat_engine.model, prompt, GREEDY))
    assert "".join(delta.content for delta in display.deltas) == answer.content
    assert len([delta for delta in display.deltas if delta.content]) > 5 and display.is_finished


def test_second_turn_is_computed_from_where_the_first_ended(chat_engine):
    conversation = Conversation(chat_engine, GREEDY, Recorder())
    first = conversation.ask("the cat")
    second = conversation.ask("and the hat")
    seen = first.usage.prompt_tokens + first.usage.completion_tokens
    assert second.usage.cached_tokens >= seen - 1
    assert second.usage.prompt_tokens > seen
    assert conversation.messages == [
        user("the cat"),
        {"role": "assistant", "content": first.text},
        user("and the hat"),
        {"role": "assistant", "content": second.text},
    ]


def test_later_turns_see_the_tokens_that_were_written(chat_engine):
    conversation = Conversation(chat_engine, GREEDY, Recorder())
    first = conversation.ask("the cat")
    second = conversation.ask("and the hat")
    before = prompt_ids(chat_engine, user("the cat"))
    whole = prompt_ids(chat_engine, *conversation.messages[:3])
    end = chat_engine.model.tokenizer.end_of_sentence_id
    rest = whole[whole.index(end, len(before)) :]
    written = [token for token in first.tokens if token != end]
    expected = stream_tokens(chat_engine.model, [*before, *written, *rest], GREEDY)
    assert list(second.tokens)[:24] == list(expected)


def test_answer_that_a_stop_string_cut_is_encoded_anew(chat_engine):
    text = Conversation(chat_engine, GREEDY, Recorder()).ask("the cat").text
    params = SamplingParams(max_tokens=24, temperature=0.0, stop=(text[8:10],))
    conversation = Conversation(chat_engine, params, Recorder())
    assert conversation.ask("the cat").text == text[: text.index(text[8:10])]
    second = conversation.ask("and")
    prompt = prompt_ids(chat_engine, *conversation.messages[:3])
    assert second.usage.prompt_tokens == len(prompt)


def test_system_message_comes_first_and_reset_keeps_it(chat_engine):
    conversation = Conversation(chat_engine, GREEDY, Recorder(), system="be a cat")
    first = conversation.ask("the hat")
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "be a cat"}]
    again = conversation.ask("the hat")
    assert again.text == first.text and again.usage.prompt_tokens == first.usage.prompt_tokens


def test_conversation_that_has_no_room_left_is_refused_and_not_changed(chat_engine):
    conversation = Conversation(chat_engine, GREEDY, Recorder())
    conversation.ask("the cat")
    with pytest.raises(PromptTooLong, match="requests may have 2,048"):
        conversation.ask("cat " * 2000)
    assert len(conversation.messages) == 2


def test_models_without_a_chat_format_are_refused(chat_folder):
    with pytest.raises(DataError, match="no tokenizer"):
        chat_template_of(None)
    tokenizer = Tokenizer.load(chat_folder)
    tokenizer.chat_template = None
    assert chat_template_of(tokenizer) is None  # the special tokens say that it is M1's
    tokenizer.special_ids = {}
    with pytest.raises(DataError, match="no chat template"):
        chat_template_of(tokenizer)


# Ctrl-C


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(chat_engine):
    params = SamplingParams(max_tokens=300, temperature=0.0, ignore_eos=True)
    conversation = Conversation(chat_engine, params, Recorder(5, press_ctrl_c))
    answer = conversation.ask("the cat")
    assert answer.finish_reason == "cancelled" and 5 <= len(answer.tokens) < 300
    assert conversation.messages[-1] == {"role": "assistant", "content": answer.text}
    following = conversation.ask("and")
    assert following.usage.cached_tokens >= answer.usage.prompt_tokens - 1
    assert chat_engine.counters().running == 0


def test_second_ctrl_c_leaves(chat_engine):
    def press_twice():
        press_ctrl_c()
        press_ctrl_c()

    params = SamplingParams(max_tokens=1500, temperature=0.0, ignore_eos=True)
    display = Recorder(5, press_twice)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        Conversation(chat_engine, params, display).ask("the cat")
    assert display.is_finished and signal.getsignal(signal.SIGINT) is before


# The keyboard


def console():
    return Console(file=io.StringIO(), force_terminal=True, width=100)


@pytest.fixture
def keyboard(chat_engine):
    """Return a keyboard, and what its console shows so far."""
    screen = console()
    conversation = Conversation(chat_engine, GREEDY, TerminalDisplay(screen))
    return Keyboard(conversation, screen), conversation, screen.file.getvalue


def type_lines(monkeypatch, *lines):
    """Let `input` give these lines; an exception is raised, and the end is Ctrl-D."""
    remaining = [*lines, EOFError]

    def give(prompt):
        line = remaining.pop(0)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(builtins, "input", give)
    return remaining


def test_lines_are_answered_until_ctrl_d(keyboard, monkeypatch):
    keys, conversation, shown = keyboard
    type_lines(monkeypatch, "the cat", "", "and the hat")
    keys.run()
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"] * 2
    assert printable(conversation.messages[1]["content"]) in shown()


def test_ctrl_c_at_the_prompt_leaves_the_second_time(keyboard, monkeypatch):
    keys, conversation, shown = keyboard
    left = type_lines(monkeypatch, KeyboardInterrupt, "the cat", *[KeyboardInterrupt] * 2, "more")
    keys.run()
    assert left == ["more", EOFError] and len(conversation.messages) == 2
    assert shown().count("Ctrl-C again leaves") == 2


def test_ctrl_c_after_a_stopped_answer_leaves(chat_engine, monkeypatch):
    params = SamplingParams(max_tokens=1500, temperature=0.0, ignore_eos=True)
    screen = console()
    conversation = Conversation(chat_engine, params, Recorder(5, press_ctrl_c))
    left = type_lines(monkeypatch, "the cat", KeyboardInterrupt, "more")
    Keyboard(conversation, screen).run()
    assert left == ["more", EOFError]
    assert "(stopped; Ctrl-C again leaves)" in screen.file.getvalue()


def test_help_lists_every_command(keyboard):
    keys, _, shown = keyboard
    keys.take("/help")
    assert all(
        f"/{name}" in shown() for name in ["help", "reset", "system", "file", "save", "stats"]
    )


def test_path_is_no_command_and_a_wrong_command_is_not_sent(keyboard):
    keys, conversation, shown = keyboard
    keys.take("/etc/hosts is a file")
    assert len(conversation.messages) == 2
    keys.take("/nope")
    keys.take("/reset now")
    assert len(conversation.messages) == 2
    assert "/nope is no command" in shown() and "/reset takes nothing after it" in shown()


def test_system_and_reset(keyboard):
    keys, conversation, _ = keyboard
    keys.take("/system be brief")
    keys.take("the cat")
    assert conversation.messages[0] == {"role": "system", "content": "be brief"}
    keys.take("/reset")
    assert len(conversation.messages) == 1
    keys.take("/system")
    assert conversation.messages == []


def test_file_stands_before_the_next_message_only(keyboard, tmp_path):
    keys, conversation, shown = keyboard
    (tmp_path / "a.txt").write_text("a hat\n")
    keys.take(f"/file {tmp_path}/a.txt")
    keys.take("what is it?")
    keys.take("sure?")
    asked = [message["content"] for message in conversation.messages if message["role"] == "user"]
    assert asked == ["File: a.txt\n```\na hat\n```\n\nwhat is it?", "sure?"]
    assert "1 of 1 files: " in shown()


def test_folder_can_be_attached(keyboard, tmp_path):
    keys, conversation, shown = keyboard
    (tmp_path / "a.txt").write_text("a hat\n")
    (tmp_path / "b.bin").write_bytes(b"\0")
    keys.take(f"/file {tmp_path}")
    keys.take("what?")
    assert conversation.messages[0]["content"].startswith("File: a.txt\n")
    assert "1 of 2 files: " in shown()


def test_errors_are_told_and_the_talk_goes_on(keyboard, tmp_path):
    keys, conversation, shown = keyboard
    keys.take("/file /nowhere")
    keys.take("/save")
    keys.take("cat " * 3000)
    keys.take("the cat")
    assert "'/nowhere' cannot be read" in shown() and "needs the name of a file" in shown()
    assert "requests may have 2,048" in shown() and len(conversation.messages) == 2


def test_saved_conversation_can_be_read_and_learned_from(keyboard, tmp_path):
    keys, conversation, shown = keyboard
    keys.take("/system be brief")
    keys.take("the cat")
    keys.take(f"/save {tmp_path}/talk.jsonl")
    keys.take(f"/save {tmp_path}/talk.md")
    (dialogue,) = DialogueFile(tmp_path / "talk.jsonl")
    assert list(dialogue.messages) == conversation.messages
    text = (tmp_path / "talk.md").read_text()
    assert text.startswith("## system\n\nbe brief\n\n## user\n\nthe cat\n\n## assistant\n\n")
    keys.take(f"/save {tmp_path}/talk.md")
    assert "exists; give another name" in shown()


def test_stats_tell_what_the_answer_took(keyboard):
    keys, conversation, shown = keyboard
    keys.take("/stats")
    keys.take("the cat")
    keys.take("/stats")
    usage = conversation.last.usage
    assert "nothing was answered yet" in shown()
    assert f"{usage.prompt_tokens} prompt tokens, 0 of them cached; first token after" in shown()
    assert "tokens/s; " in shown() and " of 2,048 tokens used" in shown()


# Displays

THOUGHTS = [(Delta(reasoning="I "), 1), (Delta(reasoning="think"), 2), (Delta(), 1)]
ANSWER = [(Delta(content="It is"), 1), (Delta(content=" so."), 1)]


def play(display, deltas):
    for delta, num_tokens in deltas:
        display.show(delta, num_tokens)
    display.finish()


def test_thoughts_are_dimmed_in_a_terminal():
    screen = console()
    play(TerminalDisplay(screen), [*THOUGHTS, *ANSWER])
    dim, reset = "\x1b[2m", "\x1b[0m"
    expected = f"{dim}I {reset}{dim}think{reset}\n\nIt is so.\n"
    assert screen.file.getvalue() == expected


def test_folded_thoughts_are_counted():
    screen = console()
    play(TerminalDisplay(screen, show_thinking=False), [*THOUGHTS, *ANSWER])
    shown = screen.file.getvalue()
    assert "(thought for 4 tokens)" in shown and shown.endswith("It is so.\n")
    assert "I think" not in shown and "\x1b[2mI " not in shown


@pytest.mark.parametrize(
    ("show_thinking", "expected"),
    [(False, "It is so.\n"), (True, "<think>I think</think>\nIt is so.\n")],
)
def test_plain_display_writes_text_alone(show_thinking, expected):
    pieces = []
    play(PlainDisplay(pieces.append, show_thinking), [*THOUGHTS, *ANSWER])
    assert "".join(pieces) == expected


def test_model_cannot_steer_the_terminal():
    screen = console()
    play(TerminalDisplay(screen), [(Delta(content="a\x1b]0;x\x07[bold]\x9b2J\tb\r\nc"), 1)])
    assert screen.file.getvalue() == "a\ufffd]0;x\ufffd[bold]\ufffd2J\tb\nc\n".expandtabs(8)


def test_long_prompt_shows_a_bar_that_vanishes(monkeypatch):
    screen = console()
    display = TerminalDisplay(screen)
    for processed in (100, 2148, 4196, 9999):
        display.show_progress(Progress(processed, 10_000, 100))
    play(display, ANSWER)
    shown = screen.file.getvalue()
    assert "4196/10000" in shown.replace(" ", "") and "tokens/s" in shown and "left" in shown
    assert shown.endswith("\x1b[1A\x1b[2KIt is so.\n")


def test_bar_is_a_line_now_and_then_elsewhere(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    file = io.StringIO()
    bar = PromptBar(Console(file=file, width=200))
    for processed in range(0, 10_000, 1000):
        bar.show(Progress(processed, 10_000, 0))
        now[0] += 4.0
    assert file.getvalue().splitlines() == [
        "3,000 of 10,000 tokens, 250 tokens/s, 28s left",
        "6,000 of 10,000 tokens, 250 tokens/s, 16s left",
        "9,000 of 10,000 tokens, 250 tokens/s, 4s left",
    ]


# The command


def test_help_has_an_example_that_parses(capsys):
    with pytest.raises(SystemExit):
        main(["chat", "--help"])
    example = " ".join(capsys.readouterr().out.split()).rpartition("Example: linnet ")[2]
    assert build_parser().parse_args(shlex.split(example)).verb == "chat"


def test_lines_of_a_pipe_are_turns_and_answers_are_all_that_is_written(
    chat_folder, capsys, monkeypatch
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n\n/help\n"))
    options = ["--max-tokens", "20", "--temperature", "0", "--dtype", "float32", "--stats"]
    assert main(["chat", str(chat_folder), *options]) == 0
    output = capsys.readouterr()
    model = linnet.load(chat_folder, dtype="float32")
    prompt = encode_chat(model.tokenizer, [user("the cat")])
    first = linnet.generate(model, prompt, max_tokens=20, temperature=0.0)
    # A command is a line like any other here: what comes through a pipe must not write files.
    assert output.out.startswith(f"{first}\n") and len(output.out) > len(first) + 5
    assert output.err.count("first token after") == 2 and "commands" not in output.out


def test_ctrl_c_ends_a_pipe(chat_folder, capsys, monkeypatch):
    class Lines(io.StringIO):
        def __next__(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Lines("the cat\n"))
    assert main(["chat", str(chat_folder)]) == 130


def test_wrong_options_are_refused_before_anything_is_loaded(capsys):
    assert main(["chat", "none/model", "--top-p", "2"]) == 1
    assert "top_p is 2.0" in capsys.readouterr().err


@pytest.mark.slow
def test_talk_in_a_real_terminal(chat_folder, tmp_path):
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "linnet", "chat", str(chat_folder), "--max-tokens", "4000"]
    process = subprocess.Popen(
        [*command, "--seed", "1", "--temperature", "0"],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        env={**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"},
    )
    os.close(terminal)
    seen = bytearray()

    def wait_for(text):
        deadline = time.monotonic() + 60
        while text not in seen and time.monotonic() < deadline:
            if select.select([controller], [], [], 0.1)[0]:
                seen.extend(os.read(controller, 65536))
        assert text in seen, seen
        del seen[: seen.index(text) + len(text)]

    try:
        wait_for(b"Ctrl-D leaves")
        wait_for(b"> ")
        os.write(controller, b"the cat\n")
        wait_for(b"the cat\r\n")
        while len(seen) < 20:  # until some of the answer is there
            seen.extend(os.read(controller, 65536))
        os.write(controller, b"\x03")
        wait_for(b"(stopped; Ctrl-C again leaves)")
        wait_for(b"> ")
        os.write(controller, f"/save {tmp_path}/talk.jsonl\n".encode())
        wait_for(b"2 messages in")
        wait_for(b"> ")
        os.write(controller, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)
    (line,) = (tmp_path / "talk.jsonl").read_text().splitlines()
    assert json.loads(line)["messages"][0] == user("the cat")
