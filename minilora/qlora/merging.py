"""Fold an adapter into weights of 4 bits again: only when asked for, because it takes most adapters away.

Rounding to NF4 moves a weight by about a tenth of its size; a trained update is a few hundredths of it. Read before
this file: torch_lora/merging, linear.
"""

import torch
from torch import nn

from minilora.qlora.linear import NF4Linear
from minilora.torch_lora.inject import adapter_layers
from minilora.torch_lora.merging import MergeReport, fold_layers, warn_if_erased


def merge_into_4_bits(model: nn.Module, *, allow_requantize: bool = False) -> MergeReport:
    """Replace every adapter layer by an NF4Linear of the merged weight, in place, and measure what arrived.

        W′ = dequantize(quantize(W + ΔW))

    Codebook and block size are those of the base, where it is in 4 bits already. Everything else is as in merge_model,
    warning included.

    Raises:
        ValueError: unless allow_requantize; if a layer is no linear layer; else as merge_model; the model is as before.
    """
    if not allow_requantize:
        raise ValueError(
            "rounding merged weights to 4 bits is a larger change than most adapters make: merge_model(model, "
            "torch.bfloat16) keeps 16 bits; allow_requantize=True does it all the same, and reports what is lost"
        )
    odd = {name: y.base for name, y in adapter_layers(model).items() if not isinstance(y.base, nn.Linear | NF4Linear)}
    if odd:
        kinds = [f"{name} ({type(base).__name__})" for name, base in odd.items()]
        raise ValueError(f"only an nn.Linear has a form in 4 bits; these adapted layers are none: {', '.join(kinds)}")
    report = MergeReport("4 bits", fold_layers(model, torch.float32, _as_before))
    warn_if_erased(report)
    return report


def _as_before(linear: nn.Linear, base: nn.Module) -> nn.Module:
    """Quantize a merged layer as its base is, or by default where that is not in 4 bits."""
    if not isinstance(base, NF4Linear):
        return NF4Linear(linear)
    is_double = base.absmax_codes is not None
    return NF4Linear(linear, base.codebook, base.block_size, double=is_double)
