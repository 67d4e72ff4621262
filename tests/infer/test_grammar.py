import json
import math
import re
import time

import pytest
import torch
from llguidance import LLParserLimits

from linnet.infer import SamplingParams, grammar_check
from linnet.infer import grammar as grammar_module
from linnet.infer.choosing import Chooser
from linnet.infer.generate import stream_text
from linnet.infer.grammar import MAX_SOURCE_BYTES, Grammar, GrammarCompiler, GrammarError
from linnet.infer.vocabulary import Vocabulary

NUM_UNUSED = 10
"""Ids of the model that the tokenizer does not have."""


@pytest.fixture(scope="module")
def vocabulary(tokenizer) -> Vocabulary:
    size = tokenizer.vocab_size + NUM_UNUSED
    return Vocabulary(tokenizer, size, frozenset({tokenizer.end_of_sentence_id}))


@pytest.fixture(scope="module")
def plain_vocabulary(plain_tokenizer) -> Vocabulary:
    """A vocabulary whose think tags are several tokens."""
    return Vocabulary(plain_tokenizer, plain_tokenizer.vocab_size, frozenset({0}))


def write(vocabulary: Vocabulary, grammar: Grammar, seed: int, budget: int = 0, **rules) -> str:
    """Write a text from random logits, in which quotes and brackets that close are likely.

    With a thinking budget, so is a think span at the start.
    """
    params = SamplingParams(seed=seed, grammar=grammar, thinking_budget=budget, **rules)
    chooser = Chooser(params, [], vocabulary)
    generator = torch.Generator().manual_seed(seed)
    closers = torch.tensor(
        [any(c in vocabulary.token_bytes(t) for c in b'"}]') for t in range(vocabulary.size)]
    )
    tokens = []
    for _ in range(3000):
        logits = 2 * torch.randn(vocabulary.size, generator=generator) + 5 * closers
        if budget and len(tokens) < len(vocabulary.open_tokens):
            logits[vocabulary.open_tokens[len(tokens)]] = 9
        choice = chooser.choose(logits)
        if choice.is_end:
            break
        tokens.append(choice.token)
        if choice.stop is not None:
            break
    else:
        raise AssertionError("the text did not end")
    return b"".join(map(vocabulary.token_bytes, tokens)).decode(errors="replace")


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def is_person(value) -> bool:
    return (
        {"name", "age"} <= value.keys() <= {"name", "age", "tags"}
        and 1 <= len(value["name"]) <= 8
        and is_int(value["age"])
        and 0 <= value["age"] <= 130
        and all(tag in ("a", "b") for tag in value.get("tags", ()))
        and len(value.get("tags", ())) <= 3
    )


TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": ["integer", "null"]},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1},
            },
            "required": ["value"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}


def is_tree(value) -> bool:
    return (
        {"value"} <= value.keys() <= {"value", "children"}
        and (value["value"] is None or is_int(value["value"]))
        and len(value.get("children", ())) <= 1
        and all(map(is_tree, value.get("children", ())))
    )


UNION = {
    "oneOf": [
        {
            "type": "object",
            "properties": {"kind": {"const": kind}, "value": value},
            "required": ["kind", "value"],
            "additionalProperties": False,
        }
        for kind, value in (("flag", {"type": "boolean"}), ("number", {"type": "number"}))
    ]
}


def is_union(value) -> bool:
    kinds = {"flag": bool, "number": (int, float)}
    return value.keys() == {"kind", "value"} and isinstance(value["value"], kinds[value["kind"]])


SCHEMAS = [
    (PERSON, is_person),
    (TREE, is_tree),
    (UNION, is_union),
    ({"type": "object"}, lambda value: isinstance(value, dict)),
    (
        {"type": "string", "pattern": "^[a-c]{2,4}-\\d$"},
        lambda value: re.fullmatch("[a-c]{2,4}-[0-9]", value),
    ),
    ({"enum": ["你好", "the", "a🦜"]}, lambda value: value in ("你好", "the", "a🦜")),
]


@pytest.mark.parametrize(("schema", "matches"), SCHEMAS, ids=range(len(SCHEMAS)))
def test_every_text_parses_and_matches_its_schema(vocabulary, schema, matches):
    texts = {write(vocabulary, Grammar.json_schema(schema), seed) for seed in range(8)}
    assert len(texts) > 1
    for text in texts:
        assert matches(json.loads(text)), text


def test_any_json_object_parses(vocabulary):
    for seed in range(10):
        assert isinstance(json.loads(write(vocabulary, Grammar.json_object(), seed)), dict)


@pytest.mark.parametrize(
    "pattern", ["[a-c]{3}", "(yes|no)!?", "你+🦜", "(?i)the cat", "a\\n/b", ""]
)
def test_every_text_matches_its_regex(vocabulary, pattern):
    for seed in range(10):
        text = write(vocabulary, Grammar.regex(pattern), seed)
        assert re.fullmatch(pattern, text), text


def test_tokens_that_write_no_text_are_never_allowed(vocabulary, tokenizer):
    matcher = vocabulary.matcher(Grammar.regex("(?s).*"))
    allowed = matcher.allowed().nonzero()[0].tolist()
    silent = {*tokenizer.special_ids.values()} - vocabulary.end_ids
    assert not silent & {*allowed}
    assert max(allowed) < tokenizer.vocab_size
    assert {*tokenizer.encode("the cat and the hat, 你 🦜")[:10]} <= {*allowed}


def test_a_complete_text_ends_at_once(vocabulary, tokenizer):
    for rules in ({}, {"ignore_eos": True}, {"min_tokens": 50}):
        assert write(vocabulary, Grammar.regex("a{1,3}b"), 1, **rules).endswith("b")
        assert write(vocabulary, Grammar.regex(""), 1, **rules) == ""
    longest = write(vocabulary, Grammar.regex("a{1,9}"), 1, ignore_eos=True)
    assert longest == "a" * 9
    (b,) = tokenizer.encode("b")
    rules = {"ignore_eos": True, "stop_token_ids": (b,)}
    assert write(vocabulary, Grammar.regex("ab{9}"), 1, **rules) == "ab"


def test_blanks_do_not_go_on_forever(vocabulary, tokenizer):
    matcher = vocabulary.matcher(Grammar.json_object())
    for token in tokenizer.encode("{\n"):
        matcher.push(token)
    (blank,) = tokenizer.encode(" ")
    count = 0
    while matcher.allowed()[blank]:
        matcher.push(blank)
        count += 1
    assert count == 64


@pytest.mark.parametrize("which", ["vocabulary", "plain_vocabulary"])
@pytest.mark.parametrize("starts_open", [False, True])
def test_the_grammar_starts_after_the_think_span(which, starts_open, request):
    vocabulary = request.getfixturevalue(which)
    encode = vocabulary.tokenizer.encode
    chooser = Chooser(
        SamplingParams(temperature=0, grammar=Grammar.json_object(), thinking_budget=100),
        vocabulary.open_tokens if starts_open else [],
        vocabulary,
    )
    wanted = [] if starts_open else [*vocabulary.open_tokens]
    wanted += [
        *encode('{"'),
        *encode("x"),
        *vocabulary.close_tokens(0),
        *encode('{"a": "<think>"}'),
    ]
    written = []
    for token in wanted:
        logits = torch.zeros(vocabulary.size)
        logits[token] = 9
        choice = chooser.choose(logits)
        written.append(choice.token)
        assert not choice.is_end
    assert written == wanted
    assert choice.stop == "stop"
    assert chooser.reasoning_tokens == len(encode('{"')) + 1


@pytest.mark.parametrize("which", ["vocabulary", "plain_vocabulary"])
def test_after_thinking_the_text_still_matches(which, request):
    vocabulary = request.getfixturevalue(which)
    num_thought = 0
    for seed in range(15):
        text = write(vocabulary, Grammar.json_schema(PERSON), seed, budget=20)
        thought, closed, rest = text.rpartition("</think>")
        assert is_person(json.loads(rest))
        assert bool(closed) == thought.startswith("<think>")
        num_thought += bool(closed)
    assert 0 < num_thought < 15


def test_a_text_does_not_end_while_it_thinks(vocabulary):
    chooser = Chooser(
        SamplingParams(temperature=0, grammar=Grammar.json_object()),
        vocabulary.open_tokens,
        vocabulary,
    )
    logits = torch.zeros(vocabulary.size)
    logits[[*vocabulary.end_ids]] = 9
    assert chooser.choose(logits).token not in vocabulary.end_ids


def test_an_open_tag_that_the_grammar_allows_too_is_a_tag(plain_vocabulary):
    grammar = Grammar.regex("<[a-z]+>!")
    encode = plain_vocabulary.tokenizer.encode
    for text in ("<think>ab</think><cat>!", "<cat>!"):
        params = SamplingParams(temperature=0, grammar=grammar, thinking_budget=9)
        chooser = Chooser(params, [], plain_vocabulary)
        for token in encode(text):
            logits = torch.zeros(plain_vocabulary.size)
            logits[token] = 9
            choice = chooser.choose(logits)
            assert choice.token == token
        assert choice.stop == "stop"


def test_a_span_is_opened_as_often_as_without_the_grammar(vocabulary):
    logits = torch.zeros(vocabulary.size)
    logits[vocabulary.open_tokens[0]] = math.log(vocabulary.size - 1)  # probability 1/2
    grammar = Grammar.regex("(the|a) cat")
    opened = 0
    for seed in range(400):
        chooser = Chooser(SamplingParams(grammar=grammar, seed=seed), [], vocabulary)
        opened += chooser.choose(logits).token in vocabulary.open_tokens
    assert abs(opened - 200) < 45


def test_a_budget_of_0_keeps_a_span_from_opening(vocabulary):
    logits = torch.zeros(vocabulary.size)
    logits[vocabulary.open_tokens[0]] = 9
    for budget, opens in ((0, False), (1, True), (None, True)):
        params = SamplingParams(
            temperature=0, grammar=Grammar.json_object(), thinking_budget=budget
        )
        token = Chooser(params, [], vocabulary).choose(logits).token
        assert (token in vocabulary.open_tokens) == opens


def test_a_model_without_think_tokens_opens_no_span(plain_vocabulary):
    logits = torch.zeros(plain_vocabulary.size)
    logits[plain_vocabulary.open_tokens[0]] = 9
    params = SamplingParams(temperature=0, grammar=Grammar.json_object())
    token = Chooser(params, [], plain_vocabulary).choose(logits).token
    assert token != plain_vocabulary.open_tokens[0]


def test_a_token_that_closes_the_span_and_goes_on_is_not_chosen(plain_vocabulary):
    tokenizer = plain_vocabulary.tokenizer
    longer = tokenizer.encode("</think>\n\n")[-1]
    (exact,) = tokenizer.encode(">")
    assert plain_vocabulary.token_bytes(longer) != b">"
    start = [*plain_vocabulary.open_tokens, *plain_vocabulary.close_tokens(0)[:-1]]
    chooser = Chooser(
        SamplingParams(temperature=0, grammar=Grammar.json_object(), thinking_budget=9),
        [],
        plain_vocabulary,
    )
    for token in start:
        logits = torch.zeros(plain_vocabulary.size)
        logits[token] = 9
        assert chooser.choose(logits).token == token
    logits = torch.zeros(plain_vocabulary.size)
    logits[longer], logits[exact] = 9, 5
    assert chooser.choose(logits).token == exact


def test_generate_keeps_a_grammar(model):
    grammar = Grammar.regex("(the|a) [ch]at")
    for seed in range(3):
        params = SamplingParams(seed=seed, grammar=grammar, thinking_budget=0)
        assert re.fullmatch(grammar.source, "".join(stream_text(model, "the", params)))


def nested(depth: int) -> dict:
    schema: dict = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Grammar.regex("(a"), "the regex cannot be used: unclosed group"),
        (lambda: Grammar.regex("(?=a)b"), "look-around"),
        (lambda: Grammar.regex("a\ud800"), "a surrogate"),
        (lambda: Grammar.regex("[^\\s\\S]"), "nothing can match it"),
        (lambda: Grammar.regex("(" * 5000 + "a" + ")*" * 5000), "nested parentheses"),
        (lambda: Grammar.regex("a" * (MAX_SOURCE_BYTES + 1)), "has 262145 bytes; at most 262144"),
        (lambda: Grammar.json_schema("{"), "is not JSON"),
        (lambda: Grammar.json_schema("[1]"), "is not JSON: Expecting object"),
        (lambda: Grammar.json_schema({"const": math.nan}), "is not JSON"),
        (lambda: Grammar.json_schema(nested(3000)), "is not JSON: maximum recursion"),
        (lambda: Grammar.json_schema('{"items":' * 3000 + "{}" + "}" * 3000), "recursion limit"),
        (lambda: Grammar.json_schema({"type": 5}), "type must be a string"),
        (lambda: Grammar.json_schema({"$ref": "#"}), "nothing can match it"),
        (lambda: Grammar.json_schema({"$ref": "http://example.com/a"}), "does not fetch"),
        (lambda: Grammar.json_schema({"uniqueItems": True}), "uniqueItems"),
        (
            lambda: Grammar.json_schema({"uniqueItems": True, "x-guidance": {"lenient": True}}),
            "uniqueItems",
        ),
        (lambda: Grammar.json_schema({"enum": []}), "Unsatisfiable"),
    ],
    ids=range(17),
)
def test_a_bad_grammar_is_refused_in_one_line(vocabulary, make, reason):
    with pytest.raises(GrammarError, match=reason) as refusal:
        vocabulary.matcher(make())
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400


EXPLOSIONS = {
    "patterns that all must match": {
        "allOf": [{"type": "string", "pattern": f"^.*a.{{{n}}}b.*$"} for n in range(40)]
    },
    "a large divisor": {"type": "integer", "multipleOf": 9999991},
    "many properties": {"properties": {f"k{n}": {"type": "string"} for n in range(6000)}},
    "alternatives multiplied": {
        "allOf": [
            {"anyOf": [{"properties": {f"{c}{n}": {"type": "string"}}} for c in "abc"]}
            for n in range(30)
        ]
    },
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("patterns that all must match", marks=pytest.mark.slow),
        pytest.param("many properties", marks=pytest.mark.slow),
        "a large divisor",
        "alternatives multiplied",
    ],
)
def test_a_schema_that_would_explode_is_refused_in_time_and_remembered(vocabulary, name):
    grammar = Grammar.json_schema(EXPLOSIONS[name])
    start = time.monotonic()
    with pytest.raises(GrammarError, match=r"takes more than 1 s or 2 GiB|too large"):
        vocabulary.matcher(grammar)
    assert time.monotonic() - start < grammar_module.CHECK_TIMEOUT_S + 1
    start = time.monotonic()
    with pytest.raises(GrammarError):
        vocabulary.matcher(grammar)
    assert time.monotonic() - start < 0.1


def test_a_grammar_that_needs_too_much_work_ends_its_text(tokenizer, monkeypatch):
    monkeypatch.setattr(
        grammar_check,
        "parser_limits",
        lambda: LLParserLimits(max_lexer_states=900, verbose_errors=False),
    )
    vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size, frozenset({3}))
    params = SamplingParams(seed=1, grammar=Grammar.regex("(?s).*a.{40}"), thinking_budget=0)
    chooser = Chooser(params, [], vocabulary)
    logits = torch.zeros(vocabulary.size)
    with pytest.raises(GrammarError, match="the regex cannot be used: lexer error: too many"):
        for _ in range(500):
            logits[tokenizer.encode("a")[0]] = 4
            chooser.choose(logits)


def test_a_slow_check_is_given_up(vocabulary, monkeypatch):
    monkeypatch.setattr(grammar_module, "CHECK_TIMEOUT_S", 0.001)
    with pytest.raises(GrammarError, match="compiling it takes more than"):
        vocabulary.matcher(Grammar.regex("a given up check"))


def test_a_check_that_cannot_run_is_no_consent(vocabulary, monkeypatch, tmp_path):
    monkeypatch.setattr(grammar_check, "__file__", str(tmp_path / "nowhere.py"))
    with pytest.raises(GrammarError, match=r"compiling it fails: .*nowhere\.py"):
        vocabulary.matcher(Grammar.regex("a check that cannot run"))


def test_a_grammar_is_compiled_once_and_matchers_go_on_alone(tokenizer, monkeypatch):
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, [tokenizer.end_of_sentence_id])
    first, grammar = compiler.matcher(Grammar.regex("ab")), Grammar.regex("ab")
    monkeypatch.setattr(grammar_module, "_reason_against", lambda source: "compiled again")
    second = compiler.matcher(grammar)
    first.push(tokenizer.encode("a")[0])
    (a,), (b,) = tokenizer.encode("a"), tokenizer.encode("b")
    assert second.allowed()[a] and not second.allowed()[b]
    assert first.allowed()[b] and not first.allowed()[a]


def test_the_last_compiled_grammars_are_kept(tokenizer, monkeypatch):
    monkeypatch.setattr(grammar_module, "_reason_against", lambda source: "")
    monkeypatch.setattr(grammar_module, "MAX_COMPILED", 2)
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, [tokenizer.end_of_sentence_id])
    for pattern in "abacad":
        compiler.matcher(Grammar.regex(pattern))
    assert [grammar.source for grammar in compiler._compiled] == ["a", "d"]


def test_a_model_without_a_tokenizer_or_an_end_keeps_no_grammar(tokenizer):
    for vocabulary in (
        Vocabulary(None, 50, frozenset({1})),
        Vocabulary(tokenizer, tokenizer.vocab_size, frozenset()),
    ):
        with pytest.raises(GrammarError, match="needs a tokenizer and an end token"):
            Chooser(SamplingParams(grammar=Grammar.json_object()), [1], vocabulary)
