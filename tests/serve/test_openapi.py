"""The OpenAPI document is true: whatever fits it, or does not, is answered as it says."""

import json
import re
from collections.abc import Iterator

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

from linnet.infer.engine import EngineSettings
from linnet.serve import create_app

ENGINE = EngineSettings(max_sequences=8, max_model_len=96, memory_bytes=64 << 20)
OPERATIONS = [
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/responses",
    "POST /v1/messages",
    "POST /v1/messages/count_tokens",
    "POST /tokenize",
    "POST /detokenize",
    "GET /v1/models/{model}",
    "GET /v1/models",
    "GET /metrics",
    "GET /health",
    "GET /ready",
]


@pytest.fixture(scope="module")
def small(make_engine, serve) -> Iterator:
    with serve(make_engine(ENGINE)) as address:
        yield address


@pytest.fixture(scope="module")
def document(scripted):
    return create_app(scripted("a")).openapi()


def fuzz(document, url: str, operation: str, mode: GenerationMode, examples: int) -> None:
    method, path = operation.split()
    schema = schemathesis.openapi.from_dict(document)
    checks = [not_a_server_error, status_code_conformance, content_type_conformance]
    checks.append(response_schema_conformance)

    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=schema[path][method].as_strategy(generation_mode=mode))
    def send(case) -> None:
        if isinstance(case.body, dict):
            # Else nearly all requests would be for a model that is not there.
            case.body.pop("model", None)
        response = case.call(base_url=url)
        case.validate_response(response, checks=checks)

    send()


def test_every_operation_is_fuzzed(document):
    found = [f"{m.upper()} {path}" for path, item in document["paths"].items() for m in item]
    assert sorted(found) == sorted(OPERATIONS)


def test_every_reference_leads_somewhere(document):
    text = json.dumps(document)
    names = set(re.findall(r'"#/components/schemas/([^"]+)"', text))
    assert names <= document["components"]["schemas"].keys() and len(names) > 40
    assert "$defs" not in text


def test_refusals_are_documented_as_they_are(document):
    for path, item in document["paths"].items():
        for method, operation in item.items():
            answers = operation["responses"]
            assert "422" not in answers
            if method == "post":
                shape = "MessageError" if path.startswith("/v1/messages") else "Error"
                for status in ("400", "401", "404", "413", "503"):
                    schema = answers[status]["content"]["application/json"]["schema"]
                    assert schema == {"$ref": f"#/components/schemas/{shape}"}


@pytest.mark.parametrize(
    "operation", ["POST /v1/completions", "POST /detokenize", "GET /v1/models"]
)
def test_answers_are_as_documented(document, small, operation):
    fuzz(document, small.url, operation, GenerationMode.POSITIVE, examples=2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.name.lower())
@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_request_makes_the_document_wrong(document, small, operation, mode):
    if mode == GenerationMode.NEGATIVE and operation.startswith("GET"):
        pytest.skip("without a body, every request is a valid one")
    fuzz(document, small.url, operation, mode, examples=30)
