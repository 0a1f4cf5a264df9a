"""Tensors of the base that an adapter replaces whole: biases, and copies of whole modules such as the output head.

LoRA adds to what a layer returns; these stand where the base's own tensor stood:

    y = x Wᵀ + b + scaling · (x Aᵀ) Bᵀ        b is the adapter's,        or W itself, for a module that is saved whole

The module that owns the tensor keeps the one that was there, in a plain dictionary beside its state: it is neither a
parameter nor in the state, costs its bytes, stays on the device where it was, and inject.remove gives back that very
object. Merging has nothing to do with these: it folds B A into W, while they are in place all the time. A parameter
that two modules share is replaced in one of them, which unties the two. Read before this file: nothing.
"""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

KEPT = "_tensors_before_adapter"  # {attribute: the parameter or buffer that was there}


def replaced_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Find the tensors that stand in the place of the base's own, by name."""
    return {
        f"{name}.{leaf}" if name else leaf: getattr(module, leaf)
        for name, module in model.named_modules(remove_duplicate=False)
        for leaf in vars(module).get(KEPT, {})
    }


@torch.no_grad()
def replace_tensors(model: nn.Module, tensors: Mapping[str, Tensor], *, trainable: bool) -> None:
    """Put tensors in the place of a model's parameters and buffers, by name, in its dtypes and on its devices.

    What was there is kept by its owner, frozen. Where a tensor replaces one already it gets the new numbers and stays
    the same object, which an optimizer may hold: what trains goes on training. Only floats train. A bias that has two
    names (BERT's head has one) stays one where both get the same numbers.
    """
    biases: dict[int, Tensor] = {}  # what stands in the place of a bias, by that one's id
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        kept = vars(owner).setdefault(KEPT, {})
        before = getattr(owner, leaf)
        train = trainable and leaf in owner._parameters and before.is_floating_point()
        if leaf in kept:
            before.copy_(tensor)
            before.requires_grad_(before.requires_grad or train)
            continue
        kept[leaf] = before
        before.requires_grad_(False)
        new = tensor.detach().to(before.device, before.dtype, copy=True)
        if leaf in owner._parameters:
            new = nn.Parameter(new, requires_grad=train)
        if leaf == "bias":
            first = biases.setdefault(id(before), new)
            new = first if torch.equal(first, new) else new
        setattr(owner, leaf, new)


def freeze(model: nn.Module) -> None:
    """Let nothing have gradients, in place, but what replaced something and trains now."""
    training = [tensor for tensor in replaced_tensors(model).values() if tensor.requires_grad]
    model.requires_grad_(False)
    for tensor in training:
        tensor.requires_grad_(True)


def keep_for_good(model: nn.Module) -> None:
    """Let what replaced something belong to the model from now on, frozen; what was there is forgotten."""
    for tensor in replaced_tensors(model).values():
        tensor.requires_grad_(False)
    for module in model.modules():
        vars(module).pop(KEPT, None)


def give_back(model: nn.Module) -> None:
    """Put every kept tensor back: the same object, or, where the model was moved since, its copy there."""
    for module in model.modules():
        for leaf, before in vars(module).pop(KEPT, {}).items():
            now = getattr(module, leaf)
            here = before.detach().to(now.device, now.dtype)
            moved = nn.Parameter(here, requires_grad=False) if isinstance(before, nn.Parameter) else here
            setattr(module, leaf, before if here.data_ptr() == before.data_ptr() else moved)


def warn_of_untying(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Warn where one of these tensors is another module's as well: after replace_tensors they are two."""
    state = model.state_dict(keep_vars=True)
    for name in sorted(tensors):
        others = [other for other, tensor in state.items() if other != name and tensor is state.get(name)]
        if name.endswith("bias"):  # which stays one, see replace_tensors
            others = [o for o in others if o not in tensors or not (tensors[o] == tensors[name]).all()]
        if others:
            warnings.warn(
                f"{name} was one tensor with {', '.join(others)}; the adapter has its own copy of it, so they are "
                "untied now, as in PEFT: do not tie them again, and write a merged model with two tensors",
                stacklevel=3,
            )


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity; whole numbers never do."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
