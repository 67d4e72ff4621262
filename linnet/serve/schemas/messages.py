"""Bodies and events of `/v1/messages`, in Anthropic's shape."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from linnet.serve.schemas.base import RequestModel
from linnet.serve.schemas.chat import JsonObject, ToolName

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class InputBlock(RequestModel):
    """A block of a message, by `type`: text, thinking, tool_use or tool_result."""

    type: str = Field(description="images and documents are refused")
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: JsonObject | None = None
    tool_use_id: str | None = None
    content: "str | list[InputBlock] | None" = None
    is_error: bool | None = None


class InputMessage(RequestModel):
    """A message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[InputBlock]


class MessageTool(RequestModel):
    """A tool that the model may call."""

    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: JsonObject


class MessageToolChoice(RequestModel):
    """Whether and which tool must be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(default=None, description="with type tool")
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(RequestModel):
    """How much to think."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(default=None, ge=0)


class CountRequest(RequestModel):
    """A conversation to count the tokens of."""

    model: str | None = Field(default=None, description="the served model if left out")
    messages: list[InputMessage] = Field(min_length=1)
    system: str | list[InputBlock] | None = None
    tools: list[MessageTool] | None = Field(default=None, max_length=512)
    tool_choice: MessageToolChoice | None = None
    thinking: ThinkingConfig | None = None


class MessagesRequest(CountRequest):
    """A conversation to continue."""

    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    top_p: float | None = Field(default=None, ge=0, le=1)


class CountAnswer(BaseModel):
    """How long a conversation is."""

    input_tokens: int


class TextBlock(BaseModel):
    """Text that the model says."""

    type: Literal["text"] = "text"
    text: str
    citations: None = None


class ThinkingBlock(BaseModel):
    """Text that the model thinks."""

    type: Literal["thinking"] = "thinking"
    thinking: str
    signature: str = ""


class ToolUseBlock(BaseModel):
    """A call that the model asks for."""

    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: JsonObject


OutputBlock = Annotated[TextBlock | ThinkingBlock | ToolUseBlock, Field(discriminator="type")]


class MessageUsage(BaseModel):
    """Tokens of a message; those that the cache held are not among the input tokens."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int


class Message(BaseModel):
    """The answer to a conversation."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[OutputBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageError(BaseModel):
    """A refusal or failure, in Anthropic's shape."""

    type: Literal["error"] = "error"
    error: dict[str, Any]  # Any: type and message, both text


class MessageEvent(BaseModel):
    """An event of a stream; which further fields it has depends on its type."""

    model_config = ConfigDict(extra="allow")

    type: str
