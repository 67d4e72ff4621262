"""Loads a rank's part of a model for inference, in the layouts of `linnet.parallel.inference`."""

from pathlib import Path

import torch

from linnet.model.presets import model_folder
from linnet.model.quantize import Quantization, quantize_int8
from linnet.model.transformer import Model
from linnet.model.weights import load_model
from linnet.parallel.apply import Exchanges, ParallelModel
from linnet.parallel.expert import ExpertsAcrossRanks
from linnet.parallel.filling import FromFolder, FromSeed
from linnet.parallel.mesh import Mesh


def load_parallel(
    source: str | Path,
    mesh: Mesh,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
) -> Model:
    """Load this rank's part of a model; no rank ever holds all of it.

    Args:
        source: a folder, the name of a preset, or "bundled".
        mesh: of a layout from `inference_layout`.
        dtype: of the parameters and activations; router and LM head are fp32 always.
        quantization: "int8" rounds each rank's part on its own.

    Returns:
        The model in eval mode, with the interface of a whole one and its config and tokenizer.
        Every call of it is to be made on all ranks, with the same tokens.

    Raises:
        CheckpointError: as of `load_model`.
        ConfigError: the layout does not divide the model.
    """
    # The shape alone: config, tokenizer, and whether names and shapes of the folder fit.
    shape = load_model(source, dtype, device="meta")
    folder = model_folder(source)
    # Read as fp32, because the router stays so; the rest is rounded part by part.
    weights = FromFolder(folder) if folder.is_dir() else FromSeed(0)
    model = ParallelModel(
        shape.config,
        mesh,
        weights,
        Exchanges(token_groups=1),  # a decode step has too few tokens to overlap anything
        dtype=dtype,
        compute_dtype=dtype,
        shards=False,
    ).model
    model.tokenizer = shape.tokenizer
    if quantization is not None:
        _quantize(model)
    return model.requires_grad_(False).eval()


def _quantize(model: Model) -> None:
    """Round the weights; the experts stay where they are."""
    before = [layer.block_sparse_moe.dispatch for layer in model.layers]
    quantize_int8(model)
    for layer, dispatch in zip(model.layers, before, strict=True):
        assert isinstance(dispatch, ExpertsAcrossRanks)
        moe = layer.block_sparse_moe
        dispatch.local, moe.dispatch = moe.dispatch, dispatch
