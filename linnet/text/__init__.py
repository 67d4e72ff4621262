"""Text in and out: the tokenizer, streaming decoding, chat formats, and completions taken apart."""

from linnet.text.chat import chat_template_of, encode_chat, render_chat
from linnet.text.output import (
    CallDelta,
    Delta,
    OutputParser,
    ParsedOutput,
    ToolCall,
    ToolFormat,
    join_deltas,
    parse_output,
    starts_thinking,
    tool_format_of,
)
from linnet.text.special import SPECIAL_TOKENS
from linnet.text.stream import StreamDecoder
from linnet.text.template import M1_TEMPLATE
from linnet.text.template_m2 import M2_TEMPLATE
from linnet.text.tokenizer import Tokenizer

__all__ = [
    "M1_TEMPLATE",
    "M2_TEMPLATE",
    "SPECIAL_TOKENS",
    "CallDelta",
    "Delta",
    "OutputParser",
    "ParsedOutput",
    "StreamDecoder",
    "Tokenizer",
    "ToolCall",
    "ToolFormat",
    "chat_template_of",
    "encode_chat",
    "join_deltas",
    "parse_output",
    "render_chat",
    "starts_thinking",
    "tool_format_of",
]
