"""Bodies and events of `/v1/responses`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from linnet.serve.schemas.base import RequestModel
from linnet.serve.schemas.chat import JsonObject, ReasoningEffort, ToolName, TopLogprob

Status = Literal["in_progress", "completed", "incomplete"]


class InputPart(RequestModel):
    """A part of a message: only text can be read."""

    type: str = Field(description="`input_text`, `output_text`; images and files are refused")
    text: str | None = None


class InputItem(RequestModel):
    """A message, an earlier call, its output, or earlier reasoning, by `type`."""

    type: str = Field(
        default="message", description="message, function_call, function_call_output, reasoning"
    )
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None
    summary: list[InputPart] | None = None


class FunctionTool(RequestModel):
    """A function that the model may call."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class NamedTool(RequestModel):
    """The function that must be called."""

    type: Literal["function"]
    name: str


class PlainFormat(RequestModel):
    """Free text."""

    type: Literal["text"]


class ObjectFormat(RequestModel):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(RequestModel):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    name: str
    description: str | None = None
    schema_: JsonObject = Field(alias="schema")
    strict: bool | None = None


class TextConfig(RequestModel):
    """The form of the text."""

    format: Annotated[
        PlainFormat | ObjectFormat | SchemaFormat | None, Field(discriminator="type")
    ] = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningConfig(RequestModel):
    """How much to think."""

    effort: ReasoningEffort | None = None
    summary: str | None = Field(default=None, description="ignored: reasoning is given whole")


class ResponsesRequest(RequestModel):
    """A turn to answer."""

    model: str | None = Field(default=None, description="the served model if left out")
    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    include: list[str] | None = Field(default=None, description="`message.output_text.logprobs`")
    tools: list[FunctionTool] | None = Field(default=None, max_length=512)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningConfig | None = None
    text: TextConfig | None = None
    stream: bool | None = None
    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    truncation: Literal["auto", "disabled"] | None = Field(
        default=None, description="always disabled"
    )
    background: bool | None = Field(default=None, description="not supported")
    previous_response_id: str | None = Field(
        default=None, description="not supported: nothing is stored"
    )
    conversation: Any = Field(
        default=None, description="not supported: nothing is stored"
    )  # Any: refused


class OutputLogprob(BaseModel):
    """A token of the text, and how probable it was."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class OutputText(BaseModel):
    """Text that the model says."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[None] = []
    logprobs: list[OutputLogprob] = []


class OutputMessage(BaseModel):
    """What the model says."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Status
    content: list[OutputText]


class ReasoningText(BaseModel):
    """Text that the model thinks."""

    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class ReasoningItem(BaseModel):
    """What the model thinks."""

    id: str
    type: Literal["reasoning"] = "reasoning"
    status: Status
    summary: list[None] = []
    content: list[ReasoningText]


class FunctionCallItem(BaseModel):
    """A call that the model asks for."""

    id: str
    type: Literal["function_call"] = "function_call"
    status: Status
    call_id: str
    name: str
    arguments: str


OutputItem = Annotated[
    OutputMessage | ReasoningItem | FunctionCallItem, Field(discriminator="type")
]


class InputTokensDetails(BaseModel):
    """Where the tokens of the input came from."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(BaseModel):
    """What the tokens of the output were spent on."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(BaseModel):
    """Why a response failed."""

    code: Literal["server_error"] = "server_error"
    message: str


class IncompleteDetails(BaseModel):
    """Why a response is not complete."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class Response(BaseModel):
    """The answer to a turn."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None = None
    reasoning: ReasoningConfig
    background: Literal[False] = False
    store: Literal[False] = False
    temperature: float
    text: TextConfig
    tool_choice: Literal["none", "auto", "required"] | NamedTool
    tools: list[FunctionTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    metadata: dict[str, str]


class ResponseEvent(BaseModel):
    """An event of a stream; which further fields it has depends on its type."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int
