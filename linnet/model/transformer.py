"""The model: embedding, hybrid blocks, final norm, fp32 LM head (MiniMax-01, section 2).

Block wiring as published (SPEC 2.2). With postnorm the residual is the *normed* input, which is
DeepNorm written with the norm at the start of the next sublayer:

    h = norm(x);  x = alpha h + beta f(h)

and with postnorm=false the raw one: x = alpha x + beta f(norm(x)).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from linnet.model.attention import Context, LightningAttention, Memory, SoftmaxAttention
from linnet.model.cache import Cache
from linnet.model.config import SOFTMAX, Dialect, ModelConfig
from linnet.model.decode import decode_step
from linnet.model.layers import Embedding, Linear, RMSNorm
from linnet.model.moe import MixtureOfExperts, RouterStats, SharedExpert
from linnet.model.paged import PackedRows
from linnet.ops import lm_head, recomputed, rotary_tables
from linnet.ops.documents import check_offsets, document_bounds

if TYPE_CHECKING:
    from linnet.text import Tokenizer


class Block(nn.Module):
    """One layer: attention, then experts, each with its norm and residual factors."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        kind = config.attn_type_list[layer]
        self.self_attn = (SoftmaxAttention if kind == SOFTMAX else LightningAttention)(
            config, layer
        )
        self.block_sparse_moe = MixtureOfExperts(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.shared_mlp = self.coefficient = None
        if config.shared_intermediate_size:
            self.shared_mlp = SharedExpert(config)
            self.coefficient = Linear(config.hidden_size, 1)
        self.postnorm = config.postnorm
        self.attention_factors = config.residual_factors(layer)
        self.mlp_factors = (config.layernorm_mlp_alpha, config.layernorm_mlp_beta)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, RouterStats | None]:
        """Map x [B, T, D] to [B, T or W, D] and the router's statistics."""
        again = context.forms_norms_again
        normed = self.input_layernorm(x)
        with _formed_again(self.input_layernorm, x, normed, again):
            y = self.self_attn(normed, context)
        residual = context.pick(normed if self.postnorm else x)
        x = _residual_sum(residual, y, self.attention_factors)
        if context.wanted is not None and not x.numel():
            return x, None
        normed = self.post_attention_layernorm(x)
        with _formed_again(self.post_attention_layernorm, x, normed, again):
            y, stats = self._feed_forward(normed)
        return _residual_sum(normed if self.postnorm else x, y, self.mlp_factors), stats

    def _feed_forward(self, x: Tensor) -> tuple[Tensor, RouterStats | None]:
        y, stats = self.block_sparse_moe(x)
        if self.shared_mlp is not None and self.coefficient is not None:
            # fp32, as in the published code: y (1 - c) + shared c.
            wide = x if x.dtype == torch.float64 else x.float()
            c = torch.sigmoid(self.coefficient(wide))
            y = torch.lerp(y.to(c.dtype), self.shared_mlp(x).to(c.dtype), c).to(x.dtype)
        return y, stats


def _formed_again(
    norm: RMSNorm, x: Tensor, normed: Tensor, again: bool
) -> AbstractContextManager[None]:
    return recomputed(normed, lambda: norm(x)) if again else nullcontext()


def _residual_sum(residual: Tensor, y: Tensor, factors: tuple[float, float]) -> Tensor:
    alpha, beta = factors
    return torch.add(y if beta == 1.0 else y * beta, residual, alpha=alpha)


class Model(nn.Module):
    """A hybrid lightning-attention mixture-of-experts language model.

    A new one has uninitialized parameters: see `linnet.load`, or `linnet.model.init.initialize`.

    Args:
        config: its shape.
        compute_dtype: dtype of the activations; parameters of another dtype are cast where they
            are used. Router, states, softmax statistics and LM head are fp32 whatever this says.
    """

    tokenizer: "Tokenizer | None"
    """The tokenizer that came with the checkpoint, if any."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.activation_recompute = False
        self.tokenizer = None
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        blocks = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.layers = cast(Sequence[Block], blocks)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)

    def forward(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        cu_seqlens: Tensor | None = None,
        logits_to_keep: int | None = None,
    ) -> Tensor:
        """Return next-token logits.

        Args:
            tokens: [B, T] int64 ids.
            cache: from `new_cache`; the tokens continue it, in chunks of any size. Nothing is
                recorded for a backward pass then. If the call fails, the cache stays as it was.
            cu_seqlens: [N + 1] integer offsets of documents packed along T (B = 1, no cache).
            logits_to_keep: only the last that many positions; all if None.

        Returns:
            [B, T or logits_to_keep, vocab] fp32.

        Raises:
            ValueError: arguments that do not fit together, or ids outside the vocabulary.
        """
        if logits_to_keep is not None and logits_to_keep < 0:
            raise ValueError(f"logits_to_keep is {logits_to_keep}; it must not be negative")
        if cache is None:
            hidden, _ = self.hidden_states(tokens, cu_seqlens)
        else:
            self._check(tokens, cache, cu_seqlens)
            logits = decode_step(self, tokens, cache, wants_logits=logits_to_keep != 0)
            if logits is not None:
                return logits
            hidden = self._continue(tokens, cache, logits_to_keep)
        if logits_to_keep is not None:
            hidden = hidden[:, max(0, hidden.shape[1] - logits_to_keep) :]
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            return lm_head(hidden, self.lm_head.weight)

    def hidden_states(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, list[RouterStats]]:
        """Return the normed hidden states [B, T, D] that the LM head reads.

        Arguments as in `forward`. In training mode also returns the router statistics per layer.
        With `positions` [1, T], of each token in its document, the tokens may be part of a row of
        which `cu_seqlens` describes the whole, if the layers' `attend` know what to do with that:
        see `linnet.parallel`.
        """
        self._check(tokens, None, cu_seqlens if positions is None else None)
        return self._run_layers(tokens, None, cu_seqlens, positions=positions)

    @torch.no_grad()
    def continue_packed(self, tokens: Tensor, rows: PackedRows) -> Tensor:
        """Continue several sequences of a paged memory at once.

        Args:
            tokens: [1, T] int64, the new tokens of all sequences one after the other.
            rows: which sequences, and how many tokens of each. Their states are replaced by
                `rows.commit`, which the caller calls for those that are to keep the tokens.

        Returns:
            The normed hidden states [1, W, D] that the LM head reads, of `rows.wanted`.

        Raises:
            ValueError: tokens that do not fit, or ids outside the vocabulary.
        """
        self._check(tokens, None, rows.cu_seqlens)
        return self._run_layers(tokens, rows, rows.cu_seqlens, rows.wanted)[0]

    @torch.no_grad()
    def continue_part(
        self, tokens: Tensor, part: slice, memory: Memory, wanted: Tensor | None = None
    ) -> Tensor:
        """Continue a memory by some of its new tokens, while others run elsewhere.

        Args:
            tokens: [B, T] int64, all new tokens: what is refused is refused everywhere.
            part: which of them run here.
            memory: gives their positions.
            wanted: [W] indices within the part of the tokens whose outputs are read; None for all.

        Returns:
            The normed hidden states [B, T_r or W, D] that the LM head reads.

        Raises:
            ValueError: tokens that are not int64, or ids outside the vocabulary.
        """
        self._check(tokens, None, None)
        return self._run_layers(tokens[:, part], memory, None, wanted)[0]

    @torch.no_grad()
    def _continue(self, tokens: Tensor, cache: Cache, num_wanted: int | None) -> Tensor:
        before, length = cache.snapshot(), tokens.shape[1]
        wanted = None
        if num_wanted is not None and num_wanted < length:
            wanted = torch.arange(length - num_wanted, length, device=tokens.device)
        try:
            hidden, _ = self._run_layers(tokens, cache, None, wanted)
        except BaseException:
            # Some layers have taken the tokens in and others have not.
            cache.restore(before)
            raise
        cache.advance(tokens.shape[1])
        return hidden

    def _run_layers(
        self,
        tokens: Tensor,
        cache: Memory | None,
        cu_seqlens: Tensor | None,
        wanted: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, list[RouterStats]]:
        if cache is not None:
            positions = cache.positions(tokens.shape[1], tokens.device)
        elif positions is None:
            positions = _positions(tokens, cu_seqlens)
        context = self.context(positions, cu_seqlens, cache)
        x, stats = self.run_blocks(self.embed(tokens), context, wanted)
        return self.norm(x), stats

    def embed(self, tokens: Tensor) -> Tensor:
        """Return what the first block reads, [B, T, D], of ids [B, T]."""
        return self.embed_tokens(tokens).to(self.compute_dtype)

    def context(
        self, positions: Tensor, cu_seqlens: Tensor | None, cache: Memory | None = None
    ) -> Context:
        """Return what the blocks share, for tokens at positions [1, T] of their documents."""
        rotary = rotary_tables(positions, self.config.rotary_dim, self.config.rope_theta)
        # A checkpointed block keeps nothing in any case.
        again = torch.is_grad_enabled() and not (self.activation_recompute and self.training)
        return Context(rotary, cache, cu_seqlens, again)

    def run_blocks(
        self, x: Tensor, context: Context, wanted: Tensor | None = None
    ) -> tuple[Tensor, list[RouterStats]]:
        """Pass [B, T, D] through the blocks; the last one returns the `wanted` tokens alone."""
        all_stats = []
        blocks = list(self.layers)
        for layer in blocks:
            if layer is blocks[-1]:
                # Of a token that nobody reads, the last layer leaves its keys, values and state:
                # in a prompt, no attention of that layer and none of its experts.
                context = context._replace(wanted=wanted)
            if self.activation_recompute and self.training:
                x, stats = checkpoint(layer, x, context, use_reentrant=False)
            else:
                x, stats = layer(x, context)
            if stats is not None:
                all_stats.append(stats)
        return x, all_stats

    def new_cache(self, batch_size: int = 1) -> Cache:
        """Return an empty cache for `batch_size` sequences that advance together."""
        return Cache(self.config.num_hidden_layers, batch_size)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.embed_tokens.weight.device

    def save(
        self, folder: str | Path, dialect: Dialect = "linnet", overwrite: bool = False
    ) -> None:
        """Write the model as a checkpoint folder; see `linnet.model.weights.save_model`."""
        from linnet.model.weights import save_model

        save_model(self, folder, dialect, overwrite)

    def _check(self, tokens: Tensor, cache: Cache | None, cu_seqlens: Tensor | None) -> None:
        if tokens.ndim != 2 or tokens.dtype != torch.int64:
            raise ValueError(
                f"tokens must be [B, T] int64; got {tuple(tokens.shape)} {tokens.dtype}"
            )
        if cache is not None and cu_seqlens is not None:
            raise ValueError("a cache continues whole rows; it cannot be combined with cu_seqlens")
        if cache is not None and cache.batch_size != tokens.shape[0]:
            raise ValueError(
                f"the cache holds {cache.batch_size} sequences; got {tokens.shape[0]} rows"
            )
        if cu_seqlens is not None:
            check_offsets(cu_seqlens, tokens.shape[0])
            document_bounds(cu_seqlens, tokens.shape[1])
        if tokens.device.type == "cpu" and tokens.numel():
            low, high = _smallest_and_largest(tokens)
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"token id {low if low < 0 else high} outside the vocabulary of "
                    f"{self.config.vocab_size}; does the tokenizer belong to this model?"
                )


def _smallest_and_largest(tokens: Tensor) -> tuple[int, int]:
    if tokens.numel() > 64:
        low, high = (int(x) for x in tokens.aminmax())
        return low, high
    rows = tokens.tolist()  # no operators: in decoding each would take as long as a layer's norm
    return min(map(min, rows)), max(map(max, rows))


def _positions(tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return positions [1, T], counted from the start of each document."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    if cu_seqlens is not None:
        offsets = cu_seqlens.to(positions.dtype)
        positions = positions - offsets[:-1].repeat_interleave(offsets.diff())
    return positions[None]
