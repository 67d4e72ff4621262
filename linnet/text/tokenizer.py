"""Byte-level BPE: text to token ids and back, exactly, and no text can forge a control token.

`Tokenizer` wraps the `tokenizers` library and adds three promises. Decoding what was encoded gives
the same text, whatever it is. Text from outside becomes a special token only where the caller says
`allow_special=True`. And a fingerprint tells whether cached tokens still belong to this tokenizer.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from linnet.errors import ConfigError, DataError
from linnet.storage import write_atomic
from linnet.text.reading import read_backend, token_text
from linnet.text.special import (
    BEGIN_OF_DOCUMENT,
    END_OF_DOCUMENT,
    END_OF_SENTENCE,
    GPT2_END_OF_TEXT,
    SPECIAL_TOKENS,
    THINKING_AND_TOOLS,
)
from linnet.text.stream import StreamDecoder
from linnet.text.template import M1_TEMPLATE

# A word with the one character before it (a space, `_`, a quote), at most three digits,
# punctuation, line ends, and runs of blanks that leave their last one to the next word. Line ends
# take the next line's indentation along, and punctuation takes both, so that `:` and the start of
# a deeper line can be one token.
SPLIT_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*)?|\s*[\r\n]+[ \t]*|\s+(?!\S)|\s+"
)

_UNKNOWN_ID_BYTES = "\ufffd".encode()


class Tokenizer:
    """A byte-level BPE vocabulary with its special tokens."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        bos_token: str | None = None,
        eos_token: str | None = None,
        chat_template: str | None = None,
    ):
        """Wrap a `tokenizers.Tokenizer`; most callers want `Tokenizer.train` or `Tokenizer.load`.

        Args:
            backend: a byte-level BPE tokenizer; every added token counts as special.
            bos_token: what a saved `tokenizer_config.json` names as its first token.
            eos_token: the token that ends a generated turn.
            chat_template: a Jinja template that belongs to this vocabulary, if it came with one.

        Raises:
            DataError: `backend` is not a byte-level BPE.
        """
        content = json.loads(backend.to_str())
        if content["model"].get("type") != "BPE" or "ByteLevel" not in json.dumps(
            content["decoder"]
        ):
            raise DataError(
                f"the tokenizer is {content['model'].get('type')!r} without byte-level decoding; "
                "linnet reads byte-level BPE only"
            )
        content |= {"truncation": None, "padding": None, "post_processor": None}
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        # The same vocabulary without its added tokens: what untrusted text goes through.
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(content | {"added_tokens": []}))
        added = content["added_tokens"]
        self.special_ids: dict[str, int] = {token["content"]: token["id"] for token in added}
        self.control_ids = frozenset(token["id"] for token in added if token["special"])
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.chat_template = chat_template

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, progress: bool = False) -> Self:
        """Learn a byte-level BPE vocabulary; the same texts in the same order give the same one.

        Args:
            texts: the corpus, read once.
            vocab_size: number of ids to aim for, special tokens and the 256 bytes included; a small
                corpus may give fewer.
            progress: show a progress bar on standard error.

        Raises:
            ConfigError: `vocab_size` has no room for the bytes and the special tokens.
            DataError: the corpus is empty.
        """
        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise ConfigError(
                f"vocab_size is {vocab_size}; the 256 bytes and {len(SPECIAL_TOKENS)} special "
                f"tokens alone need {smallest}"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=progress,
        )
        backend.train_from_iterator(_nonempty(texts), trainer)
        content = json.loads(backend.to_str())
        for token in content["added_tokens"]:
            token["special"] = token["content"] not in THINKING_AND_TOOLS
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        return cls(backend, BEGIN_OF_DOCUMENT, END_OF_SENTENCE, M1_TEMPLATE)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read `tokenizer.json`, or GPT-2's `vocab.json` and `merges.txt`, from a folder or a file.

        A `tokenizer_config.json` beside them gives the first and last token, further special tokens
        and the chat template.

        Raises:
            DataError: nothing readable is there, or it is not a byte-level BPE.
        """
        backend, config = read_backend(Path(path))
        bos, eos = (token_text(config.get(key)) for key in ("bos_token", "eos_token"))
        template = config.get("chat_template")
        return cls(backend, bos, eos, template if isinstance(template, str) else None)

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "clean_up_tokenization_spaces": False,
            "chat_template": self.chat_template,
        }
        config = {key: value for key, value in config.items() if value is not None}
        write_atomic(folder / "tokenizer.json", self._backend.to_str(pretty=True))
        write_atomic(folder / "tokenizer_config.json", json.dumps(config, indent=2))

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Turn text into token ids.

        Args:
            text: any string; lone surrogates, which no file can hold, become U+FFFD.
            allow_special: let `<end_of_sentence>` and its like, written out in `text`, become the
                special tokens; leave it off for text from outside.
        """
        backend = self._backend if allow_special else self._plain
        return backend.encode(_well_formed(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many untrusted texts at once, on all cores."""
        clean = [_well_formed(text) for text in texts]
        encodings = self._plain.encode_batch_fast(clean, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Turn token ids into text; bytes that are not UTF-8 and unknown ids become U+FFFD.

        Args:
            ids: token ids.
            skip_special: leave out control tokens (`control_ids`: documents and sentences, not
                `<think>` or `<tool_calls>`).
        """
        pieces = (self.token_bytes(token_id, skip_special) for token_id in ids)
        return b"".join(pieces).decode("utf-8", errors="replace")

    def stream(self, skip_special: bool = True) -> StreamDecoder:
        """Return a decoder that takes one id at a time and adds up to `decode` of all of them."""
        return StreamDecoder(lambda token_id: self.token_bytes(token_id, skip_special))

    def token_bytes(self, token_id: int, skip_special: bool = True) -> bytes:
        """Return the UTF-8 bytes of one token, which may hold only a part of a character."""
        if skip_special and token_id in self.control_ids:
            return b""
        if 0 <= token_id < self.vocab_size:
            return self._id_to_bytes[token_id]
        return _UNKNOWN_ID_BYTES

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token as the vocabulary spells it, or None."""
        return self._backend.token_to_id(token)

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included: the smallest embedding that fits."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """Short hash of the whole vocabulary: equal fingerprints give equal ids."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()[:16]

    @property
    def begin_of_document_id(self) -> int | None:
        """Id of the token before a document, GPT-2's `<|endoftext|>` if that is all there is."""
        return self._first_special(BEGIN_OF_DOCUMENT, GPT2_END_OF_TEXT)

    @property
    def end_of_document_id(self) -> int | None:
        """Id of the token after a document."""
        return self._first_special(END_OF_DOCUMENT, GPT2_END_OF_TEXT)

    @property
    def end_of_sentence_id(self) -> int | None:
        """Id of the token that ends a turn: `<end_of_sentence>`, else the declared `eos_token`."""
        return self._first_special(END_OF_SENTENCE, self.eos_token or "")

    def _first_special(self, *names: str) -> int | None:
        return next((self.special_ids[name] for name in names if name in self.special_ids), None)

    @cached_property
    def _id_to_bytes(self) -> list[bytes]:
        byte_of = {char: byte for byte, char in _byte_alphabet().items()}
        table = [_UNKNOWN_ID_BYTES] * self.vocab_size
        for token, token_id in self._backend.get_vocab(with_added_tokens=True).items():
            if token in self.special_ids or not all(char in byte_of for char in token):
                table[token_id] = token.encode()
            else:
                table[token_id] = bytes(byte_of[char] for char in token)
        return table


def _byte_alphabet() -> dict[int, str]:
    """Return GPT-2's printable character for every byte: itself, or the next one from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + place) for place, byte in enumerate(hidden)
    }


def _well_formed(text: str) -> str:
    """Return `text` with surrogate pairs joined and lone surrogates replaced by U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _nonempty(texts: Iterable[str]) -> Iterator[str]:
    found = False
    for text in texts:
        found = found or bool(text)
        yield _well_formed(text)
    if not found:
        raise DataError("the corpus has no text; a tokenizer needs some to learn from")
