"""`linnet chat`: talk with a model in the terminal."""

import argparse
import sys
from typing import TYPE_CHECKING

from linnet.cli.options import add_model_options, add_sampling_options, load, sampling_params

if TYPE_CHECKING:
    from linnet.infer import Engine, SamplingParams


def add_parser(verbs) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "chat",
        help="talk with a model in the terminal",
        description="Talk with a model in the terminal: Ctrl-C stops an answer, Ctrl-D leaves, "
        "/help lists what else there is. If standard input is no terminal, each of its lines is "
        "a turn, and only the answers are written.",
        epilog="Example: linnet chat models/nano --temperature 0.7 --stats",
    )
    parser.add_argument(
        "model", nargs="?", default="bundled", help="model folder (default: %(default)s)"
    )
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    parser.add_argument(
        "--thinking",
        choices=("show", "fold"),
        help="what the model thinks: dimmed, or only how much it is (default: show in a terminal)",
    )
    parser.add_argument("--stats", action="store_true", help="tell the speed after each answer")
    add_model_options(parser)
    add_sampling_options(parser, temperature=0.8)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Talk until there is nothing more to say."""
    from linnet.infer import Engine, EngineSettings
    from linnet.text import chat_template_of

    params = sampling_params(args)
    model = load(args)
    chat_template_of(model.tokenizer)
    engine = Engine(model, EngineSettings(max_sequences=1, max_model_len=args.max_model_len))
    engine.start()
    try:
        if sys.stdin.isatty() and sys.stdout.isatty():
            _talk(engine, args, params)
        else:
            _answer_lines(engine, args, params)
    finally:
        engine.stop()
    return 0


def _talk(engine: "Engine", args: argparse.Namespace, params: "SamplingParams") -> None:
    from rich.console import Console

    from linnet.cli.conversation import Conversation
    from linnet.cli.keyboard import Keyboard
    from linnet.cli.screen import TerminalDisplay

    console = Console(highlight=False)
    display = TerminalDisplay(console, show_thinking=args.thinking != "fold")
    conversation = Conversation(engine, params, display, args.system)
    num_parameters = sum(parameter.numel() for parameter in engine.model.parameters())
    console.print(
        f"{args.model}: {num_parameters:,} parameters, up to {engine.max_model_len:,} tokens. "
        "/help lists the commands, Ctrl-D leaves.",
        style="dim",
        markup=False,
        soft_wrap=True,
    )
    Keyboard(conversation, console, show_figures=args.stats).run()


def _answer_lines(engine: "Engine", args: argparse.Namespace, params: "SamplingParams") -> None:
    from linnet.cli.answering import figures
    from linnet.cli.conversation import Conversation
    from linnet.cli.screen import PlainDisplay, write_out

    display = PlainDisplay(write_out, show_thinking=args.thinking == "show")
    conversation = Conversation(engine, params, display, args.system)
    for line in sys.stdin:
        if not line.strip():
            continue
        answer = conversation.ask(line.strip())
        if args.stats:
            print(figures(answer.usage), file=sys.stderr)
        if answer.finish_reason == "cancelled":
            raise KeyboardInterrupt
