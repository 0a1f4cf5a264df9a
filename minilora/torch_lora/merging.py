"""Fold an adapter into its model for good, and tell how much of it arrives.

    W, ΔW      the base's weight as it is stored, and the adapter's update of it
    W′         what is stored afterwards: W + ΔW, summed in float64, rounded to the dtype asked for
    error      ‖W′ − (W + ΔW)‖ / ‖ΔW‖, Frobenius norms: 0 = nothing is lost

Rounding grows with W, and an update is small beside W: so the error is measured in units of the adapter's effect, not
of the weight. Where it is below ½, W′ is nearer to the adapted weight than to the base's, because

    ‖W′ − W‖ ≥ ‖ΔW‖ − ‖W′ − (W + ΔW)‖ = (1 − error) · ‖ΔW‖ > ½ ‖ΔW‖ > ‖W′ − (W + ΔW)‖

From ½ on that is not sure any more, and at 1 the merge has brought the weight no nearer to what was trained: rounding
has erased the adapter. Hence the warning from ERASED on. (The norm weighs all inputs alike. On the adapter's own inputs
less of the rounding is met: lesson 09.)

Layers are folded one after the other, and only one at a time has a second copy. Read before this file: layers, inject.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minilora.torch_lora.adapter_layer import FLOATS, AdapterLayer, StoresNoFloats, dense_weight
from minilora.torch_lora.arithmetic import Distance, overall
from minilora.torch_lora.inject import adapter_layers
from minilora.torch_lora.replaced import keep_for_good

ERASED = 0.5  # an error, in units of the adapter's effect: see above
CHUNK = 1 << 20  # numbers that are summed in float64 at once
Store = Callable[[nn.Linear, nn.Module], nn.Module]  # (merged layer, base) -> what is kept instead


@dataclass(frozen=True)
class LayerMerge:
    """One layer: how far W′ is from W + ΔW beside ‖ΔW‖, and how many weights differ from W stored in the same way."""

    off: Distance
    changed: int
    weights: int

    @property
    def is_erased(self) -> bool:
        """Whether rounding took half of the effect or more; an update of zeros has nothing to lose."""
        return self.off.norm > 0 and self.off.relative >= ERASED


@dataclass(frozen=True)
class MergeReport:
    """What arrived of an adapter, layer by layer; prints as a table."""

    stored_as: str
    layers: dict[str, LayerMerge]

    @property
    def off(self) -> Distance:
        """Of all layers as one matrix."""
        return overall([layer.off for layer in self.layers.values()])

    @property
    def changed_share(self) -> float:
        """Weights that the adapter changed, of those in the layers it touches, 0 to 1."""
        return sum(y.changed for y in self.layers.values()) / sum(y.weights for y in self.layers.values())

    def __str__(self) -> str:
        title = f"merged into {self.stored_as}"
        width = max(map(len, [*self.layers, title]))
        lines = [f"{title:<{width}}      ‖ΔW‖  error / ‖ΔW‖  weights changed"]
        for name, y in self.layers.items():
            lines.append(_row(name, width, y.off, y.changed / y.weights) + ("  erased" if y.is_erased else ""))
        return "\n".join([*lines, _row("all layers", width, self.off, self.changed_share)])


def merge_model(model: nn.Module, dtype: torch.dtype | None = None) -> MergeReport:
    """Replace every adapter layer by its base with the update in the weight, in place, and measure what arrived.

        W′ = round(W + ΔW)

    With a dtype all parameters of 16 bits or more are in it afterwards; without one each layer keeps its base's, and a
    base that stores no floats becomes an nn.Linear of float32. A layer in two places stays one. A weight that two
    modules share (an embedding and its head) is shared no more where one of them had an adapter.

    Warns:
        UserWarning: if the rounding of any layer is half of its update, or more.

    Raises:
        ValueError: if the model has no adapter, the dtype has no floats, or a parameter would not be finite in it,
            also one that no adapter touches (all of them at once); the model is as before.
    """
    stored_as = "each base's dtype" if dtype is None else str(dtype).removeprefix("torch.")
    report = MergeReport(stored_as, fold_layers(model, dtype))
    keep_for_good(model)
    if dtype is not None:
        for parameter in model.parameters():
            if parameter.dtype in FLOATS:
                parameter.data = parameter.data.to(dtype)
    warn_if_erased(report)
    return report


def fold_layers(model: nn.Module, dtype: torch.dtype | None, store: Store | None = None) -> dict[str, LayerMerge]:
    """Replace the adapter layers as merge_model does, and nothing else, and warn of nothing.

    `store` makes, of the merged nn.Linear and the base, what is kept instead: qlora/merging has one for 4 bits.

    Raises:
        ValueError: as merge_model.
    """
    layers = adapter_layers(model)
    _refuse_unmergeable(model, layers, dtype)
    merges = {}
    for name, layer in layers.items():
        folded, merges[name] = _fold(layer, dtype, store)
        for place, module in list(model.named_modules(remove_duplicate=False)):
            if module is layer:
                model.set_submodule(place, folded)
    return merges


def merged_state(model: nn.Module, dtype: torch.dtype, report: MergeReport) -> Iterator[tuple[str, Tensor]]:
    """Give the merged model's parameters one after the other, by the names they have without adapters.

    The model is left as it is, and no more than one merged weight exists at a time: so a model that fills the memory
    can be written to a disk. Of a shared parameter only the first name comes. The report is filled on the way; whoever
    reads all calls warn_if_erased.

    Raises:
        ValueError: as merge_model, before the first parameter.
    """
    _refuse_unmergeable(model, adapter_layers(model), dtype)
    seen: set[int] = set()
    for name, module, others in _modules_and_their_own(model):
        if isinstance(module, AdapterLayer):
            weight, report.layers[name] = merged_weight(module, dtype)
            yield f"{name}.weight", weight
            del weight  # before the next one is made
        elif isinstance(module, StoresNoFloats):
            yield f"{name}.weight", dense_weight(module, dtype)
        for parameter_name, parameter in others.items():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                leaf = parameter_name.rpartition(".")[2]
                bias = module.merged_bias(dtype) if leaf == "bias" and isinstance(module, AdapterLayer) else None
                tensor = parameter if bias is None else bias
                yield parameter_name, tensor.detach().to(dtype if tensor.dtype in FLOATS else tensor.dtype)


def warn_if_erased(report: MergeReport) -> None:
    """Warn, once, where rounding took half of a layer's update or more."""
    erased = {name: y for name, y in report.layers.items() if y.is_erased}
    if erased:
        worst = max(erased, key=lambda name: erased[name].off.relative)
        warnings.warn(
            f"merging into {report.stored_as} erases the adapter in {len(erased)} of {len(report.layers)} layers: "
            f"the rounding is {erased[worst].off.relative:.2f} of the update in {worst}, "
            f"{report.off.relative:.2f} over all layers (at 1 the weights are as far from the adapted ones as without "
            "an adapter); merge into float32, or keep the adapter beside the base",
            stacklevel=3,
        )


def measure(
    W: Float[Tensor, "rows columns"], delta: Float[Tensor, "rows columns"], made: Float[Tensor, "rows columns"]
) -> LayerMerge:
    """Compare what is stored with W + ΔW, in float64."""
    error = effect = 0.0
    changed = 0
    for rows, wanted in _sums(W, delta):
        error += (made[rows].double() - wanted).square().sum().item()
        effect += delta[rows].double().square().sum().item()
        changed += int((made[rows] != W[rows].to(made.dtype)).sum())
    return LayerMerge(Distance(error**0.5, effect**0.5), changed, W.numel())


def _fold(layer: AdapterLayer, dtype: torch.dtype | None, store: Store | None) -> tuple[nn.Module, LayerMerge]:
    base = layer.base
    weight, report = merged_weight(layer, dtype)
    if isinstance(base, StoresNoFloats) or store is not None:
        bias = layer.merged_bias(dtype)
        linear = nn.Linear(base.in_features, base.out_features, bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
        if store is None:
            return linear, report
        kept = store(linear, base)
        return kept, measure(own_weight(layer), layer.delta_weight().detach(), dense_weight(kept, torch.float32))
    base.weight = nn.Parameter(weight, requires_grad=False)
    bias = layer.merged_bias(dtype)
    if bias is not None and bias is not base.bias:
        base.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return base, report


def merged_weight(layer: AdapterLayer, dtype: torch.dtype | None) -> tuple[Tensor, LayerMerge]:
    """Give W + ΔW rounded once, in the dtype or in the base's own, and what the rounding took; the layer stays."""
    W, delta = own_weight(layer), layer.delta_weight().detach()
    made = torch.empty_like(W, dtype=dtype or W.dtype)
    for rows, wanted in _sums(W, delta):
        made[rows] = wanted.to(made.dtype)
    return made, measure(W, delta, made)


def own_weight(layer: AdapterLayer) -> Tensor:
    """The weight of the base without the update: as it is stored, or in float32 where it is stored in no floats."""
    if layer.unmerged_weight is not None:
        return layer.unmerged_weight.detach().to(layer.base.weight.device)
    return dense_weight(
        layer.base, torch.float32 if isinstance(layer.base, StoresNoFloats) else layer.base.weight.dtype
    )


def _sums(W: Tensor, delta: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """W + ΔW in float64, some rows at a time."""
    step = max(1, CHUNK // W.shape[1])
    for start in range(0, W.shape[0], step):
        rows = slice(start, start + step)
        yield rows, W[rows].double() + delta[rows].double()


def _modules_and_their_own(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, Tensor]]]:
    """Every module but those inside adapter layers, with the parameters that no adapter changes, by full names."""
    inside = tuple(f"{name}." for name in adapter_layers(model))
    for name, module in model.named_modules():
        if not name.startswith(inside):
            is_adapted = isinstance(module, AdapterLayer)
            own: Any = module.base if is_adapted else module
            named = own.named_parameters(prefix=name, recurse=False)
            yield name, module, {full: p for full, p in named if not (is_adapted and full == f"{name}.weight")}


def _refuse_unmergeable(model: nn.Module, layers: dict[str, AdapterLayer], dtype: torch.dtype | None) -> None:
    if not layers:
        raise ValueError("this model has no adapter to merge: load_adapter(model, folder) gives it one")
    if "" in layers:
        raise ValueError("this is an adapter layer alone, which nothing holds: give the model that it is in")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"cannot merge into {dtype}: choose a floating-point dtype such as torch.bfloat16")
    broken = []
    for name, layer in layers.items():
        W, delta = own_weight(layer), layer.delta_weight().detach()
        layer.merged_bias(dtype)  # which raises
        if not all(wanted.to(dtype or W.dtype).isfinite().all() for _, wanted in _sums(W, delta)):
            broken.append(f"{name}: weight plus update is not finite as {dtype or W.dtype}")
    broken += [] if dtype is None else _not_finite_beside(model, dtype)
    if broken:
        raise ValueError("this adapter cannot be merged:\n  " + "\n  ".join(broken))


def _not_finite_beside(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """What no adapter changes, and is not finite in the dtype: outliers of bfloat16 leave float16's range."""
    broken = []
    for name, module, others in _modules_and_their_own(model):
        if isinstance(module, StoresNoFloats):
            others = {f"{name}.weight": dense_weight(module, dtype)} | others
        for parameter_name, parameter in others.items():
            pieces = parameter.detach().reshape(-1).split(CHUNK)
            if not all(piece.to(dtype).isfinite().all() for piece in pieces if piece.dtype in FLOATS):
                broken.append(f"{parameter_name}: not finite as {dtype}")
    return broken


def _row(name: str, width: int, off: Distance, share: float) -> str:
    return f"{name:<{width}} {off.norm:>9.3e} {off.relative:>13.2e} {100 * share:>14.2f} %"
