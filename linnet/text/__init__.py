"""Text in and out: the tokenizer, streaming decoding and chat formats."""

from linnet.text.chat import encode_chat, render_chat
from linnet.text.special import SPECIAL_TOKENS
from linnet.text.stream import StreamDecoder
from linnet.text.template import M1_TEMPLATE
from linnet.text.tokenizer import Tokenizer

__all__ = [
    "M1_TEMPLATE",
    "SPECIAL_TOKENS",
    "StreamDecoder",
    "Tokenizer",
    "encode_chat",
    "render_chat",
]
