"""What stands around the APIs: keys, hosts, limits, overload, stopping, the page, metrics."""

import asyncio
import json
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest
from fastapi import FastAPI

from linnet.errors import ConfigError
from linnet.infer.engine import EngineSettings
from linnet.serve import ServerSettings, create_app
from linnet.serve.page import page_routes

CHAT = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 4}
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def secured(scripted, serve):
    keys = ("first-key", "second-key")
    with serve(scripted("hello"), api_keys=keys, max_body_bytes=10_000) as address:
        yield address


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": "first-key"}, 401),
        ({"authorization": "Bearer first-keys"}, 401),
        ({"authorization": "Bearer first-key"}, 200),
        ({"authorization": "bearer second-key"}, 200),
        ({"x-api-key": "second-key"}, 200),
        ({"x-api-key": ""}, 401),
        ({"authorization": b"Bearer \xff\xfe"}, 401),
    ],
    ids=str,
)
def test_key_is_asked_for(secured, headers, status):
    with secured.http() as http:
        response = http.get("/v1/models", headers=headers)
        assert response.status_code == status
        for path in (PATH, "/tokenize", "/metrics"):
            method = "GET" if path == "/metrics" else "POST"
            assert (http.request(method, path, headers=headers).status_code == 401) == (
                status == 401
            )


def test_wrong_key_is_told_as_the_sdk_expects(secured):
    with secured.openai("wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert caught.value.code == "invalid_api_key" and "wrong'" not in str(caught.value)
    with secured.openai("first-key") as client:
        assert client.models.list().data[0].id == "tiny"
        assert client.models.retrieve("tiny").max_model_len == 2048


def test_what_needs_no_key(secured):
    with secured.http() as http:
        for path in ("/health", "/ready", "/docs", "/openapi.json"):
            assert http.get(path).status_code == 200


def test_keys_stay_out_of_what_is_shown():
    assert "secret" not in repr(ServerSettings(api_keys=("secret-key",)))


@pytest.mark.parametrize("key", ["short", "with a space", "schlüssel-x"])
def test_key_that_cannot_be_sent_is_refused(key):
    with pytest.raises(ConfigError, match="API key"):
        ServerSettings(api_keys=(key,))


@pytest.mark.parametrize("is_declared", [True, False], ids=["declared", "chunked"])
def test_body_that_is_too_large_is_refused(secured, is_declared):
    content = json.dumps(CHAT | {"user": "x" * 20_000}).encode()
    headers = {"authorization": "Bearer first-key", "content-type": "application/json"}
    pieces = (content[start : start + 1000] for start in range(0, len(content), 1000))
    with secured.http() as http:
        response = http.post(PATH, content=content if is_declared else pieces, headers=headers)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


def test_bodies_that_are_too_large_together_are_put_off(scripted, serve):
    with serve(scripted("a"), max_buffered_bytes=1000) as address, address.http() as http:
        response = http.post(PATH, json=CHAT | {"user": "x" * 2000})
        assert response.status_code == 503 and response.headers["retry-after"] == "1"
        assert http.post(PATH, json=CHAT).status_code == 200
        assert http.post(PATH, json=CHAT | {"user": "x" * 600}).status_code == 200


def test_body_that_stays_away_is_given_up(scripted, serve):
    with serve(scripted("a"), body_timeout_s=0.1) as address:
        host, port = address.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{{".encode()
            )
            assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    ("host", "allowed", "status"),
    [
        ("localhost:8000", (), 200),
        ("LOCALHOST", (), 200),
        ("127.0.0.1", (), 200),
        ("[::1]:80", (), 200),
        ("app.localhost", (), 200),
        ("evil.example", (), 403),
        ("127.0.0.1.evil.example", (), 403),
        ("localhost.evil.example", (), 403),
        ("", (), 403),
        ("llm.example", ("llm.example",), 200),
        ("localhost", ("llm.example",), 200),
        ("evil.example", None, 200),
    ],
)
def test_only_known_hosts_are_answered(scripted, host, allowed, status):
    app = create_app(scripted("a"), ServerSettings(allowed_hosts=allowed))
    (response,) = call(app, ("GET", "/health", {"headers": {"host": host}}))
    assert response.status_code == status
    if status == 403:
        assert response.json()["error"]["code"] == "host_not_allowed"


def test_browsers_of_other_origins_are_let_in_only_when_told(scripted):
    asked = {
        "origin": "https://app.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    preflight = ("OPTIONS", PATH, {"headers": asked})
    evil = ("OPTIONS", PATH, {"headers": asked | {"origin": "https://evil.example"}})
    post = ("POST", PATH, {"json": CHAT, "headers": {"origin": "https://app.example"}})
    allowed = "access-control-allow-origin"
    for answer in call(create_app(scripted("a")), preflight, evil, post):
        assert allowed not in answer.headers
    settings = ServerSettings(allow_origins=("https://app.example",), api_keys=("first-key",))
    answers = call(create_app(scripted("a"), settings), preflight, evil, post)
    assert [answer.status_code for answer in answers] == [200, 400, 401]
    origins = [answer.headers.get(allowed) for answer in answers]
    assert origins == ["https://app.example", None, "https://app.example"]


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"{", "application/json", "the body is not valid JSON"),
        (b"", "application/json", "Field required"),
        (b"[1]", "application/json", "Input should be a valid dictionary"),
        (b'{"messages": NaN}', "application/json", "the body is not valid JSON"),
        (b'{"model": "\\ud800"}', "application/json", "the body is not valid JSON"),
        (b'{"model": "\xff"}', "application/json", "the body is not valid JSON"),
        (b"[" * 100_000, "application/json", "the body is not valid JSON"),
        (b'{"a":' * 100_000, "application/json", "the body is not valid JSON"),
        (json.dumps(CHAT).encode(), "text/plain", "Content-Type: application/json"),
        (b'{"seed": ' + b"9" * 10_000 + b"}", "application/json", ""),
    ],
    ids=lambda value: str(value)[:30],
)
def test_body_that_is_no_request_is_a_400(http, content, kind, message):
    response = http.post(PATH, content=content, headers={"content-type": kind})
    error = response.json()["error"]
    assert response.status_code == 400 and message in error["message"]
    assert error["type"] == "invalid_request_error"


def test_schema_nested_deeply_is_no_500(http):
    schema = {"type": "string"}
    for _ in range(150):
        schema = {"type": "object", "properties": {"a": schema}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    body = CHAT | {"tools": tools, "tool_choice": "required"}
    assert http.post(PATH, json=body).status_code in (200, 400)


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", PATH, 405)]
)
def test_wrong_path_or_method_has_the_shape_of_an_error(http, method, path, status):
    response = http.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_every_answer_has_an_id_of_its_own(http):
    ids = [http.get(path).headers["x-request-id"] for path in ("/health", "/health", "/nowhere")]
    assert len(set(ids)) == 3 and all(re.fullmatch("req_[0-9a-f]{24}", i) for i in ids)


def test_failure_of_the_server_itself_is_a_500_with_the_id(scripted, serve, caplog):
    engine = scripted("a")
    del engine.max_model_len
    with serve(engine) as address, address.http() as http:
        response = http.get("/v1/models")
    assert response.status_code == 500
    assert response.headers["x-request-id"] in response.json()["error"]["message"]
    assert "AttributeError" in caplog.text and "AttributeError" not in response.text


def test_tokens_and_text_turn_into_each_other(http, tokenizer):
    answer = http.post("/tokenize", json={"prompt": "the 🦜", "return_token_strs": True}).json()
    assert answer["tokens"] == [tokenizer.begin_of_document_id, *tokenizer.encode("the 🦜")]
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 2048
    text = http.post("/detokenize", json={"tokens": answer["tokens"]}).json()["prompt"]
    assert text == "<begin_of_document>the 🦜"
    chat = http.post("/tokenize", json={"messages": CHAT["messages"]}).json()
    usage = http.post(PATH, json=CHAT).json()["usage"]
    assert chat["count"] == usage["prompt_tokens"]
    for body in ({}, {"prompt": "a", "messages": CHAT["messages"]}):
        assert http.post("/tokenize", json=body).status_code == 400
    assert http.post("/detokenize", json={"tokens": [10**6]}).status_code == 400


def test_long_prompt_can_be_counted(http):
    body = {"messages": [{"role": "user", "content": "zq " * 4000}]}
    assert http.post("/tokenize", json=body).json()["count"] > 2048


def test_metrics_tell_what_happened(make_engine, serve):
    with serve(make_engine()) as address, address.http() as http:
        long = CHAT | {"messages": [{"role": "user", "content": "the cat " * 20}]}
        for _ in range(2):
            http.post(PATH, json=long | {"ignore_eos": True})
        text = http.get("/metrics").text
    values = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            values[name] = float(value)
    assert values["linnet_completion_tokens_total"] == 8
    assert values['linnet_finished_total{reason="length"}'] == 2
    assert values["linnet_time_to_first_token_seconds_count"] == 2
    assert values["linnet_inter_token_latency_seconds_count"] == 6
    assert values["linnet_queue_time_seconds_count"] == 2
    assert values[f'linnet_http_requests_total{{path="{PATH}",status="200"}}'] == 2
    assert values["linnet_prefix_hits_total"] == 1
    assert values['linnet_prefix_misses_total{reason="not kept"}'] == 1
    assert values["linnet_planned_bytes"] == address.engine.plan.total_bytes
    assert values["linnet_resident_bytes"] > 0
    assert values["linnet_kv_pages_total"] > 0 == values["linnet_waiting"]


def test_overload_is_a_503_that_says_when_to_come_again(make_engine, serve):
    settings = EngineSettings(
        max_sequences=1, max_model_len=2048, memory_bytes=64 << 20, max_queued_requests=2
    )
    body = CHAT | {"max_tokens": 60, "ignore_eos": True}
    with serve(make_engine(settings)) as address, address.http() as http:
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda _: http.post(PATH, json=body), range(12)))
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 503} and statuses.count(200) >= 2
        for answer in answers:
            if answer.status_code == 200:
                assert answer.json()["usage"]["completion_tokens"] == 60
            else:
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["type"] == "server_error"
        assert http.post(PATH, json=body).status_code == 200


def test_sdk_comes_again_after_a_503(make_engine, serve):
    settings = EngineSettings(
        max_sequences=1, max_model_len=2048, memory_bytes=64 << 20, max_queued_requests=1
    )
    with serve(make_engine(settings)) as address, address.openai() as client:
        patient = client.with_options(max_retries=8)

        def ask(_):
            return patient.chat.completions.create(
                model="tiny", messages=CHAT["messages"], max_tokens=20
            )

        with ThreadPoolExecutor(4) as pool:
            assert all(answer.choices for answer in pool.map(ask, range(4)))


def test_disconnects_free_everything(make_engine, serve):
    settings = EngineSettings(
        max_sequences=4, max_model_len=2048, memory_bytes=64 << 20, prefix_cache=False
    )
    body = CHAT | {"max_tokens": 2000, "ignore_eos": True, "n": 2, "stream": True}
    with serve(make_engine(settings)) as address, address.http() as http:

        def leave(index):
            with http.stream("POST", PATH, json=body | {"seed": index}) as response:
                next(response.iter_raw())

        with ThreadPoolExecutor(5) as pool:
            list(pool.map(leave, range(100)))
        deadline = time.monotonic() + 30
        while (counters := address.engine.counters()).running + counters.waiting:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert counters.finished_total["cancelled"] == 200
        assert (counters.kv_pages_used, counters.state_slots_used) == (0, 0)


@pytest.fixture
def draining(make_engine, serve):
    """Return a function that starts a long request, asks the server to drain, and gives both."""

    def start(address, http):
        body = CHAT | {"max_tokens": 300, "ignore_eos": True}
        pool = ThreadPoolExecutor(1)
        running = pool.submit(http.post, PATH, json=body)
        while not address.engine.counters().running:
            time.sleep(0.005)
        address.server.handle_exit(signal.SIGTERM, None)
        while not address.engine.is_draining:
            time.sleep(0.005)
        return running

    return start


def test_draining_finishes_what_runs_and_refuses_the_rest(make_engine, serve, draining):
    engine = make_engine()
    # Long enough for a slow machine: the answer is what ends the drain.
    with serve(engine, drain_s=60) as address, address.http() as http, address.http() as other:
        running = draining(address, http)
        refused = other.post(PATH, json=CHAT)
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        assert other.get("/ready").json() == {"status": "draining"}
        assert other.get("/ready").status_code == 503 and other.get("/health").status_code == 200
        assert running.result().json()["usage"]["completion_tokens"] == 300
        address.thread.join(5)
        assert not address.thread.is_alive()


def test_drain_time_ends_what_still_runs(make_engine, serve, draining):
    with serve(make_engine(), drain_s=0.05) as address, address.http() as http:
        running = draining(address, http)
        assert running.result().status_code in (200, 503)
        address.thread.join(5)
        assert not address.thread.is_alive()


def test_second_signal_does_not_wait(make_engine, serve, draining):
    with serve(make_engine(), drain_s=60) as address, address.http() as http:
        running = draining(address, http)
        address.server.handle_exit(signal.SIGTERM, None)
        assert running.result(timeout=10).status_code in (200, 503)
        address.thread.join(5)
        assert not address.thread.is_alive()


def test_failed_engine_is_not_healthy(scripted, serve):
    engine = scripted("a")
    with serve(engine) as address, address.http() as http:
        engine.is_healthy = False
        for path in ("/health", "/ready"):
            response = http.get(path)
            assert (response.status_code, response.json()) == (503, {"status": "failed"})


def test_model_without_a_tokenizer_is_refused(scripted):
    engine = scripted("a")
    engine.model.tokenizer = None
    with pytest.raises(ConfigError, match="no tokenizer"):
        create_app(engine)


def test_docs_show_every_path_without_a_script(http):
    page = http.get("/docs")
    paths = http.get("/openapi.json").json()["paths"]
    assert all(path in page.text for path in paths) and len(paths) >= 11
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert "<script" not in page.text and "http://" not in page.text


def test_page_is_served_with_right_types_and_a_strict_policy(tmp_path):
    (tmp_path / "js").mkdir()
    for name in ("index.html", "js/app.js", "style.css", "LICENSE.thing", ".hidden", "icon.svg"):
        (tmp_path / name).write_text(f"content of {name}")
    (tmp_path.parent / "outside.txt").write_text("secret")
    app = FastAPI()
    app.include_router(page_routes(tmp_path))
    files = ["/", "/js/app.js", "/style.css", "/LICENSE.thing", "/icon.svg"]
    answers = call(app, *(("GET", path, {}) for path in files))
    assert [answer.headers["content-type"] for answer in answers] == [
        "text/html; charset=utf-8",
        "text/javascript; charset=utf-8",
        "text/css; charset=utf-8",
        "text/plain; charset=utf-8",
        "image/svg+xml",
    ]
    assert answers[0].text == "content of index.html"
    outside = ["/.hidden", "/../outside.txt", "/js/%2e%2e/%2e%2e/outside.txt", "/js"]
    refused = call(app, *(("GET", path, {}) for path in outside))
    assert [answer.status_code for answer in refused] == [404] * 4


def test_page_is_fetched_again_only_when_it_changed(http):
    if not http.get("/").is_success:
        pytest.skip("the page is not built")
    first = http.get("/")
    assert "default-src 'none'" in first.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in first.headers["content-security-policy"]
    again = http.get("/", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def call(app, *requests: tuple[str, str, dict]) -> list[httpx2.Response]:
    """Return the answers of an application that is served nowhere."""

    async def call_all() -> list[httpx2.Response]:
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://a") as client:
            return [await client.request(method, path, **rest) for method, path, rest in requests]

    return asyncio.run(call_all())
