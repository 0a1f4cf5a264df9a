"""Lesson 06: the scaling, LoRA+'s groups, and which settings are one and the same at the first step.

The inputs are generic on purpose: r ≠ alpha and no power of two, a ratio and rates of which no two products agree.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minilora.classroom.exercises import Bug, Case, Exercise, Property
from minilora.classroom.pictures.update_size import Start
from minilora.methods import loraplus_groups
from minilora.torch_lora import inject, lora_layer
from minilora.torch_lora.config import LoRAConfig
from minilora.torch_lora.layers import LoRALinear

# ------------------------------------------------------------------------------------------------------- 06.1 scaling


def scaling(r: int, alpha: float, kind: str) -> float:
    """The factor in front of B A: alpha / r for "lora", alpha / √r for "rslora".

    Raises:
        ValueError: for another kind (names the two).

    >>> scaling(16, 32.0, "lora"), scaling(16, 32.0, "rslora")
    (2.0, 8.0)
    """
    if kind not in ("lora", "rslora"):
        raise ValueError(f"no scaling is called {kind!r}: choose 'lora' or 'rslora'")
    return LoRAConfig(r=r, alpha=alpha, use_rslora=kind == "rslora").scaling


def scaling_inputs(rng: np.random.Generator) -> Case:
    """A rank, and an alpha that is no multiple of it."""
    return {"r": int(rng.choice([3, 5, 6, 7])), "alpha": int(rng.choice([16, 23, 32, 41]))}


def both_kinds(function: Callable, case: Case) -> dict[str, Any]:
    """The scaling of either kind."""
    return {kind: function(case["r"], case["alpha"], kind) for kind in ("lora", "rslora")}


def refuses_another_kind(function: Callable, case: Case) -> str | None:
    """A misspelt kind is an error, not a quiet alpha / r."""
    try:
        found = function(case["r"], case["alpha"], "rs_lora")
    except ValueError:
        return None
    return f"for the kind 'rs_lora', which does not exist, {found!r} came back instead of a ValueError"


def _by_kind(lora: Callable, rslora: Callable) -> Callable:
    """A scaling made of two formulas, which refuses other kinds."""

    def wrong(r: int, alpha: float, kind: str) -> Any:
        if kind not in ("lora", "rslora"):
            raise ValueError(kind)
        return (lora if kind == "lora" else rslora)(r, alpha)

    return wrong


def plain(r: int, alpha: float) -> float:
    """[LoRA]'s."""
    return alpha / r


def rooted(r: int, alpha: float) -> float:
    """[rsLoRA]'s."""
    return alpha / math.sqrt(r)


SCALING = Exercise(
    id="06.1",
    title="The scaling",
    asks='scaling(r, alpha, kind) returns the factor in front of B A, for kind "lora" or "rslora"; else a ValueError',
    points=1,
    minutes=6,
    difficulty=1,
    importance=3,
    reference=scaling,
    generate=scaling_inputs,
    observe=both_kinds,
    tolerance=1e-9,
    properties=(Property(name="another kind is refused", test=refuses_another_kind),),
    hints=(
        "Two kinds, one numerator. Only what alpha is divided by differs.",
        '"lora" divides by r, "rslora" by the square root of r: math.sqrt(r).',
        "Use / and not //. End with: raise ValueError(...), reached only where kind is neither of the two.",
    ),
    bugs=(
        Bug(
            name="upside down",
            function=_by_kind(lambda r, alpha: r / alpha, lambda r, alpha: math.sqrt(r) / alpha),
            why="You divided by alpha; alpha is the numerator, so a larger alpha is a louder update.",
            link="5 · Derivation",
        ),
        Bug(
            name="root of the whole",
            function=_by_kind(plain, lambda r, alpha: math.sqrt(alpha / r)),
            why="You took the root of alpha / r; rsLoRA takes that of r alone: alpha / √r.",
        ),
        Bug(
            name="alpha alone",
            function=_by_kind(lambda r, alpha: alpha, lambda r, alpha: alpha),
            why="You returned alpha itself: B A is a sum of r terms, so alpha is divided by r or by √r.",
        ),
        Bug(
            name="always alpha / r",
            function=_by_kind(plain, plain),
            why="Both kinds gave alpha / r: a file trained with rsLoRA then plays √r times too softly.",
            link="8 · Break it",
        ),
        Bug(
            name="always alpha / √r",
            function=_by_kind(rooted, rooted),
            why="Both kinds gave alpha / √r: LoRA's own factor is alpha / r.",
        ),
        Bug(
            name="kinds exchanged",
            function=_by_kind(rooted, plain),
            why='You exchanged the two: the root of r belongs to "rslora".',
        ),
        Bug(
            name="integer division",
            function=_by_kind(lambda r, alpha: alpha // r, rooted),
            why="// cuts the fraction off: alpha = 16 with r = 32 becomes 0, and nothing is ever learned.",
        ),
        Bug(
            name="the square of r",
            function=_by_kind(plain, lambda r, alpha: alpha / r**2),
            why="You squared r where its root belongs.",
        ),
        Bug(
            name="any other kind is LoRA",
            function=lambda r, alpha, kind: rooted(r, alpha) if kind == "rslora" else plain(r, alpha),
            why="A misspelt kind quietly became alpha / r: whoever writes 'rs_lora' trains something else, unseen.",
        ),
    ),
)

# -------------------------------------------------------------------------------------------------------- 06.2 groups


class Model(nn.Module):
    """An embedding, a norm, two layers: what LoRA+ has to sort."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.up, self.head = nn.Linear(8, 12), nn.Linear(12, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.up(self.norm(self.embed(tokens))))


def adapted_model() -> Model:
    """Adapters on the embedding and on one layer, whose bias trains; the norm trains too; the head is frozen."""
    model = Model()
    inject(model, ["embed", "up"], lambda base: lora_layer(base, r=2, alpha=4))
    for p in (model.up.base.bias, *model.norm.parameters()):
        p.requires_grad_(True)
    return model


def group_inputs(rng: np.random.Generator) -> Case:
    """Rates of which no two are alike."""
    lr = float(rng.uniform(0.01, 0.02))
    return {"lr": lr, "ratio": float(rng.uniform(5, 9)), "embedding_lr": lr / 50, "weight_decay": 0.1}


def portrait(function: Callable, case: Case) -> dict[str, Any]:
    """For each parameter by name: how often it is in a group, and at which rate and decay."""
    model = adapted_model()
    groups = function(model, **case)
    if groups is None:
        return None
    # torch takes a single parameter for "params" too, and any iterable of groups
    listed = [
        group | {"params": [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])}
        for group in groups
    ]
    seen: dict[str, Any] = {}
    for name, p in model.named_parameters():
        of = [group for group in listed if any(p is each for each in group["params"])]
        rates = [f"rate {group.get('lr', case['lr']):.6g}, decay {group.get('weight_decay', 0.01):.6g}" for group in of]
        seen[name] = f"in {len(of)} groups: {' and '.join(rates)}" if len(of) > 1 else "".join(rates) or "in no group"
    return seen


def torch_takes_them(function: Callable, case: Case) -> str | None:
    """AdamW accepts the groups and moves all that trains."""
    model = adapted_model()
    optimizer = torch.optim.AdamW(function(model, **case))
    model(torch.arange(6)).square().sum().backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    optimizer.step()
    now = dict(model.named_parameters())
    still = [name for name, p in before.items() if torch.equal(p, now[name])]
    return f"{', '.join(still)} did not move" if still else None


Rule = Callable[[str, Tensor, dict[str, float]], list[tuple[float, float]]]


def right(name: str, p: Tensor, case: dict[str, float]) -> list[tuple[float, float]]:
    """The groups of a parameter, each as (rate, decay): none where it is frozen, else one."""
    if not p.requires_grad:
        return []
    if name.startswith("embed."):
        return [(case["embedding_lr"], case["weight_decay"])]
    fast = name.endswith(".B") or p.ndim == 1
    return [(case["lr"] * (case["ratio"] if fast else 1), 0.0 if p.ndim == 1 else case["weight_decay"])]


def _sorted_by(change: Callable[..., list]) -> Callable:
    """Wrong groups: `change` gets what is right for a parameter, its name, itself and the rates."""

    def wrong(
        model: nn.Module, *, lr: float, ratio: float = 16.0, embedding_lr: float = 1e-6, weight_decay: float = 0.0
    ) -> list[dict]:
        case = {"lr": lr, "ratio": ratio, "embedding_lr": embedding_lr, "weight_decay": weight_decay}
        return [
            {"params": [p], "lr": rate, "weight_decay": decay}
            for name, p in model.named_parameters()
            for rate, decay in change(right(name, p, case), name, p, case)
        ]

    return wrong


def _is_plain(name: str, letter: str) -> bool:
    return name == f"up.{letter}"


GROUPS = Exercise(
    id="06.2",
    title="Groups for LoRA+",
    asks="groups(model, *, lr, ratio, embedding_lr, weight_decay) returns dicts with params, lr and weight_decay",
    points=3,
    minutes=15,
    difficulty=2,
    importance=2,
    reference=loraplus_groups,
    generate=group_inputs,
    observe=portrait,
    tolerance=1e-9,
    properties=(Property(name="torch's AdamW takes them, and all that trains moves", test=torch_takes_them),),
    hints=(
        "One loop over model.named_parameters(). Skip what has requires_grad False. Each other one gets a rate and a "
        "decay.",
        "The rate: embedding_lr for a name that begins with embed.; else lr * ratio for a name that ends in .B and for "
        "vectors (p.ndim == 1); lr for the rest.",
        "The decay: 0 for vectors, else weight_decay. Collect in a dict whose keys are (rate, decay): then no "
        "parameter can be in two groups.",
    ),
    bugs=(
        Bug(
            name="A faster",
            function=_sorted_by(
                lambda found, name, p, c: (
                    [(c["lr"] * c["ratio"], c["weight_decay"])]
                    if _is_plain(name, "A")
                    else [(c["lr"], c["weight_decay"])]
                    if _is_plain(name, "B")
                    else found
                )
            ),
            why="A got the larger rate; it is B that begins at zero and has the way to go.",
            link="8 · Break it",
        ),
        Bug(
            name="A slower instead of B faster",
            function=_sorted_by(
                lambda found, name, p, c: (
                    [(rate / c["ratio"], decay) for rate, decay in found]
                    if found and not name.startswith("embed.")
                    else found
                )
            ),
            why="lr is A's rate: B's is lr · ratio. You gave lr to B and lr / ratio to A.",
        ),
        Bug(
            name="frozen ones included",
            function=_sorted_by(lambda found, name, p, c: found or [(c["lr"], c["weight_decay"])]),
            why="Frozen parameters are in a group too: skip those whose requires_grad is False.",
            link="8 · Break it",
        ),
        Bug(
            name="embeddings as any layer",
            function=_sorted_by(
                lambda found, name, p, c: (
                    [(c["lr"] * (c["ratio"] if name.endswith("B") else 1), c["weight_decay"])]
                    if name in ("embed.A", "embed.B")
                    else found
                )
            ),
            why="An embedding's A and B have a rate of their own, embedding_lr: there it is A that begins at zero.",
        ),
        Bug(
            name="the embedding's B forgotten",
            function=_sorted_by(
                lambda found, name, p, c: [(c["lr"] * c["ratio"], c["weight_decay"])] if name == "embed.B" else found
            ),
            why="Only A of the embedding got embedding_lr; its B, drawn from N(0, 1), went with the fast ones.",
        ),
        Bug(
            name="in two groups",
            function=_sorted_by(
                lambda found, name, p, c: [*found, (c["lr"], c["weight_decay"])] if found and p.ndim == 1 else found
            ),
            why="The vectors are in two groups; torch refuses that. Decide once for each parameter.",
        ),
        Bug(
            name="decay on vectors",
            function=_sorted_by(lambda found, name, p, c: [(rate, c["weight_decay"]) for rate, _ in found]),
            why="Biases and norms decay: they are the base's own, and zero is not where they came from.",
        ),
        Bug(
            name="no decay on B",
            function=_sorted_by(
                lambda found, name, p, c: [(rate, 0.0) for rate, _ in found] if _is_plain(name, "B") else found
            ),
            why="A decays and B does not: give both weight_decay. Only vectors have none.",
        ),
        Bug(
            name="vectors at A's rate",
            function=_sorted_by(
                lambda found, name, p, c: [(c["lr"], 0.0)] if found and p.ndim == 1 else found,
            ),
            why="Vectors that train go with B, as in PEFT; you left them at lr.",
        ),
        Bug(
            name="vectors left out",
            function=_sorted_by(lambda found, name, p, c: [] if p.ndim == 1 else found),
            why="Biases and norms that train are in no group: they will never move, and nothing says so.",
        ),
        Bug(
            name="names of PEFT",
            function=_sorted_by(
                lambda found, name, p, c: [(c["lr"], c["weight_decay"])] if _is_plain(name, "B") else found
            ),
            why="No parameter here has lora_B in its name, so B learned at A's rate: the ratio had no effect.",
        ),
    ),
)

# --------------------------------------------------------------------------------------------- 06.3 the same first step

Setting = tuple[str, float, float, int, str]  # optimizer "sgd" or "adam", lr, alpha, r, kind


def same_first_step(settings: Sequence[Setting]) -> list[int]:
    """For each setting the index of the first one that makes the same first ΔW, from the same A and B = 0.

    SGD: ΔW = −lr · s² · G AᵀA      Adam: ΔW = −lr · s · sign(G Aᵀ) A

    >>> same_first_step([("sgd", 0.1, 8.0, 4, "lora"), ("sgd", 0.4, 4.0, 4, "lora"), ("sgd", 0.2, 4.0, 4, "lora")])
    [0, 0, 2]
    """
    keys = [(opt, r, lr * scaling(r, alpha, kind) ** _power(opt)) for opt, lr, alpha, r, kind in settings]
    return _first_alike(keys)


def _power(optimizer: str) -> int:
    return 2 if optimizer == "sgd" else 1


def _first_alike(keys: Sequence[tuple]) -> list[int]:
    """For each key the index of the first that agrees: its numbers to 10⁻⁶, its words exactly."""

    def alike(one: tuple, other: tuple) -> bool:
        return all(
            a == b if isinstance(a, str) else math.isclose(a, b, rel_tol=1e-6) for a, b in zip(one, other, strict=True)
        )

    return [next(j for j, other in enumerate(keys) if alike(key, other)) for key in keys]


def first_update(setting: Setting) -> Tensor:
    """ΔW after one step of torch's own optimizer on a real LoRALinear; the same A, base and batch for every setting."""
    optimizer, lr, alpha, r, kind = setting
    draw = torch.Generator().manual_seed(r)
    base = nn.Linear(12, 7, bias=False).requires_grad_(False)
    base.weight.copy_(torch.randn(7, 12, generator=draw))
    layer = LoRALinear(base, r=r, alpha=alpha, use_rslora=kind == "rslora", generator=draw)
    x, y = torch.randn(5, 12, generator=draw), torch.randn(5, 7, generator=draw)
    make = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam
    steps = make([layer.A, layer.B], lr=lr)
    (0.5 * (layer(x) - y).square().sum(1).mean()).backward()
    steps.step()
    return layer.delta_weight().detach()


def by_running(settings: Sequence[Setting]) -> list[int]:
    """The same as same_first_step, found by making the steps: alike to 10⁻³ of the larger, for Adam's ε."""
    updates = [first_update(setting) for setting in settings]

    def alike(one: Tensor, other: Tensor) -> bool:
        return bool((one - other).norm() < 1e-3 * max(one.norm(), other.norm()))

    return [next(j for j, other in enumerate(updates) if alike(update, other)) for update in updates]


def six_settings(rng: np.random.Generator) -> Case:
    """Six settings of one rank in a random order: three are alike, and so are two others. The first two are."""
    r, times = int(rng.choice([3, 5, 6, 7])), float(rng.choice([2, 3]))
    lr, alpha = float(rng.uniform(0.01, 0.02)), float(rng.uniform(8, 16))
    settings: list[Setting] = [
        ("sgd", lr, alpha, r, "lora"),
        ("sgd", lr / times**2, times * alpha, r, "lora"),
        ("sgd", lr / times, times * alpha, r, "lora"),
        ("sgd", lr, alpha / math.sqrt(r), r, "rslora"),
        ("adam", lr, alpha / math.sqrt(r), r, "rslora"),
        ("adam", lr / times, times * alpha, r, "lora"),
    ]
    first, second, third = rng.permutation([0, 1, 3])
    rest = rng.permutation([third, 2, 4, 5])
    return {"settings": [settings[i] for i in (first, second, *rest)]}


def as_words(function: Callable, case: Case) -> Any:
    """The answer in words: an index is no number that another can be near to."""
    said = function(**case)
    is_a_row = isinstance(said, (list, tuple, np.ndarray))
    return tuple(f"as setting {index}" for index in said) if is_a_row else said


def agrees_with_running(function: Callable, case: Case) -> str | None:
    """What was predicted is what torch's optimizers do."""
    said, seen = list(function(case["settings"])), by_running(case["settings"])
    return None if said == seen else f"{said}; the six were run, and it is {seen}"


def _keyed(key: Callable[..., tuple]) -> Callable:
    """A wrong answer that calls alike what has the same key."""
    return lambda settings: _first_alike([key(*setting) for setting in settings])


SAME = Exercise(
    id="06.3",
    title="The same first step",
    asks="same_first_step(settings) gives for each (optimizer, lr, alpha, r, kind) the index of the first one like it",
    points=3,
    minutes=15,
    difficulty=3,
    importance=3,
    reference=same_first_step,
    generate=six_settings,
    observe=as_words,
    outputs=tuple(f"setting {i}" for i in range(6)),
    tolerance=0,
    properties=(Property(name="it is what comes of running them", test=agrees_with_running),),
    hints=(
        "B = 0, so A has no gradient, and only B moves. Write the first ΔW = s · B A once for SGD and once for Adam.",
        "dB carries one s, and ΔW another. SGD keeps dB's length; Adam divides it away and keeps the signs.",
        "So what counts is lr · s² for SGD and lr · s for Adam, and the optimizer itself. Compare with math.isclose.",
    ),
    bugs=(
        Bug(
            name="one s for SGD",
            function=_keyed(lambda opt, lr, alpha, r, kind: (opt, lr * scaling(r, alpha, kind))),
            why="For SGD s counts twice: once in the gradient of B, once in s · B A. lr / 2 does not undo 2 · alpha.",
            link="5 · Derivation",
        ),
        Bug(
            name="two s for Adam",
            function=_keyed(lambda opt, lr, alpha, r, kind: (opt, lr * scaling(r, alpha, kind) ** 2)),
            why="Adam divides the gradient by its own size, and the s in it goes away: one s is left.",
            link="5 · Derivation",
        ),
        Bug(
            name="the kind forgotten",
            function=_keyed(lambda opt, lr, alpha, r, kind: (opt, lr * (alpha / r) ** _power(opt))),
            why="You scaled by alpha / r throughout: two of the settings have alpha / √r.",
        ),
        Bug(
            name="optimizers not told apart",
            function=_keyed(lambda opt, lr, alpha, r, kind: (lr * scaling(r, alpha, kind) ** 2,)),
            why="A step of SGD and one of Adam never agree here: one keeps the gradient's sizes, one only its signs.",
        ),
        Bug(
            name="the rate forgotten",
            function=_keyed(lambda opt, lr, alpha, r, kind: (opt, scaling(r, alpha, kind))),
            why="You compared the scalings alone; the learning rate is the other half.",
        ),
        Bug(
            name="alpha does not matter",
            function=_keyed(lambda opt, lr, alpha, r, kind: (opt, lr)),
            why="You compared the rates alone: alpha does matter, for Adam too, as s stands in ΔW = s · B A.",
        ),
        Bug(
            name="all different",
            function=lambda settings: list(range(len(settings))),
            why="You found none alike. With == on floats that happens by rounding: use math.isclose.",
        ),
        Bug(
            name="counted by groups",
            function=lambda settings: [
                sorted(set(same_first_step(settings))).index(i) for i in same_first_step(settings)
            ],
            why="You numbered the groups 0, 1, 2; asked for is the index of the first setting of the group.",
        ),
    ),
)

# --------------------------------------------------------------------------------------- section 8: which bug is this?

PATIENTS = {
    "1": ("06.1", "upside down"),
    "2": ("06.1", "always alpha / r"),
    "3": ("06.2", "A faster"),
    "4": ("06.2", "frozen ones included"),
}


def imitation(begin: Start, scale: Callable, groups: Callable, *, lr: float, ratio: float, steps: int) -> list[float]:
    """The loss of update_size's task at every step, with a real layer of rsLoRA, alpha 16, AdamW and these groups.

    The rows of x are those of the identity, so that ½ ‖error‖² is ½ ‖ΔW − P‖².
    """
    P, A = (torch.from_numpy(array[0]).float() for array in (begin.P, begin.A))
    layer = lora_layer(nn.Linear(P.shape[1], P.shape[0], bias=False), r=len(A), alpha=16, use_rslora=True)
    layer.A.data.copy_(A)
    layer.scaling = float(scale(layer.r, layer.alpha, "rslora"))
    model, x = nn.ModuleDict({"up": layer}), torch.eye(P.shape[1])
    target = layer.base(x) + P.T
    optimizer = torch.optim.AdamW(groups(model, lr=lr, ratio=ratio, embedding_lr=lr, weight_decay=0.0))
    losses = []
    for _ in range(steps):
        loss = 0.5 * (layer(x) - target).square().sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


EXERCISES = [SCALING, GROUPS, SAME]
