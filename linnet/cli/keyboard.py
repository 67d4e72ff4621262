"""What happens at the keyboard of `linnet chat`: lines, commands and Ctrl-C."""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from linnet.cli.answering import figures
from linnet.cli.conversation import Conversation, Message
from linnet.cli.screen import printable
from linnet.errors import DataError, LinnetError
from linnet.storage import write_atomic
from linnet.text.folder import pack_folder

PROMPT = "> "


class Keyboard:
    """Reads lines and answers them, until Ctrl-D or a second Ctrl-C.

    Args:
        conversation: what answers.
        console: a terminal.
        show_figures: tell the speed after each answer.
    """

    def __init__(
        self, conversation: Conversation, console: Console, show_figures: bool = False
    ) -> None:
        self._conversation, self._console = conversation, console
        self._show_figures = show_figures
        self._attached = ""
        self._commands: dict[str, tuple[Callable[[str], None], str, str]] = {
            "help": (self._help, "", "list the commands"),
            "reset": (self._reset, "", "forget what was said"),
            "system": (self._system, "TEXT", "tell the model something first; nothing clears it"),
            "file": (self._file, "PATH", "put a file or a folder before your next message"),
            "save": (self._save, "FILE", "write the conversation, as .jsonl or else as Markdown"),
            "stats": (self._stats, "", "tell the speed of the last answer and what room is left"),
        }

    def run(self) -> None:
        """Talk."""
        with suppress(ImportError):
            import readline  # noqa: F401 - gives `input` editing and a history

        num_interrupts = 0
        while num_interrupts < 2:
            try:
                line = input(PROMPT)
                num_interrupts = self.take(line)
            except EOFError:
                self._console.print()
                return
            except KeyboardInterrupt:
                num_interrupts += 1
                self._console.print("\nCtrl-C again leaves" if num_interrupts < 2 else "")

    def take(self, line: str) -> int:
        """Answer a line or do what it commands; return how often Ctrl-C has stopped something."""
        try:
            # A path is no command, although it begins like one.
            command = re.match(r"/([A-Za-z]*)(?:\s+(.*))?$", line.strip(), re.S)
            if command:
                self._command(command[1], (command[2] or "").strip())
            elif line.strip():
                return self._answer(line.strip())
        except (LinnetError, ValueError, OSError) as error:
            self._tell(str(error), "red")
        return 0

    def _answer(self, line: str) -> int:
        text, self._attached = self._attached + line, ""
        answer = self._conversation.ask(text)
        is_stopped = answer.finish_reason == "cancelled"
        if answer.finish_reason == "length":
            self._tell(f"(cut off after {answer.usage.completion_tokens:,} tokens)")
        elif is_stopped:
            self._tell("\n(stopped; Ctrl-C again leaves)")
        if self._show_figures:
            self._stats("")
        return int(is_stopped)

    def _command(self, name: str, argument: str) -> None:
        if name not in self._commands:
            raise DataError(f"/{name} is no command; /help lists them")
        run, wants, _ = self._commands[name]
        if argument and not wants:
            raise DataError(f"/{name} takes nothing after it")
        run(argument)

    def _help(self, _argument: str) -> None:
        for name, (_, wants, does) in self._commands.items():
            self._tell(f"{f'/{name} {wants}':15}{does}")
        self._tell("Ctrl-C stops an answer, Ctrl-D leaves.")

    def _reset(self, _argument: str) -> None:
        self._conversation.reset()
        self._attached = ""
        self._tell("forgotten")

    def _system(self, text: str) -> None:
        self._conversation.system = text or None
        self._tell("the model is told that first" if text else "the model is told nothing first")

    def _file(self, path: str) -> None:
        if not path:
            raise DataError("/file needs the path of a file or a folder")
        packed = pack_folder(Path(path).expanduser())
        text = "".join(file.text for file in packed.files)
        self._attached += text
        num_tokens = len(self._conversation.tokenizer.encode(text))
        count = f"{len(packed.files):,} of {len(packed.files) + len(packed.skipped):,} files"
        self._tell(f"{count}: {num_tokens:,} tokens before your next message")

    def _save(self, path: str) -> None:
        if not path:
            raise DataError("/save needs the name of a file")
        file = Path(path).expanduser()
        if file.exists():
            raise DataError(f"{path!r} exists; give another name")
        messages = self._conversation.messages
        write_atomic(
            file, _as_json(messages) if file.suffix == ".jsonl" else _as_markdown(messages)
        )
        self._tell(f"{len(messages)} messages in {path}")

    def _stats(self, _argument: str) -> None:
        last, engine = self._conversation.last, self._conversation.engine
        if last is None:
            self._tell("nothing was answered yet")
            return
        used = last.usage.prompt_tokens + last.usage.completion_tokens
        self._tell(f"{figures(last.usage)}; {used:,} of {engine.max_model_len:,} tokens used")

    def _tell(self, text: str, style: str = "dim") -> None:
        self._console.print(
            printable(text), style=style, markup=False, highlight=False, soft_wrap=True
        )


def _as_json(messages: list[Message]) -> str:
    """Return the line that `linnet sft` learns from."""
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def _as_markdown(messages: list[Message]) -> str:
    return "\n".join(f"## {message['role']}\n\n{message['content']}\n" for message in messages)
