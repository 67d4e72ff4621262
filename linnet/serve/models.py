"""The small endpoints: which model is served, its tokens, and how the server is."""

import asyncio

from fastapi import APIRouter, Request, Response

from linnet.serve.chat import conversation_of
from linnet.serve.conversation import encode_conversation
from linnet.serve.errors import bad_request
from linnet.serve.metrics import CONTENT_TYPE
from linnet.serve.routes import JSONRoute, responses
from linnet.serve.schemas.chat import ChatRequest
from linnet.serve.schemas.models import (
    DetokenizeAnswer,
    DetokenizeRequest,
    Health,
    ModelCard,
    ModelList,
    TokenizeAnswer,
    TokenizeRequest,
)
from linnet.serve.service import Service

router = APIRouter(route_class=JSONRoute)


@router.get("/v1/models", responses=responses(), summary="List the models", tags=["OpenAI"])
async def list_models(request: Request) -> ModelList:
    """Return the served models: one."""
    return ModelList(data=[_card(request.app.state.service)])


@router.get(
    "/v1/models/{model:path}", responses=responses(), summary="Describe a model", tags=["OpenAI"]
)
async def retrieve_model(request: Request, model: str) -> ModelCard:
    """Return the served model, by its name."""
    service: Service = request.app.state.service
    service.check_model(model)
    return _card(service)


def _card(service: Service) -> ModelCard:
    return ModelCard(
        id=service.model_name,
        created=service.created,
        max_model_len=service.engine.max_model_len,
    )


@router.post("/tokenize", responses=responses(), summary="Cut text into tokens", tags=["tokens"])
async def tokenize(request: Request, body: TokenizeRequest) -> TokenizeAnswer:
    """Return the tokens of a text, or of the prompt that a conversation becomes."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    with service.preparing():
        tokens = await _tokens(service, body)
    names = await asyncio.to_thread(_names, service, tokens) if body.return_token_strs else None
    return TokenizeAnswer(
        count=len(tokens),
        max_model_len=service.engine.max_model_len,
        tokens=tokens,
        token_strs=names,
    )


def _names(service: Service, tokens: list[int]) -> list[str]:
    return [service.tokenizer.decode([token], skip_special=False) for token in tokens]


async def _tokens(service: Service, body: TokenizeRequest) -> list[int]:
    if body.messages is not None:
        chat = ChatRequest(messages=body.messages, tools=body.tools)
        return await encode_conversation(service, conversation_of(chat), is_bounded=False)
    begin = service.tokenizer.begin_of_document_id
    start = [] if begin is None or not body.add_special_tokens else [begin]
    return start + await asyncio.to_thread(service.tokenizer.encode, body.prompt or "")


@router.post("/detokenize", responses=responses(), summary="Join tokens into text", tags=["tokens"])
async def detokenize(request: Request, body: DetokenizeRequest) -> DetokenizeAnswer:
    """Return the text of tokens, control tokens written out."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    for token in body.tokens:
        if not 0 <= token < service.vocab_size:
            raise bad_request(
                f"token {token} is outside the vocabulary of {service.vocab_size}", "tokens"
            )
    text = await asyncio.to_thread(service.tokenizer.decode, body.tokens, False)
    return DetokenizeAnswer(prompt=text)


@router.get(
    "/health",
    responses={503: {"model": Health, "description": "The engine failed"}},
    summary="Tell whether the server works",
    tags=["operation"],
)
async def health(request: Request, response: Response) -> Health:
    """Tell whether the engine works; it may be draining."""
    engine = request.app.state.service.engine
    if not engine.is_healthy:
        response.status_code = 503
        return Health(status="failed")
    return Health(status="draining" if engine.is_draining else "ok")


@router.get(
    "/ready",
    responses={503: {"model": Health, "description": "The server takes no requests"}},
    summary="Tell whether the server takes requests",
    tags=["operation"],
)
async def ready(request: Request, response: Response) -> Health:
    """Tell whether requests should be sent here."""
    state = await health(request, response)
    if state.status != "ok":
        response.status_code = 503
    return state


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {CONTENT_TYPE: {"schema": {"type": "string"}}}}, **responses()},
    summary="Metrics for Prometheus",
    tags=["operation"],
)
async def metrics(request: Request) -> Response:
    """Return all metrics in the text format of Prometheus."""
    return Response(request.app.state.service.metrics.text(), media_type=CONTENT_TYPE)
