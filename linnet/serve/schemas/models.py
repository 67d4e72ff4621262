"""Bodies of the small endpoints: models, tokens, health."""

from typing import Literal

from pydantic import BaseModel, Field, model_validator

from linnet.serve.schemas.base import RequestModel
from linnet.serve.schemas.chat import ChatMessage, Tool


class ModelCard(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["linnet"] = "linnet"
    max_model_len: int = Field(description="tokens of prompt and completion together")


class ModelList(BaseModel):
    """The served models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeRequest(RequestModel):
    """A text, or a conversation, to cut into tokens: one of the two."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1)
    tools: list[Tool] | None = Field(default=None, max_length=512)
    add_special_tokens: bool = Field(default=True, description="begin a text as a document")
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class TokenizeAnswer(BaseModel):
    """The tokens of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestModel):
    """Tokens to join into a text."""

    model: str | None = None
    tokens: list[int]


class DetokenizeAnswer(BaseModel):
    """The text of tokens."""

    prompt: str


class Health(BaseModel):
    """Whether the server can work."""

    status: Literal["ok", "draining", "failed"]
