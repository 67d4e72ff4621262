"""One text over ranks against `stream_tokens` on one process."""

import pytest
import torch
import torch.distributed as dist

import linnet
from linnet.errors import MemoryPlanError
from linnet.infer import SamplingParams, stream_tokens
from linnet.infer.ranks import EngineRanks
from linnet.model import Model, ModelConfig
from linnet.parallel.channel import HEAD_BYTES, Channel
from linnet.parallel.inference import inference_layout
from linnet.parallel.loading import load_parallel
from linnet.parallel.mesh import Mesh

PARAMS = {
    "greedy": SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True),
    "drawn": SamplingParams(max_tokens=12, temperature=1.0, seed=3, ignore_eos=True),
}
LAYOUTS = {
    "heads and experts": (2, {"tp": 2, "ep": 2}),
    "prompt": (3, {"cp": 3}),
    "prompt, heads and widths": (4, {"cp": 2, "tp": 2, "ep": 2, "etp": 2}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = ModelConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attn_type_list=(0, 1, 0, 1),
        rotary_dim=4,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = Model(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5, generator=generator)
    folder = tmp_path_factory.mktemp("text") / "model"
    model.save(folder)
    return folder


def prompt_of(length):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(61, (length,), generator=generator).tolist()


def on_rank(group, folder, sizes, length, params, chunk):
    world = dist.get_world_size(group)
    layout = inference_layout(linnet.load(folder, device="meta").config, world, **sizes)
    mesh = Mesh(layout, dist.get_process_group_ranks(group))
    model = load_parallel(folder, mesh, torch.float32)
    ranks = EngineRanks(model, mesh)
    if dist.get_rank(group):
        return ranks.follow()
    try:
        return list(stream_tokens(model, prompt_of(length), params, chunk, ranks))
    finally:
        ranks.close()


@pytest.mark.parametrize("length", [pytest.param(1, marks=pytest.mark.slow), 200])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("params", PARAMS)
def test_text_is_that_of_one_process(ranks, folder, params, layout, length):
    size, sizes = LAYOUTS[layout]
    (tokens, *_) = ranks(on_rank, size, folder, sizes, length, PARAMS[params], 32)
    model = linnet.load(folder, "float32")
    assert tokens == list(stream_tokens(model, prompt_of(length), PARAMS[params]))


def too_long_on_rank(group, folder):
    layout = inference_layout(linnet.load(folder, device="meta").config, 2, cp=2)
    mesh = Mesh(layout, dist.get_process_group_ranks(group))
    ranks = EngineRanks(load_parallel(folder, mesh, torch.float32), mesh)
    if dist.get_rank(group):
        return ranks.follow()
    params = SamplingParams(max_tokens=10**10)
    try:
        with pytest.raises(MemoryPlanError, match="10,000,000,0"):
            stream_tokens(ranks.model, prompt_of(3), params, ranks=ranks)
        return "refused"
    finally:
        ranks.close()


def test_text_without_room_is_refused_before_anything_is_allocated(ranks, folder):
    assert ranks(too_long_on_rank, 2, folder) == ["refused", None]


def echoed(group, messages):
    channel = Channel(group)
    if channel.is_sender:
        for message in messages:
            channel.send(message)
        return messages
    return [channel.receive() for _ in messages]


def test_messages_of_any_size_arrive(ranks):
    sizes = (0, 1, HEAD_BYTES - 13, HEAD_BYTES - 10, HEAD_BYTES - 9, HEAD_BYTES, 3 * HEAD_BYTES)
    messages = [[], {"a": [1, 2.5, None, "é"]}, *("x" * size for size in sizes)]
    assert ranks(echoed, 3, messages) == [messages] * 3
