"""Virtual tokens: what is trained stands before every text, and the base stays as it is.

    n       virtual tokens, at the positions 0 … n − 1; the text's own begin at n
    kv      numbers in one layer's key of one token: kv_heads · head_dim
    h_i     what token i is to the tokens after it: its key and its value in every layer

prefix tuning   learns h_i itself, for each virtual token i:

        P      (n, layers · 2 · kv)                           in a row layer after layer, the key and then the value
        h_i  = P[i]  for i < n,   the base's own after that               [PrefixTuning] section 4.2
        P[i] = MLP(P'[i]),  P' (n, kv)                                    [PrefixTuning] section 4.3

    The MLP is for training alone: `fold` computes P once and forgets it. P is a KV cache that trains: keys are taken
    as they stand, and are not turned to their positions.

prompt tuning   learns the embeddings from which the base computes h_i:

        P      (n, hidden)
        x    = [P; embedding(tokens)]                                     [PromptTuning] section 2

A text is read as if it followed those tokens, so that even new ones change the answer. Begun with `words`, both methods
are at the start the base with these words before every text. No weight has their effect: nothing can be merged.

Read before this file: torch_lora/adapter_layer, llm/model.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minilora.llm.config import ModelConfig
from minilora.llm.model import KVCache, Transformer, causal_mask
from minilora.torch_lora.adapter_layer import AdapterLayer


class VirtualTokens(AdapterLayer):
    """A decoder's `Transformer` that reads n_virtual learned tokens before each text, and is called as before.

    Positions and masks that it is given are those of the text alone, and so are the hidden states that it gives; a
    cache takes up the virtual tokens too, and is made longer by them. A packed row has them once, and each of its
    samples sees them.

        inject(model, ["model"], lambda base: PrefixTuning(base, n_virtual=20))
    """

    wraps = "decoder without its head"
    base: Transformer
    P: nn.Parameter

    def __init__(self, base: nn.Module, n_virtual: int, words: Sequence[int]) -> None:
        super().__init__()
        if not isinstance(base, Transformer):
            kind = type(base).__name__
            raise TypeError(
                f"{type(self).__name__} stands over the Transformer of minilora's own Decoder, this is a {kind}: "
                'inject(model, ["model"], wrap) puts it there; other models have no place for virtual tokens'
            )
        most, vocab_size = base.config.max_seq_len - 1, base.config.vocab_size
        if not 0 < n_virtual <= most:
            raise ValueError(f"n_virtual is {n_virtual}: use 1 to {most:,}, which leaves the model a token of text")
        if len(words) not in (0, n_virtual):
            raise ValueError(f"{n_virtual} virtual tokens from {len(words)} words: give each its own, or none")
        if not all(0 <= word < vocab_size for word in words):
            raise ValueError(f"a word is a token outside 0..{vocab_size - 1}: it is of another vocabulary")
        self.n_virtual = n_virtual
        self.base = base.requires_grad_(False)

    @staticmethod
    def accepts(base: nn.Module) -> bool:
        return isinstance(base, Transformer)

    @property
    def config(self) -> ModelConfig:
        """The base's, with the room that is left for text."""
        return replace(self.base.config, max_seq_len=self.base.config.max_seq_len - self.n_virtual)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether training keeps each layer's input alone: llm/checkpointing."""
        return self.base.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.base.gradient_checkpointing = on

    def adapter_tensors(self) -> dict[str, Tensor]:
        return {"P": self.P}

    def describe(self) -> str:
        return f"{type(self).__name__} of {self.n_virtual} virtual tokens"

    def adapt(self, W: Float[Tensor, "rows columns"]) -> NoReturn:
        self._refuse_to_merge()

    def merge(self) -> NoReturn:
        """Raises TypeError: no weight has the effect of tokens that stand before a text."""
        self._refuse_to_merge()

    def fused(self, dtype: torch.dtype | None = None) -> NoReturn:
        """Raises TypeError, as merge does."""
        self._refuse_to_merge()

    def delta_weight(self) -> NoReturn:
        """Raises TypeError, as merge does."""
        self._refuse_to_merge()

    def _refuse_to_merge(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} cannot be merged: its {self.n_virtual} virtual tokens change what is read, not a "
            "weight; leave it in the model, and generate reads them once for each answer"
        )

    def _after_virtual(
        self, positions: Int[Tensor, "rows seq"] | None, mask: Bool[Tensor, "batch seq total"] | None
    ) -> tuple[Int[Tensor, "rows seq"] | None, Bool[Tensor, "batch seq wider"] | None]:
        """The text's positions and mask, where the virtual tokens stand before it and all of it may look at them."""
        n = self.n_virtual
        return (
            None if positions is None else positions + n,
            None if mask is None else F.pad(mask, (n, 0), value=True),
        )


class PrefixTuning(VirtualTokens):
    """Learned keys and values before those of the text, in every layer.

        P (n, layers · 2 · kv);  with mlp_features:  P[i] = W₂ tanh(W₁ P'[i] + b₁) + b₂,  W₁ (mlp_features, kv)

    Trains n · layers · 2 · kv numbers; for Llama-2-7B and n = 20, 20 · 32 · 2 · 4,096 = 5,242,880. P begins as standard
    normal numbers, or as the keys and values that the base computes of `words`: then the new layer gives what the base
    gives for words and text together. Gradients are those of P alone, so a layer is not computed again in the backward:
    gradient checkpointing is refused.

    Raises:
        TypeError: if the base is not a decoder's `Transformer`.
        ValueError: for a number of virtual tokens or words that does not fit, or words together with an MLP.
    """

    def __init__(
        self, base: nn.Module, *, n_virtual: int, mlp_features: int | None = None, words: Sequence[int] = ()
    ) -> None:
        super().__init__(base, n_virtual, words)
        if mlp_features is not None and words:
            raise ValueError("an MLP cannot be begun so that it gives the keys of words: leave one of the two out")
        if mlp_features is not None and mlp_features < 1:
            raise ValueError(f"mlp_features is {mlp_features}: use 1 or more, such as 512, or None for no MLP")
        config, device = self.base.config, self.base.embed_tokens.weight.device
        kv = config.n_kv_heads * config.head_dim
        row = config.n_layers * 2 * kv
        self.mlp: nn.Sequential | None = None
        if mlp_features is not None:
            layers = nn.Linear(kv, mlp_features), nn.Tanh(), nn.Linear(mlp_features, row)
            self.mlp = nn.Sequential(*layers).to(device)
        drawn = torch.randn(n_virtual, row if self.mlp is None else kv).to(device)
        self.P = nn.Parameter(self._read_words(words) if words else drawn)

    def forward(
        self,
        tokens: Int[Tensor, "batch seq"],
        *,
        positions: Int[Tensor, "rows seq"] | None = None,
        mask: Bool[Tensor, "batch seq total"] | None = None,
        cache: KVCache | None = None,
        shared: int = 0,
    ) -> Float[Tensor, "batch seq hidden"]:
        """Hidden state of every token of the text. The arguments are those of `Decoder.forward`.

        Raises:
            ValueError: if tokens are shared, or gradient checkpointing is on where gradients are.
        """
        if shared:
            raise ValueError("after a learned prefix rows are not read together: leave shared at 0")
        if self.base.gradient_checkpointing and torch.is_grad_enabled():
            raise ValueError(
                "gradient checkpointing computes a layer again without gradients to a learned prefix: set "
                "model.model.gradient_checkpointing = False, or take PromptTuning, which trains with it"
            )
        if cache is None:
            cache = TrainedCache(self.keys_and_values())
        elif cache.length == 0:
            self._begin(cache, rows=len(tokens))
        positions, mask = self._after_virtual(positions, mask)
        return self.base(tokens, positions=positions, mask=mask, cache=cache)

    def prefix(self) -> Float[Tensor, "n row"]:
        """P: the parameter itself, or what the MLP makes of it, which is P' then."""
        return self.P if self.mlp is None else self.mlp(self.P)

    def keys_and_values(self) -> Float[Tensor, "layers 2 kv_heads n head_dim"]:
        """P in the order of a KV cache, without its rows."""
        config = self.base.config
        kept = self.prefix().unflatten(1, (config.n_layers, 2, config.n_kv_heads, config.head_dim))
        return kept.permute(1, 2, 3, 0, 4)

    def fold(self) -> None:
        """Put what the MLP computes in the place of P' and forget the MLP: the same outputs, and P trains directly.

        For after training: an optimizer made before holds parameters that are gone.
        """
        self.P = nn.Parameter(self.prefix().detach().clone(), requires_grad=self.P.requires_grad)
        self.mlp = None

    def adapter_tensors(self) -> dict[str, Tensor]:
        of_mlp = {} if self.mlp is None else dict(self.mlp.named_parameters(prefix="mlp"))
        return {"P": self.P, **of_mlp}

    def _begin(self, cache: KVCache, rows: int) -> None:
        """Let an empty cache begin with the prefix, the same in every row."""
        cache.max_tokens += self.n_virtual  # an empty cache has reserved nothing yet
        like = self.base.embed_tokens.weight
        for layer, (keys, values) in enumerate(self.keys_and_values().detach().to(like.device, like.dtype)):
            cache.extend(layer, keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1))
        cache.length = self.n_virtual

    @torch.no_grad()
    def _read_words(self, words: Sequence[int]) -> Float[Tensor, "n row"]:
        """What the base has in its cache after these words, as P."""
        cache = KVCache(self.base.config.n_layers, max_tokens=len(words))
        self.base(torch.tensor([words], device=self.base.embed_tokens.weight.device), cache=cache)
        kept = torch.stack([torch.stack(cache.room(layer, 0)) for layer in range(cache.n_layers)])[:, :, 0]
        return kept.permute(3, 0, 1, 2, 4).flatten(1).float()  # (n, layers · 2 · kv)


class TrainedCache(KVCache):
    """A KV cache that holds a learned prefix and nothing else: what is new is joined to it and not kept.

    Gradients flow through it, which they do not through memory that is written in place.
    """

    in_place = False

    def __init__(self, kept: Float[Tensor, "layers 2 kv_heads n head_dim"]) -> None:
        super().__init__(len(kept), max_tokens=kept.shape[3])
        self.length, self._kept = kept.shape[3], kept

    def extend(
        self,
        layer: int,
        keys: Float[Tensor, "batch kv_heads seq head_dim"],
        values: Float[Tensor, "batch kv_heads seq head_dim"],
    ) -> tuple[Float[Tensor, "batch kv_heads total head_dim"], Float[Tensor, "batch kv_heads total head_dim"]]:
        """Give the prefix's keys and values of one layer, and behind them the new ones; in every row."""
        learned_keys, learned_values = (t.expand(len(keys), -1, -1, -1) for t in self._kept[layer].to(keys.dtype))
        return torch.cat([learned_keys, keys], dim=2), torch.cat([learned_values, values], dim=2)


class PromptTuning(VirtualTokens):
    """Learned embeddings before those of the text.

        P (n, hidden)

    Trains n · hidden numbers. P begins as uniform numbers between −0.5 and 0.5 ([PromptTuning] section 3.2), or as the
    embeddings of `words`: then the new layer gives what the base gives for words and text together.

    Raises:
        TypeError: if the base is not a decoder's `Transformer`.
        ValueError: for a number of virtual tokens or words that does not fit.
    """

    def __init__(self, base: nn.Module, *, n_virtual: int, words: Sequence[int] = ()) -> None:
        super().__init__(base, n_virtual, words)
        table = self.base.embed_tokens.weight  # (vocab, hidden)
        drawn = (torch.rand(n_virtual, self.base.config.hidden_size) - 0.5).to(table.device)
        self.P = nn.Parameter(table.detach()[list(words)].float() if words else drawn)

    def forward(
        self,
        tokens: Int[Tensor, "batch seq"],
        *,
        positions: Int[Tensor, "rows seq"] | None = None,
        mask: Bool[Tensor, "batch seq total"] | None = None,
        cache: KVCache | None = None,
        shared: int = 0,
    ) -> Float[Tensor, "batch seq hidden"]:
        """Hidden state of every token of the text. The arguments are those of `Decoder.forward`."""
        n, (batch, _) = self.n_virtual, tokens.shape
        positions, mask = self._after_virtual(positions, mask)
        if cache is not None and cache.length > 0:  # it holds the virtual tokens already
            return self.base(tokens, positions=positions, mask=mask, cache=cache)
        if cache is not None:
            cache.max_tokens += n  # an empty cache has reserved nothing yet
        if positions is not None:
            own = torch.arange(n, device=positions.device).expand(len(positions), n)
            positions = torch.cat([own, positions], dim=1)
        if mask is not None:  # the virtual tokens look at themselves alone, as far as each has come
            own_mask = F.pad(causal_mask(n, 0, mask.device), (0, mask.shape[2] - n))
            mask = torch.cat([own_mask.expand(batch, -1, -1), mask], dim=1)
        text = self.base.embed_tokens(tokens)  # (batch, seq, hidden)
        x = torch.cat([self.P.to(text.dtype).expand(batch, -1, -1), text], dim=1)
        shared = shared + n if shared else 0
        return self.base.read(x, positions=positions, mask=mask, cache=cache, shared=shared)[:, n:]
