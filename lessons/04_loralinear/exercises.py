"""Lesson 04: the module, what may train, and a test of gradients, with the mistakes that learners make in each.

The inputs are generic on purpose: in ≠ out, r ≠ alpha, a base with a bias, and A and B away from their start. What a
module *is* (which tensors it registers, what trains, where dropout acts) is put into words, which are compared.
"""

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from minilora.classroom.exercises import Bug, Case, Exercise, Property, is_stub
from minilora.numpy_lora.forward import lora_forward
from minilora.torch_lora.inject import count_parameters
from minilora.torch_lora.layers import LoRALinear

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class SimpleAttention(nn.Module):
    """One head of attention with four square projections, none with a bias: the smallest network of this lesson."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        for name in PROJECTIONS:
            setattr(self, name, nn.Linear(dim, dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        seen = F.scaled_dot_product_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x))
        return self.o_proj(seen)


def adapt(model: nn.Module, names: tuple[str, ...], wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Put `wrap` of it in the place of each named child, and give the model back; `inject` finds them by name."""
    for name in names:
        setattr(model, name, wrap(getattr(model, name)))
    return model


def imitation(rng: np.random.Generator, dim: int, steps: int) -> tuple[SimpleAttention, dict[str, Tensor], list]:
    """A block, updates of rank 3 planted in q_proj and v_proj of a copy, and batches (x, what the copy makes of x)."""
    block = SimpleAttention(dim)
    for name in PROJECTIONS:
        setattr(block, name, linear_of(tensor(rng, dim, dim) / math.sqrt(dim)))
    planted = {}
    for name in ("q_proj", "v_proj"):
        left, right = (np.linalg.qr(rng.normal(size=(dim, 3)))[0] for _ in range(2))
        planted[name] = torch.from_numpy(left * [3.0, 2.0, 1.0] @ right.T).float()
    teacher = moved(block, planted)
    with torch.no_grad():
        return block, planted, [(x, teacher(x)) for x in (tensor(rng, 8, 12, dim) for _ in range(steps))]


def moved(block: SimpleAttention, updates: dict[str, Tensor]) -> SimpleAttention:
    """A copy of the block with these updates added to its weights."""
    copied = copy.deepcopy(block)
    with torch.no_grad():
        for name, update in updates.items():
            getattr(copied, name).weight += update
    return copied


def kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass when `layer` is called on x, its parameters aside."""
    own = {each.untyped_storage().data_ptr() for each in layer.parameters()}
    kept: dict[int, int] = {}

    def note(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        output = layer(x)
    assert output.shape[:-1] == x.shape[:-1]  # the output, and with it all that was kept, is alive until here
    return sum(kept.values())


def tensor(rng: np.random.Generator, *shape: int) -> Tensor:
    """Normal numbers in float32."""
    return torch.from_numpy(rng.normal(size=shape)).float()


# -------------------------------------------------------------------------------------------------------- 04.1 module


def layer_inputs(rng: np.random.Generator) -> Case:
    """A 12 → 7 layer with a bias, five rows for it, a rank-3 adapter that has learned something, and a gradient."""
    return {
        "W": tensor(rng, 7, 12),
        "b": tensor(rng, 7),
        "x": tensor(rng, 5, 12),
        "A": tensor(rng, 3, 12),
        "B": tensor(rng, 7, 3),
        "alpha": 8.0,
        "dy": tensor(rng, 5, 7),
    }


def put(layer: Any, A: Tensor, B: Tensor) -> nn.Module:
    """Write numbers into a layer's A and B, also where it stores them the other way round."""
    with torch.no_grad():
        for name, numbers in {"A": A, "B": B}.items():
            own = getattr(layer, name)
            own.copy_(numbers if own.shape == numbers.shape else numbers.T)
    return layer


def linear_of(W: Tensor, b: Tensor | None = None) -> nn.Linear:
    """A linear layer of these numbers, which are copied. Its parameters would train: freezing is the wrapper's task."""
    linear = nn.Linear(W.shape[1], W.shape[0], bias=b is not None)
    linear.weight = nn.Parameter(W.clone())
    if b is not None:
        linear.bias = nn.Parameter(b.clone())
    return linear


def built(layer_class: Callable, case: Case, **settings: Any) -> Any:
    """A layer of the class over the case's W and b."""
    return layer_class(linear_of(case["W"], case["b"]), r=len(case["A"]), alpha=case["alpha"], **settings)


def portrait(layer_class: Callable, case: Case) -> dict[str, Any]:
    """All about a layer class that is compared: what it computes and, in words, what it is."""
    written = [vars(layer_class)[name] for name in ("__init__", "forward") if name in vars(layer_class)]
    if written and all(is_stub(method) for method in written):
        raise NotImplementedError
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = built(layer_class, case).eval()
        words = {
            "shapes": ", ".join(f"{name} {tuple(getattr(layer, name).shape)}" for name in "AB"),
            "trains": names_of(name for name, p in layer.named_parameters() if p.requires_grad),
            "saved beside the base": names_of(name for name in layer.state_dict() if not name.startswith("base.")),
            "at the start": start_of(layer_class),
        }
        numbers = numbers_of(put(layer, case["A"], case["B"]), case)
        return {**words, **numbers, "dropout": where_dropout_acts(layer_class) if numbers["h"] is not None else None}


def names_of(names: Any) -> str:
    """Names in a fixed order, as words."""
    return ", ".join(sorted(names)) or "nothing"


def numbers_of(layer: Any, case: Case) -> dict[str, Any]:
    """The output, the update, and the gradients that autograd finds for a given dy; in words, which of them exist."""
    x = case["x"].clone().requires_grad_()
    h = layer(x)
    if not isinstance(h, Tensor):  # a forgotten return
        return dict.fromkeys(("h", "delta_weight", "gradients reach", "dx", "dA", "dB"))
    inputs = {"x": x, "A": layer.A, "B": layer.B}
    found = {
        name: torch.autograd.grad(h, each, case["dy"], allow_unused=True, retain_graph=True)[0]
        for name, each in inputs.items()
        if each.requires_grad and h.requires_grad
    }
    reached = [name for name, gradient in found.items() if gradient is not None]
    gradients = {f"d{name}": found[name] if name in reached else torch.zeros_like(inputs[name]) for name in inputs}
    return {
        "h": h,
        "delta_weight": layer.delta_weight(),
        "gradients reach": ", ".join(reached) or "nothing",
        **gradients,
    }


def start_of(layer_class: Callable) -> str:
    """How A and B begin, in words: seen on a layer so large that its extremes tell."""
    layer = layer_class(nn.Linear(400, 8), r=25, alpha=10.0)
    A, B = layer.A.detach(), layer.B.detach()
    largest = float(A.abs().max())
    bounds = {"1/√in": 1 / math.sqrt(400), "1/√r": 1 / math.sqrt(25)}
    near = [name for name, bound in bounds.items() if 0.99 * bound < largest <= bound * 1.0001]
    drawn = "zero" if largest == 0 else f"within ±{near[0]}" if near else f"of spread {float(A.std()):.1g}"
    return f"A {drawn}, B {'random' if B.any() else 'zero'}"


def where_dropout_acts(layer_class: Callable) -> str:
    """Where a layer drops, in words: read off its output, with factors that can be undone.

    The columns of A, B and W are orthogonal, in = 6 < r = 7 < out = 8 and alpha / r = 1, so u = rest B and x = u A.
    """
    A, B, W = (torch.linalg.qr(torch.randn(shape))[0] for shape in ((7, 6), (8, 7), (8, 6)))
    layer = put(layer_class(linear_of(3 * W), r=7, alpha=7.0, dropout=0.5), A, B)
    x = 1 + torch.rand(64, 6)
    with torch.no_grad():
        layer.eval()
        if not torch.equal(layer(x), layer(x)):
            return "in evaluation too"
        out = layer.train()(x)
    highway, bypass = x @ (3 * W).T, x @ A.T @ B.T
    rest = out - highway
    places = {
        "nowhere": torch.allclose(rest, bypass, atol=1e-4),
        "on the bypass's input, in training only": is_dropped(rest @ B @ A, x),
        "inside the bypass": is_dropped(rest @ B, x @ A.T),
        "on the bypass's output": is_dropped(rest, bypass),
        "on the layer's output": is_dropped(out, highway + bypass),
        "on the input of base and bypass": is_dropped(out @ torch.linalg.pinv(3 * W + B @ A).T, x),
    }
    return next((place for place, is_here in places.items() if is_here), "somewhere else")


def is_dropped(seen: Tensor, whole: Tensor) -> bool:
    """Whether every entry is 0 or twice that of `whole`, and both occur: dropout with p = ½."""
    gone, doubled = seen.abs() < 1e-4, (seen - 2 * whole).abs() < 1e-4
    return bool((gone | doubled).all() and gone.any() and doubled.any())


def agrees_with_numpy(layer_class: Callable, case: Case) -> str | None:
    """The output, less the bias, is that of lesson 03's lora_forward in float64, to 10⁻⁶ of the largest entry."""
    layer = put(built(layer_class, case).eval(), case["A"], case["B"])
    x, W, A, B = (case[name].double().numpy() for name in ("x", "W", "A", "B"))
    want = lora_forward(x, W, A, B, case["alpha"])
    got = (layer(case["x"]) - case["b"]).detach().double().numpy()
    away = float(np.max(np.abs(got - want)) / np.max(np.abs(want)))
    return None if away < 1e-6 else f"the output is {away:.1g} of its largest entry away from lesson 03's"


def changes_nothing_at_first(layer_class: Callable, case: Case) -> str | None:
    """A new layer's output is its base's, bit for bit."""
    want = linear_of(case["W"], case["b"])(case["x"])
    away = (built(layer_class, case)(case["x"]) - want).abs().max()
    return None if away == 0 else f"the output of a new layer is up to {away:.3g} away from its base's"


class Doubled(nn.Linear):
    """A layer that computes something of its own, as a 4-bit layer will."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def calls_its_base(layer_class: Callable, case: Case) -> str | None:
    """Whatever the base computes is what the bypass is added to."""
    base = Doubled(12, 7)
    layer = layer_class(base, r=3, alpha=8.0)
    if torch.allclose(layer(case["x"]), base(case["x"])):
        return None
    return "over a base that computes something else than x Wᵀ + b, the output was not built on what the base returns"


class NewShapes(TorchDispatchMode):
    """While it is entered, keeps the operation and shape of every tensor that gets memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        known = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in known:
            self.made.append((operation.overloadpacket.__name__, tuple(result.shape)))
        return result


def never_forms_the_product(layer_class: Callable, case: Case) -> str | None:
    """No tensor with the shape of W is made in the forward pass."""
    layer = put(built(layer_class, case), case["A"], case["B"])
    with NewShapes() as log:
        layer(case["x"])
    for operation, shape in log.made:
        if sorted(shape) == sorted(case["W"].shape):
            return f"{operation} made a tensor as large as W, {tuple(case['W'].shape)}"
    return None


class RightLayer(nn.Module):
    """A right LoRALinear in parts, so that each mistake below is one part done wrong."""

    def __init__(self, base: nn.Module, *, r: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base, self.r, self.alpha, self.p = base, r, alpha, dropout
        self.freeze()
        self.hold(*self.start(r, base.in_features, base.out_features))

    def freeze(self) -> None:
        self.base.requires_grad_(False)

    def start(self, r: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
        return kaiming(r, in_features), torch.zeros(out_features, r)

    def hold(self, A: Tensor, B: Tensor) -> None:
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    @property
    def scaling(self) -> float:
        return self.alpha / self.r

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)

    def bypass(self, x: Tensor) -> Tensor:
        return self.scaling * (x @ self.A.T) @ self.B.T

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.bypass(self.drop(x))

    def delta_weight(self) -> Tensor:
        return self.scaling * self.B @ self.A


def kaiming(rows: int, columns: int) -> Tensor:
    """The two lines by which nearly all code draws A."""
    A = torch.empty(rows, columns)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    return A


class NoScaling(RightLayer):
    scaling = 1.0


class ForgottenBias(RightLayer):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.base.weight.T + self.bypass(self.drop(x))


class BothZero(RightLayer):
    def start(self, r: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(r, in_features), torch.zeros(out_features, r)


class BothRandom(RightLayer):
    def start(self, r: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
        return kaiming(r, in_features), kaiming(out_features, r)


class ZerosInA(RightLayer):
    def start(self, r: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(r, in_features), kaiming(out_features, r)


class LoudA(RightLayer):
    def start(self, r: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
        return torch.randn(r, in_features), torch.zeros(out_features, r)


class TransposedA(RightLayer):
    def start(self, r: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
        return kaiming(in_features, r), torch.zeros(out_features, r)

    def bypass(self, x: Tensor) -> Tensor:
        return self.scaling * (x @ self.A) @ self.B.T

    def delta_weight(self) -> Tensor:
        return self.scaling * self.B @ self.A.T


class NotFrozen(RightLayer):
    def freeze(self) -> None:
        pass


class PlainTensors(RightLayer):
    def hold(self, A: Tensor, B: Tensor) -> None:
        self.A, self.B = A.requires_grad_(), B.requires_grad_()


class NoGradient(RightLayer):
    def bypass(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().bypass(x)


class ThroughData(RightLayer):
    def bypass(self, x: Tensor) -> Tensor:
        return self.scaling * (x @ self.A.data.T) @ self.B.data.T


class ForgottenDropout(RightLayer):
    def drop(self, x: Tensor) -> Tensor:
        return x


class UnscaledUpdate(RightLayer):
    def delta_weight(self) -> Tensor:
        return self.B @ self.A


class FormsTheProduct(RightLayer):
    def bypass(self, x: Tensor) -> Tensor:
        return x @ self.delta_weight().T


class DropsTheOutput(RightLayer):
    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.base(x) + self.bypass(x))


class DropsForBoth(RightLayer):
    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(x)
        return self.base(x) + self.bypass(x)


class DropsTheBypass(RightLayer):
    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.drop(self.bypass(x))


class DropsAlways(RightLayer):
    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p)


MODULE = Exercise(
    id="04.1",
    title="LoRALinear",
    asks="class LoRALinear(base, *, r, alpha, dropout=0.0) with parameters A, B; forward(x) and delta_weight()",
    points=4,
    minutes=15,
    difficulty=2,
    importance=3,
    reference=LoRALinear,
    generate=layer_inputs,
    observe=portrait,
    tolerance=1e-6,
    properties=(
        Property(name="it agrees with lesson 03's lora_forward to 1e-6", test=agrees_with_numpy),
        Property(name="a new layer changes nothing, bit for bit", test=changes_nothing_at_first),
        Property(name="it calls its base, whatever the base computes", test=calls_its_base),
        Property(name="it never makes a matrix as large as W", test=never_forms_the_product),
    ),
    hints=(
        "Begin __init__ with super().__init__(), keep the given layer as self.base, and freeze it: "
        "requires_grad_(False).",
        "A and B are nn.Parameter of shapes (r, in) and (out, r). in and out are base.in_features and "
        "base.out_features.",
        "B = zeros. A = empty, then nn.init.kaiming_uniform_(A, a=math.sqrt(5)). Do not forget alpha / r.",
        "forward: self.base(x) plus the bypass, whose input is F.dropout(x, p, self.training): the third argument "
        "matters.",
    ),
    bugs=(
        Bug(
            name="no scaling",
            function=NoScaling,
            why="You left out alpha / r: alpha has no effect, and tools that apply it will run your file too loud or "
            "soft.",
            link="5 · Derivation",
        ),
        Bug(
            name="bias lost",
            function=ForgottenBias,
            why="You multiplied with base.weight and lost the bias. Call self.base(x): then a 4-bit base works as "
            "well.",
        ),
        Bug(
            name="both zero",
            function=BothZero,
            why="A and B both start at zero, so both gradients are exactly zero and nothing is ever learned.",
            link="8 · Break it",
        ),
        Bug(
            name="both random",
            function=BothRandom,
            why="B must start at zero. With both random, the new layer disturbs what the base has learned.",
        ),
        Bug(
            name="the zeros in A",
            function=ZerosInA,
            why="It trains, but everyone else keeps the zeros in B, and draws A by its inputs: exchange the two.",
        ),
        Bug(
            name="A from randn",
            function=LoudA,
            why="randn knows nothing of how long a row of A is; kaiming_uniform_ draws within ±1/√in, so that x Aᵀ "
            "stays as large as x.",
            link="5 · Derivation",
        ),
        Bug(
            name="A stored as (in, r)",
            function=TransposedA,
            why="kaiming_uniform_ takes the second axis for the fan-in: on (in, r) it draws within ±1/√r, not ±1/√in.",
            link="8 · Break it",
        ),
        Bug(
            name="base not frozen",
            function=NotFrozen,
            why="The base's weight still has requires_grad: you are fine-tuning it whole, with an adapter beside it.",
        ),
        Bug(
            name="plain tensors",
            function=PlainTensors,
            why="A and B are tensors, not nn.Parameter: no optimizer finds them, no file holds them, .to() leaves "
            "them behind.",
            link="8 · Break it",
        ),
        Bug(
            name="under no_grad",
            function=NoGradient,
            why="The bypass runs under torch.no_grad, so no gradient reaches A and B. Freezing is not done with "
            "no_grad.",
            link="8 · Break it",
        ),
        Bug(
            name="through .data",
            function=ThroughData,
            why="You read A and B through .data, which autograd does not see: they never get a gradient.",
        ),
        Bug(
            name="B A formed first",
            function=FormsTheProduct,
            why="The numbers are right, but B @ A is as large as W: use (x @ A.T) @ B.T.",
            link="lesson 03",
        ),
        Bug(
            name="delta_weight without scaling",
            function=UnscaledUpdate,
            why="delta_weight() gave B A; what forward adds is (alpha / r) · B A, and a merge must add the same.",
            link="5 · Derivation",
        ),
        Bug(
            name="dropout forgotten",
            function=ForgottenDropout,
            why="dropout= is taken and never used: the bypass's input is F.dropout(x, p, self.training).",
        ),
        Bug(
            name="dropout on the layer's output",
            function=DropsTheOutput,
            why="You drop from the sum, and with it what the frozen layer knows. Drop the bypass's input only.",
            link="8 · Break it",
        ),
        Bug(
            name="dropout before the base",
            function=DropsForBoth,
            why="The frozen layer sees the dropped x as well. It was trained on all of x: drop the bypass's input "
            "only.",
        ),
        Bug(
            name="dropout on the bypass's output",
            function=DropsTheBypass,
            why="You drop what the bypass returns; LoRA drops what it gets: dropout(x) Aᵀ.",
        ),
        Bug(
            name="dropout in evaluation too",
            function=DropsAlways,
            why="F.dropout drops unless it is told not to: pass self.training as its third argument.",
        ),
    ),
)

# -------------------------------------------------------------------------------------------------------- 04.2 freeze


class Block(nn.Module):
    """A network full of traps: a norm, parameters called A that are no adapter's, and adapters, at two depths each."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.norm.A = nn.Parameter(tensor(rng, 8))
        self.attention = SimpleAttention(8)
        self.A = nn.Parameter(tensor(rng, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.A * self.attention(self.norm.A * self.norm(x)))


def model_inputs(rng: np.random.Generator) -> Case:
    """The block with adapters on q_proj, v_proj and the head.

    Somebody was here before: v_proj is frozen, its A and B too, and the head is not, with its base.
    """
    model = Block(rng)
    r = int(rng.integers(2, 5))
    adapt(model.attention, ("q_proj", "v_proj"), lambda base: LoRALinear(base, r=r, alpha=8.0))
    adapt(model, ("head",), lambda base: LoRALinear(base, r=2, alpha=8.0))
    model.attention.v_proj.requires_grad_(False)
    model.head.requires_grad_(True)
    return {"model": model, "lora_class": LoRALinear}


def freeze_all_but_lora(model: nn.Module, lora_class: type) -> tuple[int, int]:
    """Let only the A and B of the adapters train, in place; count what trains, and what there is.

    >>> model = adapt(SimpleAttention(512), ("q_proj", "v_proj"), lambda base: LoRALinear(base, r=8, alpha=16.0))
    >>> freeze_all_but_lora(model, LoRALinear)
    (16384, 1064960)
    """
    model.requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, lora_class):
            layer.A.requires_grad_(True)
            layer.B.requires_grad_(True)
    count = count_parameters(model)
    return count.trainable, count.total


def what_trains(model: nn.Module) -> set[str]:
    """The names of the parameters that get a gradient."""
    return {name for name, each in model.named_parameters() if each.requires_grad}


def returned_by(function: Callable, model: nn.Module, lora_class: type) -> Any:
    """What came back; a list of two is as good as a tuple."""
    returned = function(model, lora_class)
    return tuple(returned) if isinstance(returned, list) else returned


def frozen_by(function: Callable, case: Case) -> dict[str, Any]:
    """What trains afterwards, what came back, and in which mode the model was left."""
    model = case["model"]
    returned = returned_by(function, model, case["lora_class"])
    return {"trains": names_of(what_trains(model)), "returned": repr(returned), "mode": model.training}


def only_the_adapters_train(function: Callable, case: Case) -> str | None:
    """Exactly the A and B of every adapter, at any depth."""
    model = case["model"]
    function(model, case["lora_class"])
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    wanted, found = {f"{name}.{letter}" for name in layers for letter in "AB"}, what_trains(model)
    problems = [f"{names_of(found - wanted)} should be frozen"] if found - wanted else []
    problems += [f"{names_of(wanted - found)} should train"] if wanted - found else []
    return "; ".join(problems) or None


def counts_what_it_froze(function: Callable, case: Case) -> str | None:
    """It returns (trainable, total), in numbers and not in tensors."""
    returned, count = returned_by(function, **case), count_parameters(case["model"])
    want = (count.trainable, count.total)
    return None if returned == want else f"{returned!r}, expected {want}"


def settles_the_article(function: Callable, case: Case) -> str | None:
    """Width 512, r = 8 on q_proj and v_proj: 16,384 of 1,064,960."""
    model = adapt(SimpleAttention(512), ("q_proj", "v_proj"), lambda base: LoRALinear(base, r=8, alpha=16.0))
    returned = returned_by(function, model, LoRALinear)
    return None if returned == (16_384, 1_064_960) else f"{returned!r}"


def _counted(model: nn.Module) -> tuple[int, int]:
    return sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in model.parameters())


def _freezing(choose: Callable[[nn.Module, type], Iterator[nn.Parameter]], count: Callable = _counted) -> Callable:
    """A wrong freeze_all_but_lora: all parameters are frozen, and those that `choose` names are switched on again."""

    def wrong(model: nn.Module, lora_class: type) -> Any:
        chosen = list(choose(model, lora_class))
        model.requires_grad_(False)
        for each in chosen:
            each.requires_grad_(True)
        return count(model)

    return wrong


def _right(model: nn.Module, lora_class: type) -> Iterator[nn.Parameter]:
    for layer in model.modules():
        if isinstance(layer, lora_class):
            yield from (layer.A, layer.B)


def _only_the_wrapped(model: nn.Module, lora_class: type) -> tuple[int, int]:
    for layer in model.modules():
        if isinstance(layer, lora_class):
            layer.base.requires_grad_(False)
    return _counted(model)


def _flags_on_modules(model: nn.Module, lora_class: type) -> tuple[int, int]:
    for module in model.modules():
        module.requires_grad = isinstance(module, lora_class)  # an attribute that nobody reads
    return _counted(model)


def _evaluation_mode(model: nn.Module, lora_class: type) -> tuple[int, int]:
    model.eval()
    return _counted(model)


def _never_switched_on(model: nn.Module, lora_class: type) -> tuple[int, int]:
    adapters = {id(each) for each in _right(model, lora_class)}
    for each in model.parameters():
        if id(each) not in adapters:
            each.requires_grad_(False)
    return _counted(model)


FREEZE = Exercise(
    id="04.2",
    title="Freeze all but LoRA",
    asks="freeze_all_but_lora(model, lora_class) lets only A and B of its lora_class layers train; returns "
    "(trainable, total)",
    points=2,
    minutes=8,
    difficulty=1,
    importance=3,
    reference=freeze_all_but_lora,
    generate=model_inputs,
    observe=frozen_by,
    tolerance=None,
    properties=(
        Property(name="A and B of every adapter train, and nothing else does", test=only_the_adapters_train),
        Property(name="it counts parameters: (trainable, total)", test=counts_what_it_froze),
        Property(name="the article's block: 16,384 of 1,064,960", test=settles_the_article),
    ),
    hints=(
        "Two steps: freeze everything there is, then switch on again what should train. In this order nothing is "
        "forgotten.",
        "model.requires_grad_(False) freezes every parameter. model.modules() visits every module at any depth.",
        "Switch on layer.A and layer.B of each layer that isinstance(layer, lora_class); a tensor counts .numel() "
        "numbers.",
    ),
    bugs=(
        Bug(
            name="only the wrapped layers",
            function=_only_the_wrapped,
            why="You froze the weights under the adapters; all that has no adapter still trains. This is the "
            "article's 540,672.",
            link="8 · Break it",
        ),
        Bug(
            name="everything frozen",
            function=_freezing(lambda model, lora_class: iter(())),
            why="You froze A and B as well: nothing is left to train, and the optimizer will complain.",
        ),
        Bug(
            name="the whole adapter layer",
            function=_freezing(
                lambda model, lora_class: (
                    each for layer in model.modules() if isinstance(layer, lora_class) for each in layer.parameters()
                )
            ),
            why="layer.requires_grad_(True) switches on its base too, which lives inside the layer: name A and B.",
        ),
        Bug(
            name="by its letter",
            function=_freezing(
                lambda model, lora_class: (
                    each for name, each in model.named_parameters() if name.split(".")[-1] in ("A", "B")
                )
            ),
            why="You went by the name, and this model has a parameter A that belongs to no adapter: ask for the "
            "layer's class.",
        ),
        Bug(
            name="by the end of its name",
            function=_freezing(
                lambda model, lora_class: (
                    each for name, each in model.named_parameters() if name.endswith((".A", ".B"))
                )
            ),
            why="You went by the end of the name, and a norm of this model has a parameter A of its own: ask for the "
            "layer's class.",
        ),
        Bug(
            name="children only",
            function=_freezing(
                lambda model, lora_class: (
                    each for child in model.children() if isinstance(child, lora_class) for each in (child.A, child.B)
                )
            ),
            why="model.children() are only the modules one level down; adapters sit deeper: use model.modules().",
        ),
        Bug(
            name="never switched on",
            function=_never_switched_on,
            why="You froze the others but relied on A and B to train already; here somebody had frozen some: switch "
            "them on.",
        ),
        Bug(
            name="a flag on the module",
            function=_flags_on_modules,
            why="module.requires_grad = False only hangs a new attribute on it: call requires_grad_(False), with the "
            "underscore.",
        ),
        Bug(
            name="evaluation mode",
            function=_evaluation_mode,
            why="model.eval() changes dropout and norms; it freezes nothing.",
        ),
        Bug(
            name="tensors counted",
            function=_freezing(
                _right,
                lambda model: (len(what_trains(model)), len(list(model.parameters()))),
            ),
            why="You counted tensors; count the numbers in them, p.numel(). Counts of tensors hide how large each one "
            "is.",
        ),
        Bug(
            name="the wrong way round",
            function=_freezing(_right, lambda model: _counted(model)[::-1]),
            why="Asked for is (trainable, total), in this order.",
        ),
        Bug(
            name="frozen instead of total",
            function=_freezing(_right, lambda model: (_counted(model)[0], _counted(model)[1] - _counted(model)[0])),
            why="The second number is the total, those that train included; you gave the frozen ones.",
        ),
    ),
)

# ----------------------------------------------------------------------------------------------------- 04.3 gradcheck


class HandmadeBypass(torch.autograd.Function):
    """scaling · (x Aᵀ) Bᵀ with lesson 03's backward pass, in which a factor can be put wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, scaling: float, factors: dict[str, float]) -> Tensor:
        u = x @ A.T
        ctx.save_for_backward(x, A, B, u)
        ctx.scaling, ctx.factors = scaling, factors
        return scaling * u @ B.T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, u = ctx.saved_tensors
        du = ctx.scaling * dy @ B
        dx, dA, dB = du @ A, du.T @ x, ctx.scaling * dy.T @ u
        wrong = ctx.factors.get
        return wrong("dx", 1.0) * dx, wrong("dA", 1.0) * dA, wrong("dB", 1.0) * dB, None, None


class Handmade(RightLayer):
    """A layer over it: `factors` says by how much each gradient is wrong."""

    factors: dict[str, float]

    def bypass(self, x: Tensor) -> Tensor:
        return HandmadeBypass.apply(x, self.A, self.B, self.scaling, self.factors)


SPECIMENS: dict[str, tuple[type[RightLayer], dict[str, float]]] = {
    "a right layer": (RightLayer, {}),
    "a right layer with dropout": (RightLayer, {}),
    "a right layer by hand": (Handmade, {}),
    "dx without the bypass": (Handmade, {"dx": 0.0}),
    "dA without alpha / r": (Handmade, {"dA": 0.4}),
    "dB without alpha / r": (Handmade, {"dB": 0.4}),
    "dB wrong by a hundredth": (Handmade, {"dB": 1.01}),
    "A and B read through .data": (ThroughData, {}),
}


def specimen(name: str, case: Case) -> nn.Module:
    """One of them as new, in float32 and in training mode."""
    layer_class, factors = SPECIMENS[name]
    layer: Any = built(layer_class, case, dropout=0.5 if "dropout" in name else 0.0)
    layer.factors = factors
    return put(layer, case["A"], torch.zeros(3, 2))


def gradient_inputs(rng: np.random.Generator) -> Case:
    """A 4 → 3 layer as new, and two rows for it. alpha / r = 2.5, so that leaving it out is a factor of 0.4."""
    return {
        "x": tensor(rng, 2, 4),
        "W": tensor(rng, 3, 4),
        "b": tensor(rng, 3),
        "A": tensor(rng, 2, 4),
        "alpha": 5.0,
    }


def gradients_are_right(layer: nn.Module, x: Tensor) -> bool:
    """Whether the gradients of x, A and B agree with differences: in float64, at B ≠ 0, without dropout, on a copy."""
    layer = copy.deepcopy(layer).double().eval()
    x = x.detach().double().requires_grad_()
    nn.init.normal_(layer.B, generator=torch.Generator().manual_seed(0))
    return gradcheck(lambda x, A, B: layer(x), (x, layer.A, layer.B), raise_exception=False)


def verdicts(function: Callable, case: Case) -> dict[str, str]:
    """What a test says about each specimen; where it raises on all of them, the first exception comes out."""
    said, errors = {}, []
    for name in SPECIMENS:
        try:
            said[name] = verdict(function, specimen(name, case), case["x"].clone())
        except Exception as error:
            errors.append(error)
            said[name] = f"raised {type(error).__name__}"
    if len(errors) == len(SPECIMENS):
        raise errors[0]
    return said


def verdict(function: Callable, layer: nn.Module, x: Tensor) -> str:
    """Accepted, rejected, or what came instead."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gradcheck warns of float32: the verdict shows it
        answer = function(layer, x)
    return {True: "accepted", False: "rejected"}[answer] if isinstance(answer, bool) else f"answered {answer!r:.40}"


def leaves_the_layer_alone(function: Callable, case: Case) -> str | None:
    """Numbers, dtype, mode and flags of the layer and of x are those of before."""
    layer, x = specimen("a right layer with dropout", case), case["x"].clone()
    before = copy.deepcopy(layer)
    with contextlib.suppress(Exception):  # the values have told of it
        verdict(function, layer, x)
    changed = [
        name
        for (name, old), new in zip(before.named_parameters(), layer.parameters(), strict=True)
        if old.dtype != new.dtype or not torch.equal(old, new) or old.requires_grad != new.requires_grad
    ]
    changed += ["its mode (training or evaluation)"] if layer.training != before.training else []
    changed += ["x"] if x.requires_grad or not torch.equal(x, case["x"]) else []
    return f"this was changed: {', '.join(changed)}; work on copies" if changed else None


def _testing(
    dtype: torch.dtype = torch.float64,
    fills_B: bool = True,
    stops_dropout: bool = True,
    of: str = "xAB",
    on_a_copy: bool = True,
    **settings: Any,
) -> Callable:
    """A wrong gradients_are_right that differs from the right one in one of these."""

    def wrong(layer: nn.Module, x: Tensor) -> bool:
        layer = copy.deepcopy(layer) if on_a_copy else layer
        layer = layer.to(dtype).train(layer.training and not stops_dropout)
        x = x.detach().to(dtype).requires_grad_("x" in of)
        if fills_B:
            nn.init.normal_(layer.B, generator=torch.Generator().manual_seed(0))
        inputs = [tensor for name, tensor in {"x": x, "A": layer.A, "B": layer.B}.items() if name in of]
        return gradcheck(lambda *_: layer(x), inputs, **{"raise_exception": False, **settings})

    return wrong


GRADIENTS = Exercise(
    id="04.3",
    title="A test of gradients",
    asks="gradients_are_right(layer, x): True if dx, dA and dB agree with differences, else False; the layer stays as "
    "it was",
    points=3,
    minutes=12,
    difficulty=3,
    importance=2,
    reference=gradients_are_right,
    generate=gradient_inputs,
    observe=verdicts,
    tolerance=0,
    properties=(Property(name="layer and x are left as they were", test=leaves_the_layer_alone),),
    hints=(
        "torch.autograd.gradcheck(f, inputs) compares with differences for each input that requires a gradient.",
        "Work on copy.deepcopy(layer).double().eval(): differences need float64, and dropout draws anew at every call.",
        "The layer is new, so B = 0. What do dA and the bypass's part of dx look like there? Fill the copy's B first.",
        "f = lambda x, A, B: layer(x), inputs = (x, layer.A, layer.B): gradcheck moves them in place. "
        "raise_exception=False.",
    ),
    bugs=(
        Bug(
            name="gradcheck as it is",
            function=lambda layer, x: gradcheck(layer, (x,)),
            why="gradcheck moves only inputs that require a gradient, and x comes without: make a copy of it that "
            "does, in float64.",
        ),
        Bug(
            name="in float32",
            function=_testing(dtype=torch.float32),
            why="gradcheck steps by 1e-6; in float32 such a difference is mostly rounding, so right layers fail: use "
            ".double().",
        ),
        Bug(
            name="B left at zero",
            function=_testing(fills_B=False),
            why="At B = 0 the bypass's part of dx is zero, and so is dA: a wrong factor in front of them cannot be "
            "seen.",
            link="8 · Break it",
        ),
        Bug(
            name="dropout left on",
            function=_testing(stops_dropout=False),
            why="With dropout every call gives another output, so no difference can agree: call .eval() on your copy.",
        ),
        Bug(
            name="only x",
            function=_testing(of="x"),
            why="You checked dx alone. A and B are what trains: give them to gradcheck as inputs as well.",
        ),
        Bug(
            name="only A and B",
            function=_testing(of="AB"),
            why="You did not check dx. A wrong dx spoils every layer below this one, and no loss curve of this layer "
            "shows it.",
        ),
        Bug(
            name="a tolerance for everything",
            function=_testing(rtol=0.1, atol=0.1),
            why="In float64 these differences agree to about 1e-9. A tolerance of 0.1 lets a factor of 1.01 pass.",
        ),
        Bug(
            name="raises instead of answering",
            function=_testing(raise_exception=True),
            why="gradcheck raises at the first disagreement unless it is told raise_exception=False.",
        ),
        Bug(
            name="the layer itself",
            function=_testing(on_a_copy=False),
            why="layer.double() changes the layer in place: the learner's model is float64 afterwards. Deep-copy it "
            "first.",
        ),
    ),
)

EXERCISES = [MODULE, FREEZE, GRADIENTS]
