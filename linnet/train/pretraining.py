"""The material of `linnet train`: documents of which every token is learned."""

import json
from pathlib import Path

from linnet.data import (
    HeldOutSet,
    Loader,
    Source,
    compressed_bits_per_byte,
    evaluation_batches,
    open_source,
    tokenize_source,
)
from linnet.errors import ConfigError
from linnet.storage import write_atomic
from linnet.text import Tokenizer
from linnet.train.material import Material, Sample
from linnet.train.recipe import DataSection, Recipe

PROMPT_TOKENS = 128
COMPLETION_TOKENS = 96


def prepare_documents(
    recipe: Recipe, show_progress: bool = False, row: int = 0, num_rows: int = 1
) -> Material:
    """Open the documents of a recipe, tokenized; the tokenizer is trained if it gives none.

    Args:
        recipe: the run.
        show_progress: draw bars.
        row: which of the rows that are read at a time this process reads.
        num_rows: how many these are.

    Raises:
        ConfigError: the tokenizer has more ids than the model.
        DataError: the corpus cannot be read.
    """
    data, train = recipe.data, recipe.train
    source = open_source(data.source, data.text_field, data.held_out)
    folder = Path(data.folder) if data.folder is not None else recipe.folder / "data"
    tokenizer = _tokenizer(data, source, folder, recipe.model.vocab_size, show_progress)
    stores = {
        split: tokenize_source(source, split, tokenizer, folder, progress=show_progress)
        for split in ("train", "held_out")
    }
    held_out, final_held_out = (
        evaluation_batches(stores["held_out"], train.micro_batch_tokens, train.seq_len, tokens)
        for tokens in (train.eval_tokens, train.final_eval_tokens)
    )
    return Material(
        tokenizer=tokenizer,
        stream=Loader(
            stores["train"], train.micro_batch_tokens, train.seq_len, recipe.seed, row, num_rows
        ),
        held_out=held_out,
        final_held_out=final_held_out,
        baselines=lambda: _baselines(source, final_held_out),
        samples=lambda count: _samples(source, tokenizer, count),
    )


def _tokenizer(
    data: DataSection, source: Source, folder: Path, vocab_size: int, show_progress: bool
) -> Tokenizer:
    if data.tokenizer is not None:
        tokenizer = Tokenizer.load(data.tokenizer)
    else:
        tokenizer = _own_tokenizer(source, folder / "tokenizer", vocab_size, show_progress)
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids; model.vocab_size is {vocab_size}"
        )
    return tokenizer


def _own_tokenizer(source: Source, folder: Path, vocab_size: int, show_progress: bool) -> Tokenizer:
    """Train a tokenizer on the training documents, or load the one trained before."""
    made_from = {"source": source.fingerprint, "vocab_size": vocab_size}
    note = folder / "made_from.json"
    if note.is_file() and json.loads(note.read_text()) == made_from:
        return Tokenizer.load(folder)
    texts = (document.text for document in source.documents("train"))
    tokenizer = Tokenizer.train(texts, vocab_size, progress=show_progress)
    tokenizer.save(folder)
    write_atomic(note, json.dumps(made_from))
    return tokenizer


def _baselines(source: Source, held_out: HeldOutSet) -> dict[str, float]:
    """Return what compressors make of the held-out documents."""
    chosen = set(held_out.documents.tolist())
    documents = enumerate(source.documents("held_out"))
    texts = [document.text for index, document in documents if index in chosen]
    kinds = {"each file": True, "one stream": False}
    return {
        f"{name}, {kind}": bits
        for kind, separately in kinds.items()
        for name, bits in compressed_bits_per_byte(texts, separately).items()
    }


def _samples(source: Source, tokenizer: Tokenizer, count: int) -> list[Sample]:
    """Return prompts from the first held-out documents that are long enough."""
    samples: list[Sample] = []
    if not count:
        return samples
    for document in source.documents("held_out"):
        ids = tokenizer.encode(document.text)
        start = len(ids) // 3
        end = start + PROMPT_TOKENS
        if len(ids) >= end + COMPLETION_TOKENS:
            truth = ids[end : end + COMPLETION_TOKENS]
            samples.append(Sample(document.name, ids[start:end], truth))
        if len(samples) == count:
            break
    return samples
