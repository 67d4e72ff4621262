"""`linnet serve`: what it prints, answers and refuses, and how it ends."""

import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx2
import pytest

import linnet
from linnet.cli import build_parser, main, serve
from linnet.text import Tokenizer

PROMPT = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 5}
SIZE = ["--max-model-len", "512", "--memory-gib", "0.2", "--dtype", "float32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = linnet.load("nano", dtype="float32")
    model.tokenizer = Tokenizer.train(["user name ai assistant the cat and the hat"], 290)
    folder = tmp_path_factory.mktemp("models") / "cat"
    model.save(folder)
    return folder


@pytest.fixture
def _survives_sigterm():
    """Keep the signal from ending the tests where the server does not take it."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("_survives_sigterm")
def test_server_answers_until_it_is_told_to_stop(folder, capsys, monkeypatch):
    monkeypatch.setenv(serve.KEY_VARIABLE, "key-of-mine")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with ThreadPoolExecutor(1) as pool:
        client = pool.submit(use_and_stop, url)
        arguments = ["serve", str(folder), "--port", url.rpartition(":")[2], *SIZE]
        assert main(arguments) == 0
        unauthorized, models, answer = client.result()
    assert unauthorized.status_code == 401
    assert models.json()["data"][0]["id"] == "cat"
    assert answer.json()["usage"]["completion_tokens"] > 0
    out = capsys.readouterr().out
    assert "model   cat: " in out and " parameters, float32\n" in out
    assert "memory  " in out and "requests up to 512 tokens" in out
    assert "access  1 API key\n" in out and "key-of-mine" not in out
    assert f"serving {url} " in out


def use_and_stop(url: str) -> list[httpx2.Response]:
    """Make some requests once the server is there, then tell this process to stop it."""
    try:
        headers = {"authorization": "Bearer key-of-mine"}
        with httpx2.Client(base_url=url, timeout=60) as http:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                with suppress(httpx2.ConnectError):
                    http.get("/ready")
                    break
                time.sleep(0.05)
            return [
                http.get("/v1/models"),
                http.get("/v1/models", headers=headers),
                http.post("/v1/chat/completions", json=PROMPT, headers=headers),
            ]
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


def test_address_that_is_taken_is_told_before_anything_is_loaded(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "none/model", "--port", str(port)]) == 1
    error = capsys.readouterr().err
    assert f"cannot listen at 127.0.0.1, port {port}: Address already in use" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none/model"], "model folder 'none/model' does not exist"),
        (["nano", "--max-model-len", "64", "--memory-gib", "0.1"], "the model has no tokenizer"),
        (["nano", "--port", "70000"], "--port is 70000"),
        (["nano", "--host", "256.0.0.1"], "cannot listen at 256.0.0.1"),
        (["nano", "--api-key", "short"], "an API key is shorter than 8 characters"),
        (["nano", "--max-body-mib", "0"], "max_body_bytes is 0"),
        (["nano", "--max-sequences", "0"], "max_sequences is 0"),
        (["nano", "--memory-gib", "0.000001"], "Allow fewer sequences"),
    ],
    ids=str,
)
def test_error_is_one_line(arguments, message, capsys):
    port = [] if "--port" in arguments else ["--port", "0"]
    assert main(["serve", *arguments, *port]) == 1
    (line,) = [li for li in capsys.readouterr().err.splitlines() if li.startswith("linnet: error")]
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "keys", "hosts", "warns"),
    [
        ([], 0, (), False),
        (["--api-key", "key-number-one", "--api-key", "key-number-two"], 2, None, False),
        (["--host", "::1"], 0, (), False),
        (["--host", "localhost", "--allowed-host", "LLM.example"], 0, ("llm.example",), False),
        (["--host", "0.0.0.0"], 0, None, True),
        (["--host", "0.0.0.0", "--api-key", "key-number-one"], 1, None, False),
        (["--host", "0.0.0.0", "--allowed-host", "llm.example"], 0, ("llm.example",), True),
    ],
    ids=str,
)
def test_who_may_come_in(arguments, keys, hosts, warns, capsys, monkeypatch):
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    args = build_parser().parse_args(["serve", "models/cat", *arguments])
    settings = serve._server_settings(args)
    assert (len(settings.api_keys), settings.allowed_hosts) == (keys, hosts)
    assert settings.model_name == "cat"
    assert ("warning: everyone who reaches" in capsys.readouterr().err) == warns
