"""From a conversation, whichever API it came by, to a prompt and the rules of its answer."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from linnet.errors import DataError
from linnet.infer.grammar import Grammar
from linnet.serve.answers import Answer
from linnet.serve.errors import APIError, bad_request, context_exceeded, from_engine
from linnet.serve.grammars import OutputFormat, forced_call, output_grammar
from linnet.serve.runs import Run
from linnet.serve.sampling import sampling_params
from linnet.serve.schemas.base import SamplingFields
from linnet.serve.schemas.chat import ContentPart, ReasoningEffort
from linnet.serve.schemas.responses import InputPart
from linnet.serve.service import Service
from linnet.text import OutputParser, chat_template_of, encode_chat, starts_thinking

JsonObject = dict[str, Any]  # Any: JSON from outside


@dataclass(frozen=True, slots=True)
class NamedTool:
    """The one tool that must be called."""

    name: str


ToolChoice = Literal["none", "auto", "required"] | NamedTool


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """What is to be answered, in one form for all APIs."""

    messages: list[JsonObject]
    """In OpenAI's form, with contents as text, and `reasoning_content`."""
    tools: list[JsonObject]
    """`{"name", "description", "parameters"}` each."""
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    separate_reasoning: bool = True
    param: str = "messages"
    """The field of the request that it came in."""

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a tool call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def usable_tools(self) -> list[JsonObject]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools


@dataclass(frozen=True, slots=True)
class Turn:
    """A conversation that is being answered."""

    run: Run
    answers: list[Answer]
    """One for each request of `run`."""
    num_prompt: int
    """Tokens of the prompt."""


async def begin(
    service: Service,
    conversation: Conversation,
    fields: SamplingFields,
    *,
    max_tokens: int | None,
    effort: ReasoningEffort | None = None,
    logprobs: int | None = None,
    output: OutputFormat | None = None,
) -> Turn:
    """Let the engine answer a conversation.

    Args:
        service: what answers.
        conversation: what to answer.
        fields: the rules of sampling.
        max_tokens: most tokens to generate; None for what there is room for.
        effort: how much to think.
        logprobs: alternatives per token; None for no logprobs.
        output: the form that the answer must have.

    Raises:
        APIError: the request cannot be meant or met, or the server is full.
    """
    check_tools(conversation, output)
    with service.preparing():
        prompt = await encode_conversation(service, conversation)
        answer = _Beginning(service, conversation, prompt)
        if conversation.must_call:
            # Begun by the prompt, so that nothing may be thought before it.
            grammar, effort = await asyncio.to_thread(answer.force_call), "none"
        else:
            grammar = await asyncio.to_thread(output_grammar, output) if output else None
        params = sampling_params(
            fields,
            service.vocab_size,
            max_tokens=max_tokens or max(1, service.engine.max_model_len - len(answer.prompt)),
            effort=effort,
            logprobs=logprobs,
            grammar=grammar,
        )
        requests = [(answer.prompt, rules) for rules in params]
        answers = [answer.new() for _ in params]
        # Last: what has begun to run must reach the one who closes it.
        run = await service.start(requests, conversation.param)
    return Turn(run, answers, len(answer.prompt))


async def encode_conversation(
    service: Service, conversation: Conversation, is_bounded: bool = True
) -> list[int]:
    """Return the prompt of a conversation.

    Args:
        service: whose format it gets.
        conversation: what to encode.
        is_bounded: refuse one that leaves no room for an answer.

    Raises:
        APIError: the model has no format for it, a message cannot be rendered, or it is too long.
    """
    prompt = await asyncio.to_thread(_encode, service, conversation)
    limit = service.engine.max_model_len
    if is_bounded and len(prompt) >= limit:
        raise context_exceeded(len(prompt) + 1, limit, conversation.param)
    return prompt


def _encode(service: Service, conversation: Conversation) -> list[int]:
    try:
        template = chat_template_of(service.tokenizer)
    except DataError as error:
        raise bad_request(str(error), "messages") from None
    is_m1 = template is None
    messages = [_message(message, is_m1) for message in conversation.messages]
    tools = conversation.usable_tools
    if not is_m1:
        tools = [{"type": "function", "function": tool} for tool in tools]
    try:
        return encode_chat(service.tokenizer, messages, tools or None, True, template)
    except (ValueError, DataError) as error:
        raise from_engine(error, conversation.param) from None


def _message(message: JsonObject, is_m1: bool) -> JsonObject:
    """Return a message as its template takes it."""
    message = dict(message)
    reasoning = message.pop("reasoning_content", None)
    if reasoning and is_m1:
        # The format has no field for it: an answer's thoughts stand before it, as they were said.
        message["content"] = f"<think>\n{reasoning}\n</think>\n{message['content']}"
    elif reasoning:
        message["reasoning_content"] = reasoning
    return message


class _Beginning:
    """Where an answer begins: the end of its prompt, and what of it the prompt holds already."""

    def __init__(self, service: Service, conversation: Conversation, prompt: list[int]) -> None:
        self._service, self._conversation = service, conversation
        self.prompt = prompt
        tail = service.tokenizer.decode(prompt[-16:], skip_special=False)
        self._is_thinking = starts_thinking(tail)
        self._said = ""

    def force_call(self) -> Grammar:
        """Let the prompt end with the beginning of a tool call; return the grammar of the rest.

        Raises:
            APIError: the model knows no tool calls, or the tools' schemas are too long.
        """
        choice, tools = self._conversation.tool_choice, self._conversation.tools
        if isinstance(choice, NamedTool):
            tools = [tool for tool in tools if tool["name"] == choice.name]
        call = forced_call(self._service.tool_format, tools, self._is_thinking)
        opening = self._service.tokenizer.encode(call.opening, allow_special=True)
        self.prompt, self._said = self.prompt + opening, call.opening
        return call.grammar

    def new(self) -> Answer:
        """Return an empty answer that splits its completion as the conversation asks for."""
        conversation, tools = self._conversation, self._conversation.usable_tools
        parser = OutputParser(
            self._service.tool_format if tools else None,
            tools,
            starts_thinking=self._is_thinking,
            separate_reasoning=conversation.separate_reasoning,
        )
        parser.push(self._said)
        is_named = isinstance(conversation.tool_choice, NamedTool)
        return Answer(parser, conversation.parallel_tool_calls, is_named)


def check_tools(conversation: Conversation, output: OutputFormat | None) -> None:
    """Refuse a tool choice that cannot be met.

    Raises:
        APIError: a tool must be called and there is none, or not the one; or the answer must have
            a format, which would never let a tool be called.
    """
    choice, names = conversation.tool_choice, [tool["name"] for tool in conversation.tools]
    if isinstance(choice, NamedTool) and choice.name not in names:
        raise bad_request(
            f"tool_choice names {choice.name!r}, which is not in tools", "tool_choice"
        )
    if choice == "required" and not names:
        raise bad_request("tool_choice is required, but there are no tools", "tool_choice")
    if len(set(names)) < len(names):
        raise bad_request("two tools have the same name", "tools")
    if choice == "auto" and names and output is not None and output.type != "text":
        raise bad_request(
            "a response format cannot be kept where tools may be called; set tool_choice to "
            "'none' or 'required', or leave one of the two out",
            "response_format",
        )


def text_of(content: str | Sequence[ContentPart] | Sequence[InputPart] | None, param: str) -> str:
    """Return the text of a content: a string, or parts that are all text.

    Raises:
        APIError: a part is no text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        if not part.type.endswith("text") or part.text is None:
            raise unsupported_part(part.type, param)
        texts.append(part.text)
    return "".join(texts)


def unsupported_part(kind: str, param: str) -> APIError:
    """Return the error for a part of a message that the model cannot read."""
    return bad_request(
        f"a message has a part of type {kind!r}; this model reads text only, so images, audio and "
        "files are refused",
        param,
        "unsupported_content",
    )
