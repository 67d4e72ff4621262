"""Bodies of `/v1/chat/completions`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from linnet.serve.schemas.base import (
    PromptProgress,
    RequestModel,
    SamplingFields,
    StreamOptions,
    Timings,
    Usage,
    omitted,
)

JsonObject = dict[str, Any]  # Any: JSON from outside
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
FinishReason = Literal["stop", "length", "tool_calls"]
ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]


class ContentPart(RequestModel):
    """A part of a message: only text can be read."""

    type: str = Field(description="`text`; images, audio and files are refused")
    text: str | None = None


class FunctionCall(RequestModel):
    """Which function an earlier answer called, and with what."""

    name: str
    arguments: str = Field(description="a JSON object, as text")


class MessageToolCall(RequestModel):
    """A tool call of an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(RequestModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = Field(
        default=None, description="the call that a tool message answers"
    )
    reasoning_content: str | None = Field(
        default=None, description="what an assistant message thought"
    )
    reasoning: str | None = Field(default=None, description="another name of reasoning_content")


class Function(RequestModel):
    """A function that the model may call."""

    name: ToolName
    description: str | None = None
    parameters: JsonObject | None = Field(default=None, description="JSON schema of the arguments")
    strict: bool | None = None


class Tool(RequestModel):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class ToolChoiceFunction(RequestModel):
    """The name of the function that must be called."""

    name: str


class NamedToolChoice(RequestModel):
    """The tool that must be called."""

    type: Literal["function"]
    function: ToolChoiceFunction


class JsonSchema(RequestModel):
    """A JSON schema that the answer must fit."""

    name: str | None = None
    description: str | None = None
    schema_: JsonObject = Field(alias="schema")
    strict: bool | None = None


class TextFormat(RequestModel):
    """Free text."""

    type: Literal["text"]


class JsonObjectFormat(RequestModel):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(RequestModel):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class RegexFormat(RequestModel):
    """Text that a regular expression matches as a whole; an extension of OpenAI's formats."""

    type: Literal["regex"]
    pattern: str


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat, Field(discriminator="type")
]


class ChatRequest(SamplingFields):
    """A conversation to continue."""

    model: str | None = Field(default=None, description="the served model if left out")
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(
        default=None, ge=1, description="as max_tokens, and before"
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(default=None, max_length=512)
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: ReasoningEffort | None = None
    separate_reasoning: bool | None = Field(
        default=None, description="false leaves it in the content"
    )
    return_progress: bool | None = Field(
        default=None, description="tell how the prompt is taken in"
    )


class TopLogprob(BaseModel):
    """A token that was probable at a place."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the completion, and how probable it was."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    """Logprobs of a choice."""

    content: list[TokenLogprob]
    refusal: None = None


class CalledFunction(BaseModel):
    """A function and its arguments."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call that the model asks for."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AnswerMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | None = omitted()
    tool_calls: list[ToolCall] | None = omitted()


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    finish_reason: FinishReason
    stop_reason: str | int | None = Field(
        default=None, description="the stop string or token that ended it"
    )
    logprobs: ChoiceLogprobs | None = None


class ChatCompletion(BaseModel):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings


class FunctionDelta(BaseModel):
    """More of a call."""

    name: str | None = omitted()
    arguments: str


class ToolCallDelta(BaseModel):
    """More of a call; id, type and name come once, in its first delta."""

    index: int
    id: str | None = omitted()
    type: Literal["function"] | None = omitted()
    function: FunctionDelta


class Delta(BaseModel):
    """What is new in a chunk."""

    role: Literal["assistant"] | None = omitted()
    content: str | None = omitted()
    reasoning_content: str | None = omitted()
    tool_calls: list[ToolCallDelta] | None = omitted()


class ChunkChoice(BaseModel):
    """What is new in one answer."""

    index: int
    delta: Delta
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = omitted()
    logprobs: ChoiceLogprobs | None = None


class ChatCompletionChunk(BaseModel):
    """A piece of a stream of answers."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = omitted()
    timings: Timings | None = omitted()
    prompt_progress: PromptProgress | None = omitted()
