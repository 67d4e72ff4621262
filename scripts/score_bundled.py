"""Score the skills of the bundled model on dialogues it has never seen, and fill its card.

    python scripts/score_bundled.py [MODEL] [--max-length 1048576] [--count 100] [--card]

Every prompt is a chat as a server would encode it, answered greedily and compared with the one
right answer. Facts, numbers and filler come from held-out seeds and held-out files. Writes
benchmarks/results/<device>/bundled_scores.json after each skill; --card puts the table into
MODEL/README.md, between its two markers.
"""

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from harness import machine_facts, write_result

from linnet.data import evaluation_batches, open_source, tokenize_source
from linnet.data.dialogues import GENERATORS, Filler
from linnet.data.dialogues.facts import draw_facts
from linnet.data.dialogues.turns import ask
from linnet.infer.generate import end_tokens
from linnet.model import Cache, Model
from linnet.model.weights import load_model
from linnet.text import encode_chat
from linnet.train.loss import held_out_nll

CHUNK = 4096
MAX_ANSWER_TOKENS = 400
LENGTHS = (1024, 4096, 16384, 65536, 262144, 524288, 1048576)
LAST_ANSWERS = (
    # name in the table, generator, tokens of its dialogues
    ("copying a text", "copying", 128),
    ("copying a text", "copying", 512),
    ("copying a text", "copying", 2048),
    ("finding a definition in Python code", "definitions", 1024),
    ("finding a definition in Python code", "definitions", 4096),
    ("facts told in a chat, among other turns", "chat", 600),
    ("using a tool's result", "tools", 700),
    ("sums below 100, in a think span", "arithmetic", 90),
    ("small talk, and what it cannot do", "small_talk", 75),
)
BEGIN, END = "<!-- scores -->", "<!-- end of scores -->"


class Scorer:
    """One model, and held-out text to build its prompts from."""

    def __init__(self, folder: str, data: Path, seed: str) -> None:
        """Load a model folder; tokenized documents are kept in `data`."""
        self.model = load_model(folder, dtype="float32")
        assert self.model.tokenizer is not None
        self.tokenizer = self.model.tokenizer
        store = tokenize_source(open_source("stdlib"), "held_out", self.tokenizer, data)
        self.store, self.filler, self.seed = store, Filler(store, self.tokenizer), seed
        self._end_ids = end_tokens(self.model)

    def rng(self, *names: object) -> random.Random:
        """Return a random source that no training run has used."""
        return random.Random("/".join(map(str, ("score", self.seed, *names))))

    def answers(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Return greedy answers to prompts, whose common beginning is taken in once."""
        most = min(map(len, prompts)) - 1
        common = next((n for n in range(most) if len({p[n] for p in prompts}) > 1), most)
        cache = self.model.new_cache()
        prefill(self.model, prompts[0][:common], cache)
        before = cache.snapshot()
        texts = []
        for prompt in prompts:
            cache.restore(before)
            texts.append(self._answer(prompt[common:], cache))
        return texts

    @torch.inference_mode()
    def _answer(self, rest: Sequence[int], cache: Cache) -> str:
        tokens: list[int] = []
        pending = torch.tensor([list(rest)])
        while len(tokens) < MAX_ANSWER_TOKENS:
            token = int(self.model(pending, cache=cache, logits_to_keep=1)[0, -1].argmax())
            if token in self._end_ids:
                break
            tokens.append(token)
            pending = torch.tensor([[token]])
        return self.tokenizer.decode(tokens)

    def prompt(self, messages: Sequence[Any], tools: Sequence[Any] = ()) -> list[int]:
        """Encode a chat as a server does."""
        return encode_chat(self.tokenizer, messages, tools, True, self.tokenizer.chat_template)


@torch.inference_mode()
def prefill(model: Model, tokens: Sequence[int], cache: Cache) -> None:
    """Take in tokens whose outputs nobody reads."""
    for chunk in torch.tensor([list(tokens)]).split(CHUNK, 1):
        model(chunk, cache=cache, logits_to_keep=0)


def score_recall(scorer: Scorer, length: int, count: int) -> dict[str, Any]:
    """Plant facts evenly in a text of `length` tokens and ask for each of them."""
    num_facts = max(4, min(16, length // 128))
    right = asked = 0
    seconds, tokens = 0.0, 0
    by_depth: list[int] = [0] * 4
    for number in range(-(-count // num_facts)):
        rng = scorer.rng("recall", length, number)
        facts = draw_facts(rng, num_facts)
        room = length - 18 * num_facts - 60
        lines = scorer.filler.code(rng, room) if number % 2 == 0 else scorer.filler.lines(rng, room)
        for place, fact in enumerate(facts):
            lines.insert(round((place + 0.5) / num_facts * len(lines)), fact.statement)
        text = "\n".join(lines)
        prompts = [scorer.prompt([ask(f"{text}\n\n{fact.questions[0]}")]) for fact in facts]
        start = time.perf_counter()
        for place, (fact, answer) in enumerate(zip(facts, scorer.answers(prompts), strict=True)):
            asked += 1
            if answer == fact.statement:
                right += 1
                by_depth[place * 4 // num_facts] += 1
        seconds += time.perf_counter() - start
        tokens += len(prompts[0])
    contexts = -(-count // num_facts)
    return {
        "right": right,
        "asked": asked,
        "mean_prompt_tokens": tokens // contexts,
        "right_by_quarter_of_depth": by_depth,
        "seconds": round(seconds, 1),
    }


def score_last_answer(scorer: Scorer, name: str, num_tokens: int, count: int) -> dict[str, Any]:
    """Ask a generator's dialogues up to the last answer, which must come out exactly."""
    right = asked = tokens = 0
    for number in range(count):
        rng = scorer.rng(name, num_tokens, number)
        dialogue = GENERATORS[name](rng, num_tokens, scorer.filler)
        last = dialogue.messages[-1]
        prompt = scorer.prompt(dialogue.messages[:-1], dialogue.tools)
        (answer,) = scorer.answers([prompt])
        right += answer == last["content"]
        asked, tokens = asked + 1, tokens + len(prompt)
    return {"right": right, "asked": asked, "mean_prompt_tokens": tokens // asked}


def score_tool_calls(scorer: Scorer, count: int) -> dict[str, Any]:
    """Ask for the call itself: the right tools with the right arguments, in order."""
    right = asked = 0
    for number in range(count):
        rng = scorer.rng("calls", number)
        dialogue = GENERATORS["tools"](rng, 400, scorer.filler)
        place = next(i for i, m in enumerate(dialogue.messages) if m["role"] == "assistant")
        wanted = dialogue.messages[place].get("tool_calls")
        if not wanted:
            continue
        (answer,) = scorer.answers([scorer.prompt(dialogue.messages[:place], dialogue.tools)])
        right += parse_calls(answer) == wanted
        asked += 1
    return {"right": right, "asked": asked}


def parse_calls(text: str) -> list[Any] | None:
    """Return the calls of an answer, None if it is anything but well-formed calls."""
    match = re.fullmatch(r"<tool_calls>\n(.*)\n</tool_calls>", text, flags=re.DOTALL)
    try:
        return [json.loads(line) for line in match[1].split("\n")] if match else None
    except ValueError:
        return None


def score_python(scorer: Scorer) -> dict[str, Any]:
    """Measure bits per byte of held-out files, cut in pieces of 512 tokens as in pre-training."""
    held_out = evaluation_batches(scorer.store, 4096, 512, 200_000)
    nll = held_out_nll(scorer.model, held_out)
    return {"bits_per_byte": nll / 0.6931471805599453 / held_out.num_bytes}


def score(scorer: Scorer, args: argparse.Namespace) -> dict[str, Any]:
    """Score everything, writing what there is after each part."""
    console = Console(stderr=True)
    values: dict[str, Any] = {
        "machine": machine_facts(args.threads),
        "model": Path(args.model).name,
        "recall": {},
        "answers": [],
    }

    def keep(name: str, row: dict[str, Any]) -> None:
        console.print(name, row)
        write_result(args.name, values)

    if "other" in args.parts:
        values["python"] = score_python(scorer)
        keep("python", values["python"])
        values["calls"] = score_tool_calls(scorer, args.count)
        keep("calls", values["calls"])
        for title, generator, num_tokens in LAST_ANSWERS:
            # A long prompt takes a while, and says as much.
            count = max(10, args.count * 1024 // max(1024, num_tokens))
            row = score_last_answer(scorer, generator, num_tokens, count)
            values["answers"].append({"skill": title, "tokens": num_tokens, **row})
            keep(f"{title}, {num_tokens}", row)
    if "recall" in args.parts:
        for length in LENGTHS:
            if length <= args.max_length:
                count = max(16, min(args.count, args.count * 16_384 // length))
                values["recall"][str(length)] = score_recall(scorer, length, count)
                keep(f"recall, {length}", values["recall"][str(length)])
    return values


def table(values: dict[str, Any]) -> str:
    """Return the scores as a Markdown table."""
    rows = [
        (f"recalling planted facts, {short(int(length))} tokens", row)
        for length, row in values["recall"].items()
    ]
    rows += [(f"{row['skill']}, {short(row['tokens'])} tokens", row) for row in values["answers"]]
    if "calls" in values:
        rows.append(("calling the right tool with the right arguments", values["calls"]))
    lines = ["| skill | right | of |", "| --- | ---: | ---: |"]
    lines += [
        f"| {name} | {row['right'] / row['asked']:.0%} | {row['asked']} |" for name, row in rows
    ]
    if "python" in values:
        bits = values["python"]["bits_per_byte"]
        lines += ["", f"Bits per byte of held-out files of Python's standard library: {bits:.3f}."]
    return "\n".join(lines)


def short(length: int) -> str:
    """Return a length as 512, 16K or 1M."""
    for size, unit in ((2**20, "M"), (2**10, "K")):
        if length >= size:
            return f"{length // size}{unit}"
    return str(length)


def fill_card(card: Path, text: str) -> None:
    """Replace what stands between the card's markers."""
    before, rest = card.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    card.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Score a model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="linnet/bundled", help="model folder")
    parser.add_argument("--max-length", type=int, default=2**20, help="of the text to recall from")
    parser.add_argument("--count", type=int, default=100, help="questions per skill")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", default="0", help="another one asks other questions")
    parser.add_argument("--parts", nargs="+", default=["other", "recall"])
    parser.add_argument("--name", default="bundled_scores", help="of the JSON file")
    parser.add_argument("--data", type=Path, default=Path("runs/bundled-data"))
    parser.add_argument("--card", action="store_true", help="fill the table of the card")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    values = score(Scorer(args.model, args.data, args.seed), args)
    if args.card:
        fill_card(Path(args.model) / "README.md", table(values))


if __name__ == "__main__":
    main()
