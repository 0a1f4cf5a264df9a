"""A decoder of the Llama family: token ids in, logits out.

    tokens ─ embed_tokens ─┬─ layers[0] ─ … ─ layers[n_layers-1] ─ norm ─ lm_head ─ logits
                           └─ each layer:   x ← x + attention(norm(x));   x ← x + mlp(norm(x))

    batch, seq        rows, and tokens in a row         hidden      width of the stream between layers
    heads, kv_heads   query heads; key/value heads      head_dim    width of one head
    total             tokens read before plus those of this call

Every module has the name it has in a Hugging Face checkpoint and every projection is an `nn.Linear` (cpu/linear's) that
is only ever called, so any of them can be replaced by another module under the same name (projections of the same x
are called together, by `each`). `generation.py` makes tokens from logits, `load.py` brings weights. Where gradients
flow on a CPU, four operations run as their twins in `autograd.py` (SwiGLU on any device): the same numbers in fewer
passes.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minilora.cpu import Linear, each
from minilora.cpu.products import are_bfloat16
from minilora.llm import autograd
from minilora.llm.checkpointing import recomputed
from minilora.llm.config import ModelConfig
from minilora.llm.prefix import apart, together

MOST_BYTES_A_NUMBER = 2  # wider than bfloat16, torch's own backward of attention is the faster: benchmarks/attention.py
MOST_TOKENS = 4096  # of all rows: with more in the cache torch's attention is the faster, with its other operations
Rotation = tuple[Float[Tensor, "rows seq head_dim"], Float[Tensor, "rows seq head_dim"]]  # as rotation_of gives it


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where weights came from: what an adapter made for them has to name."""

    name: str = ""  # as a hub would call it, such as "HuggingFaceTB/SmolLM2-135M-Instruct"
    license: str = ""
    attribution: str = ""
    published_sha256: str = ""  # of the file as its maker published it, where `files` are a conversion of it
    files: tuple[Path, ...] = ()

    @cached_property
    def sha256(self) -> str:
        """Hash of the weights as published, whatever dtype they were loaded in; made when first asked for (1 s/GB)."""
        if self.published_sha256 or not self.files:
            return self.published_sha256
        digest = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
        return digest.hexdigest()


def trains_on_cpu(x: Tensor) -> bool:
    """Whether gradients flow through x on a CPU: there autograd.py's operations are the faster ones."""
    return x.requires_grad and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


class RMSNorm(nn.Module):
    """Scale every vector to a root mean square of one, then each of its features by a learned weight.

        y = x / √(mean(x²) + eps) · weight                       [RMSNorm] eq. 4

    `eps` keeps a vector of zeros from dividing by zero.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*n hidden"]) -> Float[Tensor, "*n hidden"]:
        if trains_on_cpu(x):
            return autograd.rms_norm(x, self.weight, self.eps)
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            kernels = autograd.norm_kernels(x, self.weight)
            if kernels is not None:
                return kernels.rms_norm(x, self.weight, self.eps)[0]
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotation_of(config: ModelConfig, positions: Int[Tensor, "rows seq"], dtype: torch.dtype) -> Rotation:
    """The angle by which each pair of features is turned at each position: (cos, cos) and (−sin, sin).

        angle[position, i] = position · frequency[i],  i < head_dim / 2             [RoPE] eq. 15

    Angles are at least float32: in bfloat16 the positions 256 and 257 would be the same number.
    """
    wide = torch.promote_types(dtype, torch.float32)
    frequencies = torch.tensor(config.rope_frequencies(), dtype=wide, device=positions.device)
    angles = positions[:, :, None].to(wide) * frequencies  # (rows, seq, head_dim / 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Float[Tensor, "batch n seq head_dim"], rotation: Rotation) -> Float[Tensor, "batch n seq head_dim"]:
    """Turn each pair of features (i, i + head_dim / 2) of every head by the angle of its position.

        (first, second) → (first · cos − second · sin,  second · cos + first · sin)          [RoPE] eq. 34

    [RoPE] pairs neighbours (2i, 2i + 1); Hugging Face's checkpoints, and so we, pair the two halves of a head. The two
    differ by a fixed permutation of the rows of q_proj and k_proj: `read_gguf.py` undoes it.
    """
    cos, sin = (table[:, None] for table in rotation)  # (rows, 1, seq, head_dim): the same for every head
    if trains_on_cpu(x):
        return autograd.rotate(x, cos, sin)
    swapped = x.roll(x.shape[-1] // 2, dims=-1)  # (second, first)
    return torch.addcmul(x * cos, swapped, sin)


class KVCache:
    """Keys and values of the tokens already read, of every layer, in memory reserved once.

    With it a model reads only its new tokens: `length` counts those read before.
    """

    in_place = True  # new keys and values are written into `room`; a cache through which gradients flow has none

    def __init__(self, n_layers: int, max_tokens: int) -> None:
        self.n_layers = n_layers
        self.max_tokens = max_tokens
        self.length = 0
        self._kept = torch.empty(0)  # reserved when the first keys say in which dtype, where, and for how many rows

    def extend(
        self,
        layer: int,
        keys: Float[Tensor, "batch kv_heads seq head_dim"],
        values: Float[Tensor, "batch kv_heads seq head_dim"],
    ) -> tuple[Float[Tensor, "batch kv_heads total head_dim"], Float[Tensor, "batch kv_heads total head_dim"]]:
        """Write one layer's new keys and values behind the old ones and return all of them."""
        end = self.length + keys.shape[2]
        if layer == 0 and self.length == 0:
            batch, kv_heads, _, head_dim = keys.shape
            self._kept = keys.new_empty(self.n_layers, 2, batch, kv_heads, self.max_tokens, head_dim)
        kept_keys, kept_values = self.room(layer, keys.shape[2])
        kept_keys[:, :, self.length : end] = keys
        kept_values[:, :, self.length : end] = values
        return kept_keys[:, :, :end], kept_values[:, :, :end]

    def room(
        self, layer: int, n: int
    ) -> tuple[
        Float[Tensor, "batch kv_heads max_tokens head_dim"], Float[Tensor, "batch kv_heads max_tokens head_dim"]
    ]:
        """Where one layer's keys and its values are kept, with room for `n` more behind the old ones.

        Raises:
            ValueError: if there is no such room.
        """
        if self.length + n > self.max_tokens:
            needed = self.length + n
            raise ValueError(f"the cache was made for {self.max_tokens} tokens and {needed} are needed: make it larger")
        return self._kept[layer, 0], self._kept[layer, 1]

    def keep_rows(self, rows: list[int]) -> None:
        """Forget all rows of the batch but these. In place."""
        self._kept = self._kept[:, :, rows]


def is_one_token(cache: KVCache, *projected: Float[Tensor, "batch seq _"]) -> bool:
    """Whether a new token a row is read, as generating text does it, where cpu/one_token is faster than torch."""
    batch, seq, _ = projected[0].shape
    usual = seq == 1 and 0 < batch * cache.length <= MOST_TOKENS and cache.in_place
    return usual and are_bfloat16(*projected) and not any(t.requires_grad for t in projected)


def causal_mask(seq: int, past: int, device: torch.device) -> Bool[Tensor, "seq total"]:
    """True where one of `seq` new tokens (row) may look: at the `past` tokens, at the new ones before it, at itself.

    >>> causal_mask(2, 1, torch.device("cpu")).int()
    tensor([[1, 1, 0],
            [1, 1, 1]], dtype=torch.int32)
    """
    return torch.ones(seq, past + seq, dtype=torch.bool, device=device).tril(past)


class Attention(nn.Module):
    """Every token looks at the tokens before it. Several query heads share one key and value head: [GQA]."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        q_features, kv_features = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q_features, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_features, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_features, bias=config.qkv_bias)
        self.o_proj = Linear(q_features, config.hidden_size, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch n hidden"],
        rotation: Rotation,
        mask: Bool[Tensor, "batch 1 seq total"] | None,
        cache: KVCache | None,
        prefix: tuple[int, int] | None = None,
    ) -> Float[Tensor, "batch n hidden"]:
        """Mix, for every token, the values of the tokens it looks at.

            o_proj(softmax(q kᵀ / √head_dim) v), with q and k turned to their positions

        `mask` is True where a token (row) may look at another (column); None means at itself and all before it.
        With a `prefix`, (rows, shared tokens), all rows lie together in one: prefix.py.
        """
        q, k, v = each(x, self.q_proj, self.k_proj, self.v_proj)
        if prefix is not None:
            q, k, v = (apart(t, *prefix) for t in (q, k, v))
        y = self._mix(q, k, v, rotation, mask, cache)
        return self.o_proj(y if prefix is None else together(y, prefix[1]))

    def _mix(
        self,
        q: Float[Tensor, "batch seq q_features"],
        k: Float[Tensor, "batch seq kv_features"],
        v: Float[Tensor, "batch seq kv_features"],
        rotation: Rotation,
        mask: Bool[Tensor, "batch 1 seq total"] | None,
        cache: KVCache | None,
    ) -> Float[Tensor, "batch seq q_features"]:
        if cache is not None and is_one_token(cache, q, k, v):
            from minilora.cpu import one_token

            return one_token.attention(q, k, v, rotation, *cache.room(self.layer, 1), cache.length, mask)
        q = rotate(self._split_heads(q), rotation)  # (batch, heads, seq, head_dim)
        k = rotate(self._split_heads(k), rotation)  # (batch, kv_heads, seq, head_dim)
        v = self._split_heads(v)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (batch, kv_heads, total, head_dim)
        if mask is None and cache is None and trains_on_cpu(q) and q.element_size() <= MOST_BYTES_A_NUMBER:
            return autograd.causal_attention(q, k, v).transpose(1, 2).flatten(2)
        if q.shape[2] == 1:  # a single new token may look at everything: heads that share keys are as rows of one
            rows = q.reshape(len(q), k.shape[1], -1, self.head_dim)  # (batch, kv_heads, heads / kv_heads, head_dim)
            y = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask)
            return y.reshape(len(y), 1, -1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)

    def _split_heads(self, x: Float[Tensor, "batch seq features"]) -> Float[Tensor, "batch heads seq head_dim"]:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    """Widen every token, let one half of the width decide what of the other passes, and narrow it again.

        y = down_proj(silu(gate_proj(x)) · up_proj(x))           [SwiGLU] eq. 6

    Each token for itself: only attention looks sideways.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "*n hidden"]) -> Float[Tensor, "*n hidden"]:
        gate, up = each(x, self.gate_proj, self.up_proj)
        plain = not gate.requires_grad or torch.is_autocast_enabled(gate.device.type)
        return self.down_proj(F.silu(gate) * up if plain else autograd.swiglu(gate, up))


class Layer(nn.Module):
    """Attention and MLP, each reading a normalized stream and adding to it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Float[Tensor, "batch n hidden"],
        rotation: Rotation,
        mask: Bool[Tensor, "batch 1 seq total"] | None,
        cache: KVCache | None,
        prefix: tuple[int, int] | None = None,
    ) -> Float[Tensor, "batch n hidden"]:
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, cache, prefix)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """The decoder up to its last hidden states: everything but the head.

    With `gradient_checkpointing` set, training keeps each layer's input alone and computes the layer again in the
    backward: checkpointing.py.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        vectors = torch.empty(config.vocab_size, config.hidden_size)
        if not vectors.is_meta:  # to draw random numbers that are none, torch would import its compiler: 2 s
            nn.init.normal_(vectors, std=0.02)
        self.embed_tokens = nn.Embedding.from_pretrained(vectors, freeze=False)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        tokens: Int[Tensor, "batch seq"],
        *,
        positions: Int[Tensor, "rows seq"] | None = None,
        mask: Bool[Tensor, "batch seq total"] | None = None,
        cache: KVCache | None = None,
        shared: int = 0,
    ) -> Float[Tensor, "batch seq hidden"]:
        """Hidden state of every token. The arguments are those of `Decoder.forward`.

        The first `shared` tokens, the same in every row, are computed once: prefix.py.

        Raises:
            ValueError: if tokens are shared and positions, a mask or a cache could tell the rows apart.
        """
        return self.read(self.embed_tokens(tokens), positions=positions, mask=mask, cache=cache, shared=shared)

    def read(
        self,
        x: Float[Tensor, "batch seq hidden"],
        *,
        positions: Int[Tensor, "rows seq"] | None = None,
        mask: Bool[Tensor, "batch seq total"] | None = None,
        cache: KVCache | None = None,
        shared: int = 0,
    ) -> Float[Tensor, "batch seq hidden"]:
        """What `forward` makes of vectors that stand for tokens: their embeddings, or others.

        Raises:
            ValueError: if vectors are shared and positions, a mask or a cache could tell the rows apart.
        """
        if shared and not (positions is None and mask is None and cache is None):
            raise ValueError("rows share tokens only where all are read at the same place: no positions, mask or cache")
        past, (batch, seq, _) = (cache.length if cache else 0), x.shape
        if positions is None:
            positions = torch.arange(past, past + seq, device=x.device)[None]
        if mask is None and past > 0 and seq > 1:
            mask = causal_mask(seq, past, x.device).expand(batch, -1, -1)
        if mask is not None:
            mask = mask[:, None]  # (batch, 1, seq, total): the same for every head
        rotation = rotation_of(self.config, positions, x.dtype)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled() and cache is None
        prefix = (batch, shared) if shared else None
        x = together(x, shared) if shared else x
        for layer in self.layers:
            given = rotation, mask, None if recompute else cache, prefix
            x = recomputed(layer, x, *given) if recompute else layer(x, *given)
        if cache is not None:
            cache.length += seq
        x = self.norm(x)
        return apart(x, batch, shared) if shared else x


class Decoder(nn.Module):
    """A causal language model: a `Transformer` and a head over the vocabulary, which may share the embedding's weight.

    `origin` says where its weights came from.
    """

    def __init__(self, config: ModelConfig, origin: Origin = Origin()) -> None:
        super().__init__()
        self.config = config
        self.origin = origin
        self.model = Transformer(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_head()

    @property
    def name(self) -> str:
        """What a hub would call these weights; an adapter names it as its base."""
        return self.origin.name

    @property
    def base_sha256(self) -> str:
        """Hash of these weights as published; an adapter made for them carries it."""
        return self.origin.sha256

    def tie_head(self) -> None:
        """Let the head use the embedding's weight, where the config says so. In place."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        tokens: Int[Tensor, "batch seq"],
        *,
        positions: Int[Tensor, "rows seq"] | None = None,
        mask: Bool[Tensor, "batch seq total"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Logits of the token after each token.

        Rows of different length need no mask when they are padded on the right: no token looks to its right, so
        only the logits of the padding itself are meaningless. `model.model(tokens)` gives the hidden states alone,
        for who wants the head over some of them only.

        Args:
            positions: place of each token in its text (rows is batch, or 1 for all alike); default: counted on
                from the cache.
            mask: True where a token (seq) may look at another (total); default: at itself and all before it.
            cache: tokens read before; it takes up the new ones.
        """
        return self.lm_head(self.model(tokens, positions=positions, mask=mask, cache=cache))
