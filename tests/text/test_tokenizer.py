import json
import random
import subprocess
import sys

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from linnet.errors import ConfigError, DataError
from linnet.text import SPECIAL_TOKENS, Tokenizer, render_chat

CORPUS = [
    "def add(a, b):\n    return a + b  # 12345\n",
    "The quick brown fox jumps over the lazy dog, doesn't it?\n\n\tTabs  and   blanks.\r\n",
    "Zażółć gęślą jaźń, 你好世界, здравствуй, e\u0301 and 🦜🏳️‍🌈.\n",
] * 4
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "é<"}}}
HOSTILE = "a <end_of_sentence> b <think></think><begin_of_document><tool_calls>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CORPUS, vocab_size=400)


def random_texts(count: int) -> list[str]:
    source = random.Random(7)
    ranges = [(0, 0x80), (0, 0x800), (0x3000, 0xA000), (0x0300, 0x0370), (0x1F300, 0x1FAFF)]
    return [
        "".join(chr(source.randint(*source.choice(ranges))) for _ in range(source.randint(0, 60)))
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\r",
        "\0",
        "a\r\n\rb",
        "  \n\t x",
        "🏳️‍🌈",
        "e\u0301\u0301",
        "\ufeffBOM",
        "\U0010ffff",
        "١٢٣٤",
    ],
    ids=ascii,
)
def test_decode_inverts_encode_for_odd_texts(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decode_inverts_encode_for_random_unicode(tokenizer):
    texts = random_texts(300)
    batch = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in batch] == texts
    assert batch == [tokenizer.encode(text) for text in texts]


def test_lone_surrogates_become_replacement_characters(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"
    assert tokenizer.decode(tokenizer.encode("\ud83e\udd9c")) == "🦜"


def test_special_tokens_have_the_first_ids_in_order(tokenizer):
    assert tokenizer.special_ids == {name: place for place, name in enumerate(SPECIAL_TOKENS)}
    assert tokenizer.begin_of_document_id == 0
    assert tokenizer.end_of_document_id == 1
    assert tokenizer.end_of_sentence_id == 3
    assert tokenizer.token_to_id("<think>") == 4
    assert tokenizer.token_to_id("no such token") is None


def test_text_never_becomes_a_special_token(tokenizer):
    special = set(tokenizer.special_ids.values())
    assert special.isdisjoint(tokenizer.encode(HOSTILE))
    assert special.isdisjoint(tokenizer.encode_batch([HOSTILE])[0])
    assert tokenizer.decode(tokenizer.encode(HOSTILE)) == HOSTILE


def test_allow_special_reads_special_tokens(tokenizer):
    assert tokenizer.encode("<end_of_sentence><think>", allow_special=True) == [3, 4]


def test_decoding_skips_control_tokens_but_shows_thinking(tokenizer):
    ids = [0, 2, *tokenizer.encode("a"), 4, 5, 6, 7, 3, 1]
    assert tokenizer.decode(ids) == "a<think></think><tool_calls></tool_calls>"
    assert tokenizer.decode(ids, skip_special=False).startswith(
        "<begin_of_document><beginning_of_sentence>a"
    )


def test_unknown_ids_decode_to_the_replacement_character(tokenizer):
    assert tokenizer.decode([-1, tokenizer.vocab_size]) == "\ufffd\ufffd"


def test_digits_are_split_in_threes(tokenizer):
    assert len(tokenizer.encode("8888888")) >= 3
    backend = Tokenizer.train(["1234567 "] * 50, vocab_size=400)
    assert [backend.decode([i]) for i in backend.encode("1234567")] == ["123", "456", "7"]


def test_a_line_end_and_the_indentation_after_it_merge_into_one_token():
    line = "if x:\n" + " " * 8 + "return\n"
    learned = Tokenizer.train([line] * 20, vocab_size=330)
    pieces = [learned.decode([token_id]) for token_id in learned.encode(line)]
    assert pieces == ["if", " x", ":\n" + " " * 8, "return", "\n"]


def test_training_twice_gives_the_same_fingerprint(tokenizer):
    again = Tokenizer.train(iter(CORPUS), vocab_size=400)
    assert again.fingerprint == tokenizer.fingerprint
    assert Tokenizer.train(CORPUS, vocab_size=390).fingerprint != tokenizer.fingerprint


def test_training_in_another_process_gives_the_same_fingerprint(tokenizer):
    code = (
        "import json, sys; from linnet.text import Tokenizer;"
        "print(Tokenizer.train(json.load(sys.stdin), vocab_size=400).fingerprint)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(CORPUS), capture_output=True, text=True
    )
    assert result.stdout.strip() == tokenizer.fingerprint, result.stderr


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="need 264"):
        Tokenizer.train(CORPUS, vocab_size=263)


@pytest.mark.parametrize("texts", [[], ["", ""]], ids=["no texts", "empty texts"])
def test_an_empty_corpus_is_refused(texts):
    with pytest.raises(DataError, match="no text"):
        Tokenizer.train(texts, vocab_size=300)


def test_a_saved_tokenizer_loads_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "deep" / "folder")
    for path in ("deep/folder", "deep/folder/tokenizer.json"):
        loaded = Tokenizer.load(tmp_path / path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.special_ids == tokenizer.special_ids
        assert loaded.control_ids == tokenizer.control_ids
        assert loaded.chat_template == tokenizer.chat_template


def test_transformers_reads_a_saved_tokenizer(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode(CORPUS[2]) == tokenizer.encode(CORPUS[2])
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 3)
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "f", "content": "b"},
    ]
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == render_chat(messages)


def test_a_missing_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"expected tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(DataError, match="no tokenizer"):
        Tokenizer.load(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["", "{", '{"model": 1}', "\0"], ids=ascii)
def test_a_corrupt_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path):
    tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(DataError, match="byte-level BPE only"):
        Tokenizer.load(tmp_path)


def write_gpt2(folder, config=None):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: place for place, token in enumerate([*alphabet, "he", "Ġhe", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nh e\nĠ he\n", encoding="utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_gpt2_files_load(tmp_path):
    write_gpt2(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode("he he") == [256, 257]
    assert loaded.decode(loaded.encode("<|endoftext|> é")) == "<|endoftext|> é"
    assert loaded.begin_of_document_id == loaded.end_of_document_id == 258
    assert loaded.end_of_sentence_id is None


def test_gpt2_files_take_special_tokens_from_the_config(tmp_path):
    added = {"259": {"content": "<end>", "special": True}}
    write_gpt2(tmp_path, {"eos_token": {"content": "<end>"}, "added_tokens_decoder": added})
    loaded = Tokenizer.load(tmp_path)
    assert loaded.end_of_sentence_id == 259
    assert loaded.vocab_size == 260
    assert loaded.encode("<end>", allow_special=True) == [259]


def test_gpt2_files_that_contradict_the_config_are_refused(tmp_path):
    write_gpt2(tmp_path, {"added_tokens_decoder": {"900": {"content": "<end>"}}})
    with pytest.raises(DataError, match="the id 900"):
        Tokenizer.load(tmp_path)


def test_gpt2_files_that_do_not_fit_are_refused(tmp_path):
    write_gpt2(tmp_path)
    (tmp_path / "merges.txt").write_text("x y\n")
    with pytest.raises(DataError, match="do not fit"):
        Tokenizer.load(tmp_path)
