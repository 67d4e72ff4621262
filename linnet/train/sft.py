"""Supervised fine-tuning: a model folder to start from, and dialogues of which answers are learned.

The paper's post-training is a sequence of such runs at growing lengths (MiniMax-01, section 5.5),
each from the model of the one before; a recipe is one of them.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from linnet.config import apply_overrides, build, nearest, read_toml
from linnet.data import Split, TokenStore, open_source, tokenize_source
from linnet.data.dialogues import (
    GENERATORS,
    DialogueFile,
    Example,
    FileSource,
    Filler,
    GeneratedSource,
    MixLoader,
    Share,
    TextSource,
    held_out_examples,
)
from linnet.errors import ConfigError
from linnet.model.config import ModelConfig
from linnet.model.presets import model_folder
from linnet.text import Tokenizer
from linnet.train.material import EveryNth, Material, Sample
from linnet.train.recipe import (
    OptimSection,
    ParallelSection,
    TrainSection,
    check_run,
    plain,
)

TEXT = "text"
MAX_FINAL_TOKENS = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class MixSection:
    """One `[[mix]]`: a source of examples, and its share of the tokens."""

    source: str
    """A generator's name, "text" for pieces of the corpus, or a .jsonl file of dialogues."""
    weight: float = 1.0
    """Share of the training tokens, relative to the other sources."""
    min_tokens: int = 32
    """Shortest example that a generator aims for, or shortest piece of text."""
    max_tokens: int | None = None
    """Longest example; train.seq_len if None."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusSection:
    """`[corpus]`: documents for "text", and for generators to hide things in."""

    source: str = "stdlib"
    """"stdlib", a file, a folder, a glob, or several of these separated by commas."""
    text_field: str = "text"
    """Field of .jsonl and .parquet records that holds the text."""
    held_out: float = 0.05
    """Fraction of documents, and of the dialogues of files, that are never trained on."""
    folder: str | None = None
    """Where the tokenized documents are kept; `data` in the run's folder if None."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SftRecipe:
    """A whole run; `[model]` changes keys of the config that the starting model came with.

    Raises:
        ConfigError: values that contradict each other.
    """

    name: str
    """Of the run; its folder is `out`/`name`."""
    start: str
    """Folder of the model to start from, with a tokenizer; "bundled" for linnet's own."""
    out: str = "runs"
    seed: int = 0
    samples: int = 4
    """Held-out dialogues whose last answer the finished model writes, for the report."""
    train: TrainSection
    optim: OptimSection = field(default_factory=OptimSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    mix: tuple[MixSection, ...]
    corpus: CorpusSection = field(default_factory=CorpusSection)
    model: ModelConfig

    def __post_init__(self) -> None:
        check_run(self.name, self.train, self.optim, self.parallel, self.samples)
        if not self.mix:
            raise ConfigError("the recipe has no [[mix]]; give at least one source of examples")
        for part in self.mix:
            self._check_mix(part)

    def _check_mix(self, part: MixSection) -> None:
        if part.source not in (*GENERATORS, TEXT) and not part.source.endswith(".jsonl"):
            raise ConfigError(
                f"mix.source {part.source!r} is no generator and no .jsonl file"
                f"{nearest(part.source, (*GENERATORS, TEXT))}"
            )
        if not 0 < part.weight < float("inf"):
            raise ConfigError(
                f"mix.weight of {part.source!r} is {part.weight}; give a positive one"
            )
        if not 2 <= part.min_tokens <= self.longest(part) <= self.train.seq_len:
            raise ConfigError(
                f"mix {part.source!r}: expected 2 <= min_tokens <= max_tokens <= train.seq_len; "
                f"got {part.min_tokens}, {self.longest(part)} and {self.train.seq_len}"
            )

    def longest(self, part: MixSection) -> int:
        """Return the most tokens of an example of one source."""
        return self.train.seq_len if part.max_tokens is None else part.max_tokens

    @property
    def folder(self) -> Path:
        """Where everything about the run is kept."""
        return Path(self.out) / self.name

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "SftRecipe":
        """Build a recipe from the tables of a TOML file; reads the starting model's config.

        Raises:
            ConfigError: an unknown key, a missing one, a wrong type or a contradiction.
        """
        model = mapping.get("model", {})
        if not isinstance(model, Mapping):
            raise ConfigError(f"'model' is a section; got {model!r}")
        if not isinstance(start := mapping.get("start"), str):
            raise ConfigError("missing key 'start': the folder of the model to start from")
        if not model_folder(start).is_dir():
            raise ConfigError(f"start {start!r} is not a folder; name one that holds a model")
        base = dataclasses.asdict(ModelConfig.from_folder(model_folder(start)))
        return build(cls, {**mapping, "model": {**base, **model}})

    @classmethod
    def from_file(cls, path: str | Path, overrides: Iterable[str] = ()) -> "SftRecipe":
        """Read a TOML recipe and apply `a.b=c` overrides."""
        return cls.from_dict(apply_overrides(read_toml(path), overrides))

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved recipe, every key of every section, as plain values."""
        return plain(dataclasses.asdict(self))


def prepare_dialogues(
    recipe: SftRecipe, show_progress: bool = False, row: int = 0, num_rows: int = 1
) -> Material:
    """Open the sources of a recipe.

    Args:
        recipe: the run.
        show_progress: draw bars.
        row: which of the rows that are read at a time this process reads.
        num_rows: how many these are.

    Raises:
        DataError: the corpus or a file of dialogues cannot be read.
    """
    tokenizer = Tokenizer.load(model_folder(recipe.start))
    train = recipe.train
    shares = _shares(recipe, tokenizer, "train", show_progress)
    stream = EveryNth(MixLoader(shares, train.micro_batch_tokens), row, num_rows)
    shares = _shares(recipe, tokenizer, "held_out", show_progress)
    held_out, final_held_out = (
        held_out_examples(shares, tokenizer, train.micro_batch_tokens, tokens or MAX_FINAL_TOKENS)
        for tokens in (train.eval_tokens, train.final_eval_tokens)
    )
    return Material(
        tokenizer=tokenizer,
        stream=stream,
        held_out=held_out,
        final_held_out=final_held_out,
        baselines=dict,
        samples=lambda count: _samples(held_out.examples, tokenizer, count),
    )


def _shares(
    recipe: SftRecipe, tokenizer: Tokenizer, split: Split, show_progress: bool
) -> list[Share]:
    """Open every source of a recipe; a generator has other seeds and other filler per split."""
    corpus = recipe.corpus
    store: TokenStore | None = None
    shares = []
    for part in recipe.mix:
        lengths = (part.min_tokens, recipe.longest(part))
        seed = f"{split}-{recipe.seed}"
        if part.source.endswith(".jsonl"):
            file = DialogueFile(part.source)
            source = FileSource(file, tokenizer, lengths[1], recipe.seed, corpus.held_out, split)
        else:
            if store is None:
                documents = open_source(corpus.source, corpus.text_field, corpus.held_out)
                folder = Path(corpus.folder) if corpus.folder else recipe.folder / "data"
                store = tokenize_source(documents, split, tokenizer, folder, progress=show_progress)
            if part.source == TEXT:
                source = TextSource(store, lengths, seed)
            else:
                filler = Filler(store, tokenizer)
                source = GeneratedSource(part.source, tokenizer, filler, lengths, seed)
        shares.append(Share(source, part.weight))
    return shares


def _samples(examples: tuple[Example, ...], tokenizer: Tokenizer, count: int) -> list[Sample]:
    """Return held-out dialogues, cut before their last answer."""
    samples = []
    for number, example in enumerate(examples):
        if len(samples) == count:
            break
        targets = example.is_target.nonzero()[0]
        # Plain text has no prompt; of a dialogue, the last run of targets is the last answer.
        if targets[0] == 1:
            continue
        start = int(targets[-1])
        while example.is_target[start - 1]:
            start -= 1
        ids = example.tokens.tolist()
        samples.append(Sample(f"dialogue {number + 1}", ids[:start], ids[start:]))
    return samples
