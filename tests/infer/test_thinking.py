import itertools
import json
import random

import pytest
import tokenizers
import torch

from linnet.infer import SamplingParams
from linnet.infer.choosing import Chooser
from linnet.infer.thinking import CLOSE, OPEN, ThinkSpans
from linnet.infer.vocabulary import Vocabulary
from linnet.text import Tokenizer


@pytest.fixture(scope="module", params=["special tags", "plain tags"])
def vocabulary(request) -> Vocabulary:
    """A vocabulary with tokens of its own for the think tags, and one without, as MiniMax-M1's."""
    special = request.param == "special tags"
    tokenizer = request.getfixturevalue("tokenizer" if special else "plain_tokenizer")
    vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size, frozenset({0}))
    assert vocabulary.thinks == special
    assert (len(vocabulary.open_tokens), len(vocabulary.close_tokens(0))) == (
        (1, 1) if special else (3, 3)
    )
    return vocabulary


class Writer:
    """A model that wants to write one token after the other, and notes what it wrote."""

    def __init__(self, vocabulary: Vocabulary, prompt=(), **rules):
        self.vocabulary, self.tokens = vocabulary, []
        self.chooser = Chooser(SamplingParams(temperature=0, **rules), prompt, vocabulary)

    def write(self, *wanted: int) -> "Writer":
        """Write each of the tokens, after those that are forced before it."""
        for token in wanted:
            while self._write_one(token) != token:
                pass
        return self

    def _write_one(self, token: int) -> int:
        logits = torch.zeros(self.vocabulary.size)
        logits[token] = 1
        self.tokens.append(self.chooser.choose(logits).token)
        return self.tokens[-1]

    @property
    def text(self) -> str:
        return b"".join(map(self.vocabulary.token_bytes, self.tokens)).decode(errors="replace")

    @property
    def num_thought(self) -> int:
        return self.chooser.reasoning_tokens


@pytest.fixture
def x(vocabulary) -> int:
    (token,) = vocabulary.tokenizer.encode("x")
    return token


@pytest.fixture
def opening(vocabulary) -> tuple[int, ...]:
    return vocabulary.open_tokens


@pytest.fixture
def closing(vocabulary) -> tuple[int, ...]:
    return vocabulary.close_tokens(0)


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_span_that_the_prompt_opened_is_closed_at_the_budget(vocabulary, x, opening, budget):
    writer = Writer(vocabulary, [x, *opening], thinking_budget=budget).write(*[x] * 9)
    assert writer.text == "x" * budget + "</think>" + "x" * (9 - budget)
    assert writer.num_thought == budget


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_span_that_the_model_opened_is_closed_at_the_budget(vocabulary, x, opening, budget):
    writer = Writer(vocabulary, [x], thinking_budget=budget).write(x, *opening, *[x] * 9)
    assert writer.text == "x<think>" + "x" * budget + "</think>" + "x" * (9 - budget)
    assert writer.num_thought == budget


def test_the_budget_counts_over_all_spans(vocabulary, x, opening, closing):
    writer = Writer(vocabulary, opening, thinking_budget=5)
    writer.write(x, x, *closing, x, *opening, *[x] * 9)
    assert writer.text == "xx</think>x<think>xxx</think>xxxxxx"
    assert writer.num_thought == 5


def test_after_the_budget_a_span_is_closed_as_soon_as_it_is_opened(vocabulary, x, opening):
    writer = Writer(vocabulary, opening, thinking_budget=2).write(x, x, x)
    writer.write(*opening, x, *opening, x)
    assert writer.text == "xx</think>x<think></think>x<think></think>x"
    assert writer.num_thought == 2


def test_a_span_that_closes_by_itself_in_time_is_left_alone(vocabulary, x, opening, closing):
    writer = Writer(vocabulary, opening, thinking_budget=9).write(x, x, *closing, *[x] * 20)
    assert writer.text == "xx</think>" + "x" * 20
    assert writer.num_thought == 2


def test_a_span_that_closes_at_the_budget_is_closed_once(vocabulary, x, opening, closing):
    for budget in (2, 3, 4):
        writer = Writer(vocabulary, opening, thinking_budget=budget).write(x, x, *closing, x)
        assert writer.text == "xx</think>x"
        assert writer.num_thought == 2


def test_without_a_budget_tokens_are_counted_only(vocabulary, x, opening, closing):
    writer = Writer(vocabulary, [x]).write(x, *opening, *[x] * 30, *closing, x)
    assert writer.text == "x<think>" + "x" * 30 + "</think>x"
    assert writer.num_thought == 30
    assert not writer.chooser.needs_row_work


def test_effort_gives_the_budget(vocabulary, x, opening):
    writer = Writer(vocabulary, opening, max_tokens=20, reasoning_effort="low").write(*[x] * 9)
    assert writer.text == "xxxx</think>xxxxx"


@pytest.mark.parametrize("budget", range(6))
def test_a_character_is_never_cut(vocabulary, x, opening, budget):
    """`x` and the 4 bytes of the bird, one token each: the budget may end inside of it."""
    by_byte = {vocabulary.token_bytes(t): t for t in reversed(range(vocabulary.size))}
    bird = [by_byte[bytes([byte])] for byte in "🦜".encode()]
    writer = Writer(vocabulary, opening, thinking_budget=budget).write(x, *bird, x)
    thought = {0: "", 1: "x"}.get(budget, "x🦜")
    assert writer.text == thought + "</think>" + "x🦜x"[len(thought) :]
    assert writer.num_thought == (budget if budget < 2 else 5)


def test_a_character_that_never_ends_is_not_waited_for(vocabulary, x, opening):
    by_byte = {vocabulary.token_bytes(t): t for t in reversed(range(vocabulary.size))}
    first_byte = by_byte[b"\xf0"]
    writer = Writer(vocabulary, opening, thinking_budget=2).write(x, *[first_byte] * 6)
    assert b"".join(map(vocabulary.token_bytes, writer.tokens)) == (
        b"x" + b"\xf0" * 4 + b"</think>" + b"\xf0" * 2
    )


@pytest.mark.parametrize(
    ("prompt", "is_open"),
    [
        ("", False),
        ("the <think>", True),
        ("<think>\nthe cat", True),
        ("<think>the</think>", False),
        ("<think>the</think> cat <think>", True),
        ("the </think>", False),
        ("<think>the<end_of_sentence>\nthe cat", False),
        ("</think><end_of_sentence>the<think>\n", True),
        ("<think>" + "the cat " * 1000, True),
        ("<think></think>" + "the cat " * 1000, False),
        ("<think><end_of_sentence>" + "the cat " * 1000, False),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_prompt_that_ends_inside_a_span_is_known(vocabulary, prompt, is_open):
    tokens = vocabulary.tokenizer.encode(prompt, allow_special=True)
    assert vocabulary.starts_thinking(tokens) == is_open


def test_think_tags_may_be_control_tokens(tokenizer):
    content = json.loads(tokenizer._backend.to_str())
    for token in content["added_tokens"]:
        token["special"] = True
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)))
    vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size, frozenset({0}))
    (x,) = tokenizer.encode("x")
    assert vocabulary.starts_thinking([x, *vocabulary.open_tokens, x])
    writer = Writer(vocabulary, [x], thinking_budget=1).write(*vocabulary.open_tokens, x, x)
    assert writer.text == "<think>x</think>x"


def test_a_tag_across_the_pieces_of_a_prompt_is_found(plain_tokenizer):
    vocabulary = Vocabulary(plain_tokenizer, plain_tokenizer.vocab_size, frozenset({0}))
    (x,) = plain_tokenizer.encode("x")
    for num_after in range(1020, 1026):
        prompt = [x] * 2000 + [*vocabulary.open_tokens] + [x] * num_after
        assert vocabulary.starts_thinking(prompt)
        closed = [*prompt[:-num_after], *vocabulary.close_tokens(0), *prompt[-num_after:]]
        assert not vocabulary.starts_thinking(closed)


def counted(pieces: list[bytes]) -> tuple[int, bool]:
    """Count, from the whole text, the tokens that begin after an open tag and before its close."""
    text, spans, at, is_open = b"".join(pieces), [], 0, False
    while (found := text.find(CLOSE if is_open else OPEN, at)) >= 0:
        at = found + len(CLOSE if is_open else OPEN)
        if is_open:
            spans[-1] = range(spans[-1].start, found)
        else:
            spans.append(range(at, len(text)))
        is_open = not is_open
    starts = itertools.accumulate(map(len, pieces), initial=0)
    num = sum(any(start in span for span in spans) for start in list(starts)[:-1])
    return num, is_open


def test_tags_are_found_wherever_tokens_cut_them():
    text = b"a<think>bc</think>d<think>e"
    for num_cuts in (1, 2, 3):
        for places in itertools.combinations(range(1, len(text)), num_cuts):
            pieces = [text[a:b] for a, b in itertools.pairwise((0, *places, len(text)))]
            spans = ThinkSpans()
            for piece in pieces:
                spans.push(piece)
            assert (spans.num_tokens, spans.is_open) == counted(pieces)


def test_counts_are_those_of_the_whole_text_for_random_pieces(rng):
    parts = [b"<think>", b"</think>", b"<", b"/", b"think", b">", b"th", b"ink>", b"</", b"ab"]
    for _ in range(500):
        pieces = [b"".join(rng.choices(parts, k=rng.randint(1, 2))) for _ in range(12)]
        spans = ThinkSpans()
        for piece in pieces:
            spans.push(piece)
        assert (spans.num_tokens, spans.is_open) == counted(pieces)


def test_the_budget_holds_for_random_texts(vocabulary, x, opening, closing):
    source = random.Random(1)
    for budget in (0, 1, 2, 7, 20):
        writer = Writer(vocabulary, thinking_budget=budget)
        for _ in range(40):
            writer.write(*source.choice([opening, closing, (x,), (x,) * 5, opening[:1]]))
            assert writer.num_thought <= budget + len(closing) - 1
        pieces = [vocabulary.token_bytes(token) for token in writer.tokens]
        num, is_open = counted(pieces)
        assert num == writer.num_thought
        if not is_open:
            assert num <= budget
