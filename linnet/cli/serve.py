"""`linnet serve`: a model behind the APIs of OpenAI and Anthropic, with a chat page."""

import argparse
import ipaddress
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from linnet.cli.options import (
    add_model_options,
    add_rank_options,
    follow,
    launch_of,
    load,
    load_over_ranks,
)
from linnet.errors import ConfigError

if TYPE_CHECKING:
    from linnet.infer.engine import Engine, EngineSettings
    from linnet.parallel.launch import Launch
    from linnet.serve import ServerSettings

KEY_VARIABLE = "LINNET_API_KEY"
GIB = 1 << 30


def add_parser(verbs) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a model over HTTP: OpenAI's chat, completions and responses, "
        "Anthropic's messages, and a chat page.",
        epilog="Example: linnet serve models/nano --port 8000 --max-model-len 65536",
    )
    parser.add_argument(
        "model", nargs="?", default="bundled", help="model folder or preset (default: %(default)s)"
    )
    add_model_options(parser)
    _add_http(parser.add_argument_group("HTTP"))
    _add_engine(parser.add_argument_group("engine"))
    add_rank_options(parser)
    parser.set_defaults(run=run)


def _add_http(group) -> None:
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: %(default)s)"
    )
    group.add_argument("--port", type=int, default=8000, help="0 takes any (default: %(default)s)")
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"what requests must show; repeatable. Others on this machine can see it: rather set "
        f"{KEY_VARIABLE}",
    )
    group.add_argument(
        "--allowed-host",
        action="append",
        metavar="NAME",
        help="host name that requests may use; repeatable. Without it, a server on localhost "
        "without a key answers to local names only",
    )
    group.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web page that may call the API from a browser, * for all; repeatable",
    )
    group.add_argument("--model-name", help="what requests call it (default: the folder's name)")
    group.add_argument(
        "--max-body-mib", type=int, default=32, help="largest request (default: %(default)s)"
    )
    group.add_argument(
        "--drain-s",
        type=float,
        default=30.0,
        help="time for running requests to finish on SIGTERM (default: %(default)s)",
    )


def _add_engine(group) -> None:
    group.add_argument(
        "--max-sequences", type=int, default=32, help="that run at once (default: %(default)s)"
    )
    group.add_argument(
        "--memory-gib",
        type=float,
        help="beside the weights, on each rank (default: a share of what is free)",
    )
    group.add_argument(
        "--chunk-tokens",
        type=int,
        default=512,
        help="of prompts per step, for each rank of --cp (default: %(default)s)",
    )
    group.add_argument("--max-queued-requests", type=int, default=128, help="default: %(default)s")
    group.add_argument("--no-prefix-cache", action="store_true", help="compute every prompt anew")
    group.add_argument("--spill-folder", help="where cached prefixes outlive the process")
    group.add_argument(
        "--spill-gib", type=float, default=4.0, help="for --spill-folder (default: %(default)s)"
    )
    group.add_argument(
        "--speculative-tokens",
        type=int,
        default=0,
        help="guesses from the text so far, verified in one step (default: 0)",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop."""
    launch = launch_of(args)
    if launch is not None and launch.rank:
        return follow(load_over_ranks(args, launch))
    with _listen(args.host, args.port) as listener:
        settings, engine_settings = _server_settings(args), _engine_settings(args)

        from linnet.serve import Server, create_app

        with _engine(args, engine_settings, launch) as engine:
            app = create_app(engine, settings)
            _describe(args, engine, settings)
            engine.start()
            Server(
                app, engine, drain_s=args.drain_s, on_start=lambda: _announce(args, listener)
            ).run(sockets=[listener])
    return 0


@contextmanager
def _engine(
    args: argparse.Namespace, settings: "EngineSettings", launch: "Launch | None"
) -> "Iterator[Engine]":
    """Load the model, over the ranks that were started if there are any."""
    from linnet.infer.engine import Engine

    ranks = None if launch is None else load_over_ranks(args, launch)
    try:
        engine = Engine(load(args) if ranks is None else ranks.model, settings, ranks)
        try:
            yield engine
        finally:
            engine.stop()
    finally:
        if ranks is not None:
            ranks.close()


def _listen(host: str, port: int) -> socket.socket:
    """Bind a socket before anything is loaded, which may take minutes."""
    if not 0 <= port < 65536:
        raise ConfigError(f"--port is {port}; it must lie in [0, 65535]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)  # without it, another process may bind the same port
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen at {host}, port {port}: {error.strerror}") from None
    return listener


def _server_settings(args: argparse.Namespace) -> "ServerSettings":
    from linnet.serve import ServerSettings

    keys = tuple(args.api_key) or tuple(filter(None, [os.environ.get(KEY_VARIABLE)]))
    is_local = _is_loopback(args.host)
    if not is_local and not keys:
        print(
            f"linnet: warning: everyone who reaches {args.host} can use this server; set "
            f"{KEY_VARIABLE} to ask for a key",
            file=sys.stderr,
        )
    hosts = tuple(name.lower() for name in args.allowed_host or ())
    return ServerSettings(
        model_name=args.model_name or os.path.basename(os.path.normpath(args.model)),
        api_keys=keys,
        allowed_hosts=hosts if hosts or (is_local and not keys) else None,
        allow_origins=tuple(args.allow_origin),
        max_body_bytes=args.max_body_mib << 20,
    )


def _engine_settings(args: argparse.Namespace) -> "EngineSettings":
    from pathlib import Path

    from linnet.infer.engine import EngineSettings

    return EngineSettings(
        max_sequences=args.max_sequences,
        max_model_len=args.max_model_len,
        memory_bytes=None if args.memory_gib is None else int(args.memory_gib * GIB),
        chunk_tokens=args.chunk_tokens,
        max_queued_requests=args.max_queued_requests,
        prefix_cache=not args.no_prefix_cache,
        spill_folder=None if args.spill_folder is None else Path(args.spill_folder),
        spill_bytes=int(args.spill_gib * GIB),
        speculative_tokens=args.speculative_tokens,
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _describe(args: argparse.Namespace, engine: "Engine", settings: "ServerSettings") -> None:
    """Tell what is served, and what memory it will take."""
    from linnet.model.cost import cost_of

    model = engine.model
    num_parameters = cost_of(model.config).params_total
    dtype = str(model.compute_dtype).removeprefix("torch.")
    weights = f"{dtype}, {args.quantization} weights" if args.quantization else dtype
    print(f"model   {settings.model_name}: {num_parameters:,} parameters, {weights}")
    if engine.ranks is not None:
        print(f"ranks   {engine.ranks}")
    print(f"memory  {engine.plan}")
    keys = len(settings.api_keys)
    print(f"access  {f'{keys} API key' + 's' * (keys > 1) if keys else 'without a key'}")


def _announce(args: argparse.Namespace, listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"serving http://{host}:{port}  (API below /v1, described at /docs)", flush=True)
