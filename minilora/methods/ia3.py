"""IA³: a vector of numbers near one amplifies or inhibits each number that a layer gives, or that it reads.

    l          (out,) or (in,), trainable, float32; ones at the start              ⊙    element by element
    Q, K, V    queries, keys and values, of d numbers        W₁, W₂, γ    the feed-forward's layers, its nonlinearity

        softmax(Q (l_k ⊙ K)ᵀ / √d) (l_v ⊙ V)       attention: what the keys' and values' layers give
        (l_ff ⊙ γ(W₁ x)) W₂                        feed-forward: what its last layer reads        [IA3] section 3.3

In one linear layer, that is a scaling of the rows or of the columns of its weight:

        scales="output"    h = l ⊙ base(x) = x (diag(l) W)ᵀ + l ⊙ bias             of k_proj and v_proj
        scales="input"     h = base(l ⊙ x) = x (W diag(l))ᵀ + bias                 of down_proj

Keys are scaled before they are turned by their positions, as in PEFT; in T5, which [IA3] trains, nothing is turned. The
product with l is rounded to x's dtype, and l is not: in bfloat16, 1.003 would be 1.

Read before this file: torch_lora/layers.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minilora.torch_lora.adapted_weight import weight_to_read
from minilora.torch_lora.adapter_layer import AdapterLayer
from minilora.torch_lora.inject import InjectReport, Target, inject, match_targets
from minilora.torch_lora.layers import features_of, is_conv1d, is_linear, refuse_unfit
from minilora.torch_lora.replaced import freeze


class IA3Linear(AdapterLayer):
    """IA³ over a linear layer, one in 4 bits, or GPT-2's Conv1D.

        h = l ⊙ base(x)    or    h = base(l ⊙ x)           [IA3] section 3.3

    A new layer changes nothing, bit for bit. Merging scales the bias as well, where the output is scaled.

    Raises:
        TypeError: if the base is no linear layer.
        ValueError: if `scales` is neither "output" nor "input", or the base is an adapter layer already.

    >>> [tuple(IA3Linear(nn.Linear(24, 16), scales=which).l.shape) for which in ("output", "input")]
    [(16,), (24,)]
    """

    wraps = "a linear layer or GPT-2's Conv1D"
    no_decay = ("l",)

    def __init__(self, base: nn.Module, *, scales: str = "output"):
        super().__init__()
        refuse_unfit(base, IA3Linear)
        if scales not in ("output", "input"):
            raise ValueError(f"scales is {scales!r}: IA³ scales a layer's 'output' or its 'input'")
        self.base, self.scales, self.stores_in_by_out = base, scales, is_conv1d(base)
        in_features, out_features = features_of(base)
        device = next(iter([*base.parameters(), *base.buffers()])).device
        self.l = nn.Parameter(torch.ones(out_features if scales == "output" else in_features, device=device))
        freeze(base)  # last: whoever is refused leaves the base as it was

    def forward(self, x: Float[Tensor, "*n in"]) -> Float[Tensor, "*n out"]:
        if self.is_merged:
            return self.base(x)
        if self.scales == "input":
            return self.base((self.l * x).to(x.dtype))
        h = self.base(x)
        return (self.l * h).to(h.dtype)

    def adapt(self, W: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """Give W′: each row of W, or each column, times its number in l."""
        of_rows = (self.scales == "output") != self.stores_in_by_out
        return W * (self.l[:, None] if of_rows else self.l)

    def adapt_bias(self, bias: Float[Tensor, "out"]) -> Float[Tensor, "out"]:
        """Give l ⊙ bias where the output is scaled, else the bias as it is."""
        return self.l * bias if self.scales == "output" else bias

    @property
    def weight(self) -> Tensor:
        """W′, for models that read it instead of calling the layer: torch_lora/adapted_weight tells of them."""
        return weight_to_read(self)

    @property
    def bias(self) -> Tensor | None:
        """The bias that goes with W′, or None."""
        return self.base.bias if self.is_merged else self.merged_bias()

    @staticmethod
    def accepts(base: nn.Module) -> bool:
        return is_linear(base)

    def adapter_tensors(self) -> dict[str, Tensor]:
        return {"l": self.l}

    def describe(self) -> str:
        return f"{type(self).__name__} over its {self.scales}"

    def extra_repr(self) -> str:
        return f"scales={self.scales!r}" + (", merged" if self.is_merged else "")


def inject_ia3(model: nn.Module, *, outputs: Sequence[Target], inputs: Sequence[Target] = ()) -> InjectReport:
    """Put IA³ into a model, in place: over what some layers give, and over what others read.

        inject_ia3(model, outputs=["k_proj", "v_proj"], inputs=["down_proj"])          # as [IA3] has it

    Raises:
        ValueError: if a target hits nothing, or a layer that is wrapped already, or both kinds hit one layer; the model
            is as before.
        TypeError: if a target hits what is no linear layer.
    """
    given, read = _layers_hit(model, outputs), _layers_hit(model, inputs)
    if both := given.keys() & read.keys():
        raise ValueError(f"outputs and inputs both hit {read[both.pop()]}: IA³ has one vector a layer, choose one")

    def wrap(base: nn.Module) -> IA3Linear:
        return IA3Linear(base, scales="input" if id(base) in read else "output")

    return inject(model, [*outputs, *inputs], wrap)


def _layers_hit(model: nn.Module, targets: Sequence[Target]) -> dict[int, str]:
    """The modules that targets hit, by id, with their names; none where there are no targets."""
    hits = match_targets(model, targets) if targets else {}
    return {id(model.get_submodule(name)): name for names in hits.values() for name in names}
