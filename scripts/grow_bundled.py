"""Give the bundled model heads that see the last token, and a last layer that looks for matches.

    python scripts/grow_bundled.py runs/bundled-1-short/model runs/bundled-1-grown

Copying and recall take one thing: find where the last tokens stood before, and repeat what came
next there. The two heads of `nano` forget over 16 and 256 tokens at the fastest, so nothing in it
tells the last token from the ones before (a linear probe finds the token before in 32 % of
positions, and training alone had not changed that after two million tokens). This script puts the
missing part in place, and `recipes/bundled_2_heads.toml` trains on from there:

1. five heads with slopes that are the same in every layer (`slope_rule = "level"`: half a token's
   weight is gone after 1.4, 2.8, 11, 44 and 177 tokens); each old head goes where its slope is
   nearest;
2. the new heads of the last lightning layer learn to write a code of the last two tokens, by
   regression on that layer alone;
3. queries and keys of the softmax layer are fitted to find the match, its values and output to
   repeat the token there.
"""

import argparse
import dataclasses
import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from linnet.data import open_source, tokenize_source
from linnet.data.dialogues import Example, Filler, GeneratedSource, TextSource, pack
from linnet.model import Model
from linnet.model.attention import LightningAttention, SoftmaxAttention
from linnet.model.decay import head_slopes
from linnet.model.init import initialize
from linnet.model.weights import load_model
from linnet.ops import apply_rotary, rotary_tables

HEADS = 5
SIZES = (44, 24)
"""Channels of the code of the last token, and of the one before it."""
AMPLITUDES = (1.3, 0.8)
MIXTURE = (("copying", 60, 300, 40), ("recall", 150, 350, 30), ("chat", 150, 300, 8))
EXAMPLES = (*MIXTURE, ("tools", 450, 700, 8), ("text", 200, 300, 16))
MATCH_EXAMPLES = (("copying", 60, 250, 170), ("recall", 150, 350, 130))


def main() -> None:
    """Grow a model of two heads."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of the model to grow")
    parser.add_argument("folder", type=Path, help="to be made")
    parser.add_argument("--data", type=Path, default=Path("runs/bundled-data"))
    parser.add_argument("--steps", type=int, default=160, help="of the regression")
    parser.add_argument("--match-steps", type=int, default=300)
    args = parser.parse_args()
    torch.manual_seed(0)
    model, places = add_heads(load_model(args.model, dtype="float32"))
    drawer = Drawer(model, args.data)
    teach_last_tokens(model, places[-2], drawer.draw(EXAMPLES), args.steps)
    fit_match(model, drawer.draw(MATCH_EXAMPLES), args.match_steps)
    args.folder.parent.mkdir(parents=True, exist_ok=True)
    model.save(args.folder, overwrite=True)
    print(f"{args.folder}: {sum(p.numel() for p in model.parameters()):,} parameters")


class Drawer:
    """Draws training examples of the bundled model."""

    def __init__(self, model: Model, data: Path) -> None:
        """Open the standard library, tokenized below `data`."""
        assert model.tokenizer is not None
        self._tokenizer = model.tokenizer
        self._store = tokenize_source(open_source("stdlib"), "train", self._tokenizer, data)
        self._filler = Filler(self._store, self._tokenizer)

    def draw(self, mixture: Sequence[tuple[str, int, int, int]]) -> list[Example]:
        """Return examples of (generator, fewest tokens, most tokens, count)."""
        found = []
        for name, low, high, count in mixture:
            if name == "text":
                source = TextSource(self._store, (low, high), "grow")
            else:
                source = GeneratedSource(name, self._tokenizer, self._filler, (low, high), "grow")
            found += [source.example(index) for index in range(count)]
        return found


@torch.no_grad()
def add_heads(old: Model) -> tuple[Model, list[list[int]]]:
    """Return a model with `HEADS` heads and level slopes, and where each layer's old heads are."""
    config = dataclasses.replace(old.config, num_attention_heads=HEADS, slope_rule="level")
    slopes = torch.tensor(head_slopes(HEADS, "level"))
    new = initialize(Model(config), torch.Generator().manual_seed(0)).eval()
    places = []
    for source, target in zip(old.layers, new.layers, strict=True):
        attention, grown = source.self_attn, target.self_attn
        if isinstance(attention, LightningAttention) and isinstance(grown, LightningAttention):
            distance = (slopes.log() - attention.decay.log()[:, None]).abs()
            places.append(distance.argmin(1).tolist())
            _grow_lightning(attention, grown, places[-1])
        elif isinstance(attention, SoftmaxAttention) and isinstance(grown, SoftmaxAttention):
            places.append([])  # fitted anew
    sizes = {name: parameter.shape for name, parameter in new.named_parameters()}
    for name, parameter in old.named_parameters():
        if sizes[name] == parameter.shape:
            new.get_parameter(name).copy_(parameter)
    new.tokenizer = old.tokenizer
    return new, places


def _grow_lightning(old: LightningAttention, new: LightningAttention, places: list[int]) -> None:
    """Put the old heads in their places; others get keys and queries that nearly always agree."""
    heads, dim, width = new.num_heads, new.head_dim, new.qkv_proj.weight.shape[1]
    others = [head for head in range(heads) if head not in places]
    qkv = new.qkv_proj.weight.view(heads, 3, dim, width)
    for part, gain in enumerate((2.0, 2.0, 3.0)):
        qkv[others, part] = torch.randn(len(others), dim, width) * gain * width**-0.5
    qkv[places] = old.qkv_proj.weight.view(len(places), 3, dim, width)
    gate = new.output_gate.weight.view(heads, dim, width)
    gate[others] = 0
    gate[places] = old.output_gate.weight.view(len(places), dim, width)
    out = new.out_proj.weight.view(-1, heads, dim)
    out[:, others] = torch.randn(out.shape[0], len(others), dim) * 0.015
    out[:, places] = old.out_proj.weight.view(-1, len(places), dim)
    norm = new.norm.weight.view(heads, dim)
    norm[others] = 1.0
    norm[places] = old.norm.weight.view(len(places), dim) * (len(places) / heads) ** 0.5


def inputs(model: Model, layers: Sequence[int], examples: Sequence[Example]) -> list[list[Tensor]]:
    """Return the normed inputs [T, D] of some layers, per example."""
    found: list[list[Tensor]] = []
    for example in examples:
        kept: dict[int, Tensor] = {}
        hooks = [
            model.layers[layer].input_layernorm.register_forward_hook(
                lambda _, __, output, layer=layer, kept=kept: kept.__setitem__(layer, output[0])
            )
            for layer in layers
        ]
        with torch.no_grad():
            model.hidden_states(pack([example]).tokens)
        for hook in hooks:
            hook.remove()
        found.append([kept[layer] for layer in layers])
    return found


def teach_last_tokens(
    model: Model, places: list[int], examples: Sequence[Example], steps: int
) -> None:
    """Train the new heads of the last lightning layer to write codes of the last two tokens.

    The codes go to the directions in which the softmax layer's input has varied least.
    """
    layer = len(model.layers) - 2
    attention = model.layers[layer].self_attn
    assert isinstance(attention, LightningAttention)
    before, after = zip(*inputs(model, (layer, layer + 1), examples), strict=True)
    seen = torch.cat(after)
    directions = torch.linalg.eigh(seen.T @ seen)[1]  # [D, D], ascending
    codes = token_codes(model)
    new = torch.tensor([head not in places for head in range(HEADS)])
    dim = attention.head_dim
    rows = {
        attention.qkv_proj.weight: new.repeat_interleave(3 * dim)[:, None],
        attention.output_gate.weight: new.repeat_interleave(dim)[:, None],
        attention.norm.weight: new.repeat_interleave(dim),
        attention.out_proj.weight: new.repeat_interleave(dim)[None],
    }
    optimizer = torch.optim.Adam(list(rows))
    for step in range(steps):
        rate = 4e-3 * min(1.0, (step + 1) / 15) * (0.15 if step > 0.75 * steps else 1.0)
        optimizer.param_groups[0]["lr"] = rate
        loss = torch.zeros(())
        for number in random.Random(step).sample(range(len(examples)), 3):
            tokens = torch.from_numpy(examples[number].tokens[:-1])
            wanted = torch.zeros(len(tokens) - 2, directions.shape[0])
            wanted[:, : SIZES[0]] = codes[0][tokens[1:-1]]
            wanted[:, SIZES[0] : sum(SIZES)] = codes[1][tokens[:-2]]
            written = new_heads_output(attention, new, before[number])[2:] @ directions
            loss = loss + (written - wanted).pow(2).mean() / 3
        optimizer.zero_grad()
        loss.backward()
        for parameter, mask in rows.items():
            assert parameter.grad is not None
            parameter.grad *= mask
        optimizer.step()
        if (step + 1) % 40 == 0:
            print(f"last tokens: step {step + 1}, squared error {float(loss.detach()):.3f}")


def token_codes(model: Model) -> list[Tensor]:
    """Return a random code [vocab, size] of every token, of the wanted amplitude."""
    with torch.no_grad():
        embedding = model.layers[0].input_layernorm(model.embed_tokens.weight)
    codes = []
    for size, amplitude in zip(SIZES, AMPLITUDES, strict=True):
        code = embedding @ torch.randn(embedding.shape[1], size)
        spread = (embedding.shape[1] / sum(SIZES)) ** 0.5
        codes.append(code / code.pow(2).mean().sqrt() * amplitude * spread)
    return codes


def new_heads_output(attention: LightningAttention, new: Tensor, x: Tensor) -> Tensor:
    """Return what the new heads alone add [T, D] to the normed input x [T, D]."""
    heads, dim, length = attention.num_heads, attention.head_dim, x.shape[0]
    q, k, v = F.silu(attention.qkv_proj(x)).view(length, heads, 3, dim).unbind(2)
    age = torch.arange(length)[:, None] - torch.arange(length)
    weights = torch.exp(-attention.decay[:, None, None] * age.clamp(min=0)) * (age >= 0)
    o = torch.einsum("thk,shk,hts,shv->thv", q, k, weights, v).flatten(1)
    gated = attention.norm(o, attention.output_gate(x)).view(length, heads, dim)
    return attention.out_proj((gated * new[:, None]).flatten(1))


def fit_match(model: Model, examples: Sequence[Example], steps: int) -> None:
    """Fit the softmax layer: look for where the last tokens stood, and repeat what came next."""
    attention, config = model.layers[-1].self_attn, model.config
    assert isinstance(attention, SoftmaxAttention)
    pairs = [match_pairs(example) for example in examples]
    seen = [x for (x,) in inputs(model, (len(model.layers) - 1,), examples)]
    dim, width = attention.head_dim, seen[0].shape[1]
    weights = [torch.nn.Parameter(torch.randn(dim, width) * 0.1) for _ in range(2)]
    optimizer = torch.optim.AdamW(weights, lr=3e-3, weight_decay=0.0)
    usable = [number for number, pair in enumerate(pairs) if len(pair)]
    for step in range(steps):
        loss, count = torch.zeros(()), 0
        for number in random.Random(step).sample(usable, 6):
            x, pair = seen[number], pairs[number]
            tables = rotary_tables(torch.arange(len(x))[None], config.rotary_dim, config.rope_theta)
            q, k = (apply_rotary((x @ w.T)[None, :, None], *tables)[0, :, 0] for w in weights)
            scores = q[pair[:, 0]] @ k.T * dim**-0.5
            scores = scores.masked_fill(torch.arange(len(x)) > pair[:, :1], float("-inf"))
            loss = loss + F.cross_entropy(scores, pair[:, 1], reduction="sum")
            count += len(pair)
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"match: step {step + 1}, {float(loss.detach()) / count:.3f} nats")
    _set_softmax(model, attention, [w.detach() for w in weights], seen, examples)


def match_pairs(example: Example) -> Tensor:
    """Return [P, 2]: positions before a target, and where the longest match tells that target.

    The second is the latest position that holds the target and is preceded by the most of the
    tokens that precede the target, two at least.
    """
    tokens = example.tokens
    same = tokens[:, None] == tokens[None]
    run = same.astype("int64")  # [T, T], length of the common end of two prefixes
    for place in range(1, len(tokens)):
        run[place, 1:] = (run[place - 1, :-1] + 1) * same[place, 1:]
    pairs = []
    for place, target in itertools.pairwise(range(1, len(tokens) - 1)):
        if example.is_target[target]:
            lengths = run[place, :place] * same[target, 1 : place + 1]
            if (longest := lengths.max()) >= 2:
                pairs.append((place, int((lengths == longest).nonzero()[0][-1]) + 1))
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)


@torch.no_grad()
def _set_softmax(
    model: Model,
    attention: SoftmaxAttention,
    weights: list[Tensor],
    seen: list[Tensor],
    examples: Sequence[Example],
) -> None:
    """Write the fit into the layer; values and output are the best map from token to logit."""
    x = torch.cat(seen)
    tokens = torch.cat([torch.from_numpy(example.tokens[:-1]) for example in examples])
    rows = F.layer_norm(model.lm_head.weight, model.lm_head.weight.shape[1:])
    ridge = x.T @ x + 0.01 * len(x) * torch.eye(x.shape[1])
    best = torch.linalg.solve(ridge, x.T @ (rows[tokens] - rows[tokens].mean(0)))
    u, s, vh = torch.linalg.svd(best)
    dim, half = attention.head_dim, s.sqrt()
    attention.k_proj.weight.copy_(weights[1])
    attention.v_proj.weight.copy_((u[:, :dim] * half[:dim]).T)
    for head in range(attention.q_proj.weight.shape[0] // dim):
        part = slice(head * dim, (head + 1) * dim)
        noise = torch.randn_like(weights[0]) * weights[0].std() * 0.15
        attention.q_proj.weight[part] = weights[0] + noise
        attention.o_proj.weight[:, part] = vh[:dim].T * half[:dim] / HEADS


if __name__ == "__main__":
    main()
