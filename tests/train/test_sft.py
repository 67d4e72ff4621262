"""Fine-tuning: from a model folder, on answers only, resumed bit for bit."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from linnet.config import build
from linnet.data.dialogues import Example, pack
from linnet.errors import CheckpointError, ConfigError, DataError
from linnet.model import Model, ModelConfig, load_model, preset
from linnet.model.init import initialize
from linnet.text import Tokenizer
from linnet.train import SftRecipe, Trainer
from linnet.train.loss import batch_loss, held_out_nll
from linnet.train.metrics import read_metrics

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "attn_type_list": [0, 1],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "rotary_dim": 4,
    "num_local_experts": 4,
}
TRAIN = {
    "total_tokens": 6000,
    "batch_tokens": 1024,
    "micro_batch_tokens": 512,
    "seq_len": 400,
    "dtype": "float32",
    "eval_every": 2,
    "eval_tokens": 600,
    "final_eval_tokens": 600,
    "save_every": 2,
    "keep_last": 9,
}


@pytest.fixture(scope="session")
def start(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an untrained model with a tokenizer."""
    config = build(ModelConfig, {**dataclasses.asdict(preset("nano")), **SHAPE})
    model = initialize(Model(config), torch.Generator().manual_seed(0))
    texts = [path.read_text() for path in sorted(corpus.glob("*.py"))]
    model.tokenizer = Tokenizer.train(texts, 320)
    folder = tmp_path_factory.mktemp("start") / "model"
    model.save(folder)
    return folder


@pytest.fixture
def sft(start: Path, corpus: Path, tmp_path: Path) -> Callable[..., SftRecipe]:
    """Return a function that builds a small recipe; keywords change sections."""
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"Say {number}."},
                {"role": "assistant", "content": f"{number}!"},
            ]
        }
        for number in range(20)
    ]
    file = tmp_path / "dialogues.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))

    def build(name: str = "run", **changes: Any) -> SftRecipe:
        base: dict[str, Any] = {
            "name": name,
            "start": str(start),
            "out": str(tmp_path),
            "train": TRAIN,
            "optim": {"learning_rate": 1e-2, "min_learning_rate": 1e-3, "warmup_steps": 3},
            "mix": [
                {"source": str(file)},
                {"source": "small_talk", "weight": 2.0},
                {"source": "text", "weight": 0.5},
            ],
            "corpus": {
                "source": str(corpus),
                "held_out": 0.3,
                "folder": str(tmp_path / "data"),
            },
        }
        for key, value in changes.items():
            base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
        return SftRecipe.from_dict(base)

    return build


def run(recipe: SftRecipe, **kwargs: Any) -> Trainer:
    trainer = Trainer(recipe, show_progress=False, **kwargs)
    trainer.run()
    return trainer


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(folder, dtype="float32").named_parameters())


def assert_same_run(left: Path, right: Path) -> None:
    for (name, a), (_, b) in zip(
        weights(left / "model").items(), weights(right / "model").items(), strict=True
    ):
        assert torch.equal(a, b), name
    losses = [[row["train/loss"] for row in read_metrics(folder)] for folder in (left, right)]
    assert losses[0] == losses[1]


def test_run_begins_with_the_weights_of_its_start(sft, start):
    trainer = Trainer(sft(), show_progress=False)
    for name, value in weights(start).items():
        assert torch.equal(dict(trainer.model.named_parameters())[name], value), name


def test_fine_tuning_lowers_the_loss_of_held_out_answers(sft):
    trainer = run(sft(train={"total_tokens": 15_000, "eval_every": 5, "save_every": 30}))
    rows = read_metrics(trainer.folder)
    bits = [row["eval/bits_per_byte"] for row in rows if "eval/bits_per_byte" in row]
    assert bits[-1] < 0.8 * bits[0]
    assert trainer.progress.tokens >= 15_000
    assert sum(row["train/batch_tokens"] for row in rows) == trainer.progress.tokens


def test_resumed_run_equals_uninterrupted_one_bit_for_bit(sft):
    whole = run(sft("whole"))
    for step in (2, 4):
        name = f"resumed_{step}"
        folder = whole.folder.parent / name
        checkpoint = f"checkpoints/step_{step:08d}"
        shutil.copytree(whole.folder / checkpoint, folder / checkpoint)
        shutil.copy(whole.folder / "metrics.jsonl", folder)
        run(sft(name), resume=True)
        assert_same_run(whole.folder, folder)


def test_resuming_another_mixture_is_refused(sft):
    run(sft())
    with pytest.raises(DataError, match="the saved data position has mix="):
        Trainer(sft(mix=[{"source": "small_talk"}]), resume=True, show_progress=False)


def packed_examples(model: Model, generator: torch.Generator) -> list[Example]:
    examples = []
    for length in (40, 7, 65):
        tokens = torch.randint(0, model.config.vocab_size, (length,), generator=generator)
        is_target = torch.rand(length, generator=generator) < 0.3
        is_target[0], is_target[-1] = False, True
        examples.append(Example(tokens.numpy(), is_target.numpy()))
    return examples


def test_packed_dialogues_give_the_loss_and_gradients_of_separate_ones(sft, generator):
    model = Trainer(sft(), show_progress=False).model
    examples = packed_examples(model, generator)
    packed = batch_loss(model, pack(examples), "paper").nll
    packed.backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total = torch.zeros(())
    for example in examples:
        loss = batch_loss(model, pack([example]), "paper").nll
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(packed.detach(), total, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(together[name], parameter.grad, rtol=1e-4, atol=1e-4)


def test_only_targets_bear_loss(sft, generator):
    model = Trainer(sft(), show_progress=False).model
    batch = pack(packed_examples(model, generator))
    logits = model(batch.tokens, cu_seqlens=batch.cu_seqlens)[0]
    expected = torch.nn.functional.cross_entropy(logits, batch.targets[0], reduction="sum")
    torch.testing.assert_close(batch_loss(model, batch, "paper").nll, expected)
    assert held_out_nll(model, [batch]) == pytest.approx(expected.item(), rel=1e-5)


def test_config_of_the_start_can_be_changed_where_weights_still_fit(sft, start):
    recipe = sft(model={"rope_theta": 1e6, "max_position_embeddings": 400})
    assert recipe.model.rope_theta == 1e6 and recipe.model.hidden_size == 16
    trainer = run(recipe)
    assert ModelConfig.from_folder(trainer.folder / "model").rope_theta == 1e6
    with pytest.raises(CheckpointError, match="has shape"):
        Trainer(sft("wider", model={"intermediate_size": 32}), show_progress=False)


def test_report_samples_are_held_out_dialogues_up_to_their_last_answer(sft):
    trainer = Trainer(sft(), show_progress=False)
    tokenizer = trainer.model.tokenizer
    samples = trainer.material.samples(3)
    assert len(samples) == 3
    for sample in samples:
        prompt = tokenizer.decode(sample.prompt, skip_special=False)
        assert prompt.endswith("<beginning_of_sentence>ai name=assistant\n")
        assert sample.truth[-1] == tokenizer.end_of_sentence_id
        assert sample.truth.count(tokenizer.end_of_sentence_id) == 1


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"mix": []}, r"has no .*mix"),
        ({"mix": [{"source": "recalll"}]}, "did you mean 'recall'"),
        ({"mix": [{"source": "recall", "weight": 0.0}]}, "is 0.0; give a positive one"),
        ({"mix": [{"source": "recall", "max_tokens": 401}]}, "got 32, 401 and 400"),
        ({"mix": [{"source": "recall", "min_tokens": 300, "max_tokens": 200}]}, "300, 200"),
        ({"mix": [{"sources": "recall"}]}, "unknown key 'mix.sources'"),
        ({"start": "/no/such/model"}, r"start ./no/such/model. is not a folder"),
        ({"model": {"rope_teta": 1.0}}, "did you mean 'rope_theta'"),
        ({"train": {"seq_len": 600}}, "seq_len 600"),
    ],
)
def test_mistakes_in_a_recipe_are_named(sft, changes, complaint):
    with pytest.raises(ConfigError, match=complaint):
        sft(**changes)


def test_bad_line_of_a_file_is_named(sft, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"messages": []}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl line 1"):
        Trainer(sft(mix=[{"source": str(path)}]), show_progress=False)
