"""Where examples come from: generated dialogues, a file of dialogues, or plain text.

Each source gives example i as a function of its settings and i alone, so that a stream resumes by
remembering numbers. Examples are as long as the recipe asks for: generators are told how long, text
is cut, and dialogues of a file that are too long are left out, which is logged.
"""

import hashlib
import logging
import math
import random

import numpy as np

from linnet.data.dialogues.dialogue import Dialogue, DialogueFile
from linnet.data.dialogues.encoding import DialogueEncoder, Example, encode_text
from linnet.data.dialogues.filler import Filler
from linnet.data.dialogues.generators import GENERATORS
from linnet.data.shards import TokenStore
from linnet.data.sources import Split
from linnet.errors import DataError
from linnet.text import Tokenizer

logger = logging.getLogger(__name__)

ATTEMPTS = 12
"""Tries to make a dialogue short enough, each 15 % shorter than the one before."""


class GeneratedSource:
    """Dialogues of one built-in generator, of lengths spread evenly on a logarithmic scale."""

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        filler: Filler,
        lengths: tuple[int, int],
        seed: str,
    ) -> None:
        """Take a generator by its name.

        Args:
            name: a key of `GENERATORS`.
            tokenizer: encodes the dialogues and measures their length.
            filler: text to hide things in.
            lengths: fewest and most tokens to aim for; the most is never exceeded.
            seed: any text; another one gives other dialogues.
        """
        self._generator, self._name = GENERATORS[name], name
        self._encoder, self._filler = DialogueEncoder(tokenizer), filler
        self._lengths, self._seed = lengths, seed
        self.fingerprint = f"{name}-{lengths[0]}-{lengths[1]}-{seed}-{filler.fingerprint}"

    def dialogue(self, index: int) -> Dialogue:
        """Return the dialogue that example `index` encodes."""
        return self._make(index)[0]

    def example(self, index: int) -> Example:
        """Return one example.

        Raises:
            DataError: the generator cannot make a dialogue as short as asked.
        """
        return self._make(index)[1]

    def _make(self, index: int) -> tuple[Dialogue, Example]:
        rng = random.Random(f"{self._name}/{self._seed}/{index}")
        low, high = self._lengths
        num_tokens = round(math.exp(rng.uniform(math.log(low), math.log(high))))
        for _ in range(ATTEMPTS):
            dialogue = self._generator(rng, num_tokens, self._filler)
            example = self._encoder.encode(dialogue)
            if len(example) <= high:
                return dialogue, example
            num_tokens = round(num_tokens * 0.85)
        raise DataError(
            f"the generator {self._name!r} makes no dialogue of at most {high} tokens; give it more"
        )


class FileSource:
    """The dialogues of a file, shuffled anew each time all have been read."""

    def __init__(
        self,
        file: DialogueFile,
        tokenizer: Tokenizer,
        max_tokens: int,
        seed: int,
        held_out: float,
        split: Split,
    ) -> None:
        """Choose the dialogues of one split that are short enough.

        Args:
            file: checked dialogues.
            tokenizer: encodes them.
            max_tokens: dialogues with more are left out.
            seed: of the shuffling.
            held_out: fraction of the dialogues that are never trained on, chosen by their hash.
            split: which part.

        Raises:
            DataError: a dialogue cannot be encoded, or nothing is left.
        """
        self._file, self._seed = file, seed
        self._encoder = DialogueEncoder(tokenizer)
        chosen = [i for i in range(len(file)) if _side(file[i], held_out) == split]
        lengths = [len(self._encoder.encode(file[i], file.name(i))) for i in chosen]
        self._chosen = [i for i, n in zip(chosen, lengths, strict=True) if n <= max_tokens]
        if too_long := len(chosen) - len(self._chosen):
            logger.warning(
                "%s: %d of %d dialogues have more than %d tokens and are left out",
                file.path,
                too_long,
                len(chosen),
                max_tokens,
            )
        if not self._chosen:
            raise DataError(
                f"{file.path}: the {split} part has no dialogue of at most {max_tokens} tokens; "
                "give more dialogues, or change held_out or max_tokens"
            )
        self._shuffled: tuple[int, list[int]] | None = None
        content = hashlib.sha256(file.path.read_bytes()).hexdigest()[:16]
        self.fingerprint = f"{content}-{split}-{held_out}-{max_tokens}-{seed}"

    def example(self, index: int) -> Example:
        """Return one example."""
        epoch, place = divmod(index, len(self._chosen))
        if self._shuffled is None or self._shuffled[0] != epoch:
            order = list(self._chosen)
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
            self._shuffled = (epoch, order)
        chosen = self._shuffled[1][place]
        return self._encoder.encode(self._file[chosen], self._file.name(chosen))


class TextSource:
    """Pieces of documents, from their start or from anywhere, learned whole."""

    def __init__(self, store: TokenStore, lengths: tuple[int, int], seed: str) -> None:
        """Cut pieces out of a store.

        Args:
            store: the documents.
            lengths: fewest and most tokens of a piece; a shorter document is one piece.
            seed: any text; another one gives other pieces.
        """
        self._store, self._lengths, self._seed = store, lengths, seed
        self.fingerprint = f"text-{lengths[0]}-{lengths[1]}-{seed}-{store.fingerprint}"

    def example(self, index: int) -> Example:
        """Return one example."""
        rng = random.Random(f"text/{self._seed}/{index}")
        low, high = self._lengths
        num_tokens = round(math.exp(rng.uniform(math.log(low), math.log(high)))) + 1
        # A long document is more to learn from: documents are drawn by their tokens.
        position = rng.randrange(self._store.num_tokens)
        document = int(np.searchsorted(self._store.offsets, position, side="right")) - 1
        length = int(self._store.offsets[document + 1] - self._store.offsets[document])
        start = rng.choice((0, rng.randrange(max(1, length - num_tokens + 1))))
        return encode_text(self._store.slice(document, start, min(length, start + num_tokens)))


def _side(dialogue: Dialogue, held_out: float) -> Split:
    digest = hashlib.sha256(repr(dialogue).encode("utf-8", "surrogatepass")).digest()
    return "held_out" if int.from_bytes(digest[:8]) < held_out * 2**64 else "train"
