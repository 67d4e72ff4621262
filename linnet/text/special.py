"""The special tokens of a trained tokenizer, in the order of their ids.

Control tokens frame documents and turns and are left out of decoded text. Thinking and tool calls
are for the reader of a completion: they survive decoding.
"""

BEGIN_OF_DOCUMENT = "<begin_of_document>"
END_OF_DOCUMENT = "<end_of_document>"
BEGINNING_OF_SENTENCE = "<beginning_of_sentence>"
END_OF_SENTENCE = "<end_of_sentence>"
THINKING_AND_TOOLS = ("<think>", "</think>", "<tool_calls>", "</tool_calls>")
SPECIAL_TOKENS = (
    BEGIN_OF_DOCUMENT,
    END_OF_DOCUMENT,
    BEGINNING_OF_SENTENCE,
    END_OF_SENTENCE,
    *THINKING_AND_TOOLS,
)
GPT2_END_OF_TEXT = "<|endoftext|>"
