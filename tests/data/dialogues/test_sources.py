"""Examples by their index: lengths kept, splits apart, every dialogue of a file once per epoch."""

import json

import pytest

from linnet.data.dialogues import (
    GENERATORS,
    DialogueFile,
    FileSource,
    GeneratedSource,
    TextSource,
)
from linnet.errors import DataError


@pytest.mark.parametrize("name", GENERATORS)
def test_generated_examples_keep_to_their_lengths(name, tokenizer, filler):
    source = GeneratedSource(name, tokenizer, filler, (600, 1500), "train-0")
    lengths = [len(source.example(index)) for index in range(12)]
    assert max(lengths) <= 1500 and max(lengths) > 500


def test_generated_examples_differ_by_index_and_seed_only(tokenizer, filler):
    train, again, held_out = (
        GeneratedSource("recall", tokenizer, filler, (200, 400), seed)
        for seed in ("train-0", "train-0", "held_out-0")
    )
    assert train.dialogue(3) == again.dialogue(3)
    assert train.dialogue(3) not in (train.dialogue(4), held_out.dialogue(3))


def test_generator_that_cannot_be_that_short_says_so(tokenizer, filler):
    source = GeneratedSource("tools", tokenizer, filler, (8, 16), "train-0")
    with pytest.raises(DataError, match="'tools' makes no dialogue of at most 16 tokens"):
        source.example(0)


@pytest.fixture
def file(tmp_path) -> DialogueFile:
    path = tmp_path / "dialogues.jsonl"
    lines = [
        {
            "messages": [
                {"role": "user", "content": "word " * (60 if number == 7 else 1)},
                {"role": "assistant", "content": f"answer {number}"},
            ]
        }
        for number in range(30)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return DialogueFile(path)


def answers(source: FileSource, tokenizer, count: int) -> list[str]:
    examples = [source.example(index) for index in range(count)]
    return [tokenizer.decode(e.tokens[e.is_target].tolist()) for e in examples]


def test_dialogues_of_a_file_are_all_read_once_per_epoch(file, tokenizer, caplog):
    train, held_out = (
        FileSource(file, tokenizer, 100, 0, 0.3, split) for split in ("train", "held_out")
    )
    assert "1 of" in caplog.text and "more than 100 tokens" in caplog.text
    parts = [set(answers(source, tokenizer, 60)) for source in (train, held_out)]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == {f"answer {n}" for n in range(30) if n != 7}
    epoch = len(parts[0])
    first, second = answers(train, tokenizer, epoch), answers(train, tokenizer, 2 * epoch)[epoch:]
    assert sorted(first) == sorted(second) and first != second


def test_split_of_a_file_without_dialogues_is_an_error(file, tokenizer):
    with pytest.raises(DataError, match="the held_out part has no dialogue of at most 100"):
        FileSource(file, tokenizer, 100, 0, 0.0, "held_out")


def test_pieces_of_text_are_runs_of_a_document(store):
    source = TextSource(store, (16, 64), "train-0")
    documents = [store.document(index).tolist() for index in range(store.num_documents)]
    for index in range(20):
        piece = source.example(index).tokens.tolist()
        assert 16 <= len(piece) - 1 <= 64
        assert any(
            piece == document[start : start + len(piece)]
            for document in documents
            for start in range(len(document))
        )
