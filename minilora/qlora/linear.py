"""QLoRA's layer: LoRA over a frozen linear layer whose weight is kept in 4 bits.

    x, y       (*n, in), (*n, out)
    W          exists in floats only while one product runs; then it is dropped, and made again for the backward.
               Where few rows are multiplied (text generation), it never does: fast.linear

    forward    y  = x Wᵀ + bias          with  W = dequantize(quantized)
    backward   dx = dy W                 W is frozen: there is no dW

Read before this file: torch_lora/layers, blockwise.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minilora.qlora import fast
from minilora.qlora.blockwise import NestedAbsmax, Quantized, check_complete
from minilora.qlora.codebooks import FP4, INT4, NF4, Codebook
from minilora.torch_lora.adapter_layer import AdapterLayer, refuse_codes
from minilora.torch_lora.layers import LoRALinear

DEFAULT_FORM = "nf4, block_size=64, double"
CODEBOOKS = {codebook.name: codebook for codebook in (NF4, FP4, INT4)}
FORM = re.compile(rf"({'|'.join(CODEBOOKS)}), block_size=(\d{{1,6}})(, double)?")


class NF4Linear(nn.Module):
    """A linear layer that keeps its weight in 4 bits: 4.127 bits a weight with the settings it has by default.

        y = x Wᵀ + bias,  W = codebook[code] · absmax[block]          [QLoRA] eq. 5, its first term

    Quantizes here, when it is made, and nowhere else. Everything in it is frozen; gradients flow to x.
    Units are stored as their bits (int32), so that model.bfloat16() does not round them.

    Raises:
        TypeError: if `linear` is not an nn.Linear, or has the codes of another quantizer in its weight.
        ValueError: if its weight is empty or holds a NaN or an infinity, or the block size is impossible.

    >>> layer = NF4Linear(nn.Linear(64, 32))
    >>> layer
    NF4Linear(in_features=64, out_features=32, nf4, block_size=64, 4.16 bits a weight)
    >>> layer.packed.numel()  # bytes
    1024
    """

    packed: Tensor
    absmax_bits: Tensor
    absmax_codes: Tensor | None
    offset_bits: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Module, codebook: Codebook = NF4, block_size: int = 64, *, double: bool = True):
        super().__init__()
        if not isinstance(linear, nn.Linear):
            wrapped = isinstance(linear, AdapterLayer)
            hint = "take its adapter off first" if wrapped else "only the weight of an nn.Linear is quantized"
            raise TypeError(f"NF4Linear is made from an nn.Linear; this is a {type(linear).__name__}: {hint}")
        refuse_codes(linear)
        self._hold(fast.quantize(linear.weight, codebook, block_size, double=double))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    @staticmethod
    def holding(quantized: Quantized, bias: Float[Tensor, "out"] | None = None) -> "NF4Linear":
        """Make a layer of a weight that is in 4 bits already, such as one from a file: nothing is quantized.

        Raises:
            ValueError: if parts of the weight are missing, or it is no matrix, or the bias is of another length.
        """
        check_complete(quantized)
        if len(quantized.shape) != 2 or (bias is not None and len(bias) != quantized.shape[0]):
            what = f"{quantized.shape} and a bias of {None if bias is None else len(bias)}"
            raise ValueError(f"no linear layer has a weight of shape {what}: (out, in) and out are needed")
        layer = NF4Linear.__new__(NF4Linear)
        nn.Module.__init__(layer)
        layer._hold(quantized)
        layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    def _hold(self, quantized: Quantized) -> None:
        self.out_features, self.in_features = quantized.shape
        self.codebook, self.block_size = quantized.codebook, quantized.block_size
        absmax = quantized.absmax
        nested = absmax if isinstance(absmax, NestedAbsmax) else None
        units = absmax.absmax if isinstance(absmax, NestedAbsmax) else absmax
        self.register_buffer("packed", quantized.packed)
        self.register_buffer("absmax_bits", units.view(torch.int32))
        self.register_buffer("absmax_codes", nested.codes if nested else None)
        self.register_buffer("offset_bits", nested.offset.view(torch.int32) if nested else None)
        self._made: tuple[list[int], Quantized] | None = None  # where its buffers lay, and `quantized`

    @property
    def quantized(self) -> Quantized:
        """The weight as it is stored; no copy is made."""
        stored = [self.packed, *(buffer for buffer in self._buffers.values() if buffer is not None)]
        here = [*map(id, stored), *map(Tensor.data_ptr, stored)]  # others than last time after .to(), say
        if self._made is None or self._made[0] != here:
            self._made = here, self._as_stored()
        return self._made[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_made": None}  # a copy makes its own, of its own buffers

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NF4Linear":
        self._made = None  # or it would keep what .to() and .cuda() replace
        return super()._apply(fn, recurse)

    def _as_stored(self) -> Quantized:
        units = self.absmax_bits.view(torch.float32)
        absmax: Tensor | NestedAbsmax = units
        if self.absmax_codes is not None and self.offset_bits is not None:
            absmax = NestedAbsmax(self.absmax_codes, units, self.offset_bits.view(torch.float32))
        shape = (self.out_features, self.in_features)
        return Quantized(self.packed, absmax, self.codebook, self.block_size, shape)

    @property
    def stored_as(self) -> str:
        """How the weight is kept, in words that kept_as understands: "nf4, block_size=64, double"."""
        double = ", double" if self.absmax_codes is not None else ""
        return f"{self.codebook.name}, block_size={self.block_size}{double}"

    def get_extra_state(self) -> Tensor:
        """What the bytes mean, to lie beside them in a state dict: "nf4, block_size=64, 32 × 64", as bytes itself."""
        text = f"{self.codebook.name}, block_size={self.block_size}, {self.out_features} × {self.in_features}"
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """
        Raises:
            ValueError: if bytes that come with this state are of another codebook, block size or shape.
        """
        theirs, ours = (bytes(text.tolist()).decode(errors="replace") for text in (state, self.get_extra_state()))
        if theirs != ours:
            raise ValueError(f"these bytes are of {theirs}; this layer reads {ours}: make it with the same settings")

    def dense_weight(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """Give the weight as floats: a new tensor, which nothing here holds on to."""
        return fast.dequantize(self.quantized, dtype)

    def forward(self, x: Float[Tensor, "*n in"]) -> Float[Tensor, "*n out"]:
        if torch.is_grad_enabled() and x.requires_grad:
            return _FrozenProduct.apply(x, self)
        return fast.linear(x, self.quantized, self._bias_for(x))

    @staticmethod
    def several(x: Float[Tensor, "*n in"], layers: "Sequence[NF4Linear]") -> list[Float[Tensor, "*n _"]]:
        """Give what each of these layers makes of x."""
        if torch.is_grad_enabled() and x.requires_grad:
            return [layer.forward(x) for layer in layers]
        return fast.linears(x, [(layer.quantized, layer._bias_for(x)) for layer in layers])

    def _bias_for(self, x: Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias.detach().to(x.dtype)

    def extra_repr(self) -> str:
        bits = self.quantized.bits_per_weight
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {self.codebook.name}, "
            f"block_size={self.block_size}, {bits:.2f} bits a weight"
        )


class _FrozenProduct(torch.autograd.Function):
    """x Wᵀ + bias for a W that is made when needed: autograd keeps the 4-bit layer, not the floats."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        return fast.linear(x, layer.quantized, layer._bias_for(x))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return fast.linear_backward(dy, ctx.layer.quantized), None


def kept_as(form: str | None) -> Callable[[nn.Module], nn.Module]:
    """The function that keeps a linear layer in the form that NF4Linear.stored_as names; others stay, for None all do.

    >>> kept_as("fp4, block_size=32")(nn.Linear(64, 64)).stored_as
    'fp4, block_size=32'

    Raises:
        ValueError: if these are other words.
    """
    if form is None:
        return lambda base: base
    found = FORM.fullmatch(form)
    if found is None:
        raise ValueError(f"no base can be kept as {form[:60]!r}: known is what looks like {DEFAULT_FORM!r}")
    codebook, block_size, double = CODEBOOKS[found[1]], int(found[2]), found[3] is not None

    def keep(base: nn.Module) -> nn.Module:
        return NF4Linear(base, codebook, block_size, double=double) if isinstance(base, nn.Linear) else base

    return keep


def QLoRALinear(
    base: nn.Module,
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    use_rslora: bool = False,
    codebook: Codebook = NF4,
    block_size: int = 64,
    double: bool = True,
    generator: torch.Generator | None = None,
) -> LoRALinear:
    """Wrap a linear layer in LoRA over 4 bits: a LoRALinear over an NF4Linear. There is nothing else to QLoRA's layer.

        y = x dequantize(quantized)ᵀ + scaling · (x Aᵀ) Bᵀ            [QLoRA] eq. 5

    A base that is an NF4Linear already is kept as it is.

    Raises:
        ValueError, TypeError: as LoRALinear and NF4Linear.
    """
    if not isinstance(base, NF4Linear | AdapterLayer):
        base = NF4Linear(base, codebook, block_size, double=double)
    return LoRALinear(base, r=r, alpha=alpha, dropout=dropout, use_rslora=use_rslora, generator=generator)
