"""Tries a grammar in a process of its own: `python grammar_check.py < grammar`.

A grammar comes from outside, and there are short ones that take hours to compile. Only a process
can be stopped, so this file is run by its path and imports nothing of linnet.
"""

import math
import sys

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

CPU_SECONDS = 1
MEMORY_BYTES = 2 << 30


class _Bytes:
    """The smallest vocabulary: each byte is a token."""

    bos_token_id = None
    eos_token_id = 256
    special_token_ids = (256,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def parser_limits() -> LLParserLimits:
    """Return what a grammar may cost in use; errors do not quote the grammar."""
    return LLParserLimits(
        step_lexer_fuel=100_000,  # about 10 ms for the worst token
        max_lexer_states=20_000,  # about 40 MB for the worst request
        verbose_errors=False,
    )


def main() -> None:
    """Write what is wrong with the grammar on standard input; nothing if it compiles."""
    _limit_process()
    grammar = sys.stdin.buffer.read().decode()
    tokenizer = LLTokenizer(TokenizerWrapper(_Bytes()))
    # Not `validate_grammar`, which leaves out the part that can take longest: building the lexer.
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())
    if not matcher.is_error():
        matcher.compute_bitmask()
    sys.stdout.buffer.write(matcher.get_error().encode())


def _limit_process() -> None:
    try:
        import resource
    except ImportError:  # not on Windows, where the one who started the process watches the clock
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    # What the imports took does not count: a slow machine would refuse every grammar.
    seconds = CPU_SECONDS + math.ceil(used.ru_utime + used.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


if __name__ == "__main__":
    main()
