"""Lesson 09: merging with a guard, a check that a merge can fail, and a weight that comes back to the last bit.

The weight of 09.1 is square on purpose, like the projections of an attention: a transposed update fits it and has to be
found by its values. r ≠ alpha and B ≠ 0, or a forgotten alpha / r could not be seen. The numbers of 09.3 are multiples
of 2⁻¹², so that W + ΔW is exact in float32 and any right way of adding them rounds to the same bfloat16.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn

from minilora.classroom.exercises import Bug, Case, Exercise, Property, is_stub
from minilora.classroom.merging import merge_as, random_layer
from minilora.numpy_lora.forward import delta_weight, lora_forward

# ---------------------------------------------------------------------------------------------- 09.1 merge, unmerge


def layer_inputs(rng: np.random.Generator, out_features: int = 9, in_features: int = 9) -> Case:
    """A square layer with a rank-3 adapter that has already learned something, and five rows for it."""
    return {
        "x": rng.normal(size=(5, in_features)),
        "W": rng.normal(size=(out_features, in_features)),
        "A": rng.normal(size=(3, in_features)),
        "B": rng.normal(size=(out_features, 3)),
        "alpha": 8.0,
    }


class AdaptedLayer:
    """A frozen weight with an adapter that can be folded into it, and out again by subtraction.

    >>> layer = AdaptedLayer(np.eye(2), np.ones((1, 2)), np.ones((2, 1)), alpha=3.0)
    >>> layer.merge()
    >>> layer.W
    array([[4., 3.],
           [3., 4.]])
    """

    def __init__(self, W: ndarray, A: ndarray, B: ndarray, alpha: float) -> None:
        self.W, self.A, self.B, self.alpha = W, A, B, alpha
        self.is_merged = False

    def forward(self, x: ndarray) -> ndarray:
        """One product where the adapter is merged, three where it is not."""
        if self.is_merged:
            return x @ self.W.T
        return lora_forward(x, self.W, self.A, self.B, self.alpha)

    def merge(self) -> None:
        """W ← W + ΔW, once."""
        if self.is_merged:
            raise RuntimeError("the adapter is merged already: a second merge would add it twice")
        self.W = self.W + delta_weight(self.A, self.B, self.alpha)
        self.is_merged = True

    def unmerge(self) -> None:
        """W ← W − ΔW, once."""
        if not self.is_merged:
            raise RuntimeError("the adapter is not merged: there is nothing to take out")
        self.W = self.W - delta_weight(self.A, self.B, self.alpha)
        self.is_merged = False


def life_of_a_layer(layer_class: type, case: Case) -> dict:
    """Merge, merge again, unmerge, unmerge again: the weight, the outputs and the refusals on the way."""
    if is_stub(getattr(layer_class, "merge", layer_class)):
        raise NotImplementedError
    x, *made_of = case.values()
    layer = layer_class(*made_of)
    seen = {}
    for name, act in (("merge", layer.merge), ("unmerge", layer.unmerge)):
        act()
        seen[f"W after {name}"], seen[f"output after {name}"] = np.array(layer.W), layer.forward(x)
        seen[f"a second {name}"] = _answer(act)
        seen[f"W after the second {name}"] = np.array(layer.W)
    return seen


def _answer(act: Callable[[], object]) -> str:
    try:
        act()
    except Exception as error:
        return f"raises {type(error).__name__}"
    return "raises nothing"


def works_where_out_is_not_in(layer_class: type, case: Case) -> str | None:
    """A layer of 7 × 12 merges as well."""
    x, *made_of = layer_inputs(np.random.default_rng(0), out_features=7, in_features=12).values()
    layer = layer_class(*made_of)
    layer.merge()
    want = lora_forward(x, *made_of)
    return None if np.allclose(layer.forward(x), want) else "on a 7 × 12 layer merging changes the output"


def _layer(merge: Callable, unmerge: Callable = AdaptedLayer.unmerge) -> type:
    """A wrong AdaptedLayer with these methods."""
    return type("AdaptedLayer", (AdaptedLayer,), {"merge": merge, "unmerge": unmerge})


def _folds(
    delta: Callable[["AdaptedLayer"], ndarray] = lambda self: delta_weight(self.A, self.B, self.alpha),
    sign: int = 1,
    guard: str = "before",
    raises: type[Exception] = RuntimeError,
    flag: bool = True,
) -> Callable:
    """A merge (sign 1) or unmerge (sign −1) that is wrong in one of these."""

    def fold(self: AdaptedLayer) -> None:
        is_done = self.is_merged == (sign > 0)
        if guard == "silent" and is_done:
            return
        if guard == "before" and is_done:
            raise raises("done already")
        self.W = self.W + sign * delta(self)
        if guard == "after" and is_done:
            raise RuntimeError("done already")
        if flag:
            self.is_merged = sign > 0

    return fold


def _without_scaling(self: AdaptedLayer) -> ndarray:
    return self.B @ self.A


def _unwritten(self: AdaptedLayer) -> None: ...


def _in_place(self: AdaptedLayer) -> None:
    if self.is_merged:
        raise RuntimeError("done already")
    self.W += delta_weight(self.A, self.B, self.alpha)
    self.is_merged = True


MERGE = Exercise(
    id="09.1",
    title="Merge and unmerge, with a guard",
    asks="class AdaptedLayer: merge() folds ΔW into self.W, unmerge() takes it out; twice is a RuntimeError",
    points=3,
    minutes=10,
    difficulty=1,
    importance=3,
    reference=AdaptedLayer,
    generate=layer_inputs,
    observe=life_of_a_layer,
    properties=(Property(name="a layer that is not square merges as well", test=works_where_out_is_not_in),),
    hints=(
        "ΔW = (alpha / r) · B A has the shape of W. r is the number of rows of A.",
        "self.W = self.W + ΔW makes a new array. self.W += ΔW writes into the array that the caller gave you.",
        "Ask first, act then: raise before W has changed. And tell forward what happened: it looks at self.is_merged.",
    ),
    bugs=(
        Bug(
            name="no scaling",
            function=_layer(_folds(_without_scaling), _folds(_without_scaling, sign=-1)),
            why="You merged B A; the update is (alpha / r) · B A, as in the forward pass.",
            link="5 · Derivation",
        ),
        Bug(
            name="unmerge without scaling",
            function=_layer(AdaptedLayer.merge, _folds(_without_scaling, sign=-1)),
            why="You added (alpha / r) · B A and subtracted B A: what remains in W is (alpha / r − 1) · B A.",
            link="9 · Check the claims",
        ),
        Bug(
            name="ΔW transposed",
            function=_layer(
                _folds(lambda self: delta_weight(self.A, self.B, self.alpha).T),
                _folds(lambda self: delta_weight(self.A, self.B, self.alpha).T, sign=-1),
            ),
            why="You added ΔWᵀ. On a square weight the shapes agree and nothing is raised; only the values tell.",
            link="8 · Break it",
        ),
        Bug(
            name="no guard",
            function=_layer(_folds(guard="none"), _folds(sign=-1, guard="none")),
            why="A second merge adds ΔW again and a second unmerge subtracts it again: both must raise a RuntimeError.",
            link="8 · Break it",
        ),
        Bug(
            name="a ValueError as the guard",
            function=_layer(_folds(raises=ValueError), _folds(sign=-1, raises=ValueError)),
            why="A ValueError says that an argument is wrong; here the layer's state is. Raise a RuntimeError.",
        ),
        Bug(
            name="assert as the guard",
            function=_layer(_folds(raises=AssertionError), _folds(sign=-1, raises=AssertionError)),
            why="`assert` is for our own mistakes, and `python -O` leaves it out: raise a RuntimeError.",
        ),
        Bug(
            name="unmerge not written",
            function=_layer(AdaptedLayer.merge, _unwritten),
            why="merge is right; unmerge does nothing yet.",
        ),
        Bug(
            name="merged twice",
            function=_layer(_folds(guard="none")),
            why="The second merge added ΔW again: it must raise a RuntimeError and change nothing.",
            link="8 · Break it",
        ),
        Bug(
            name="unmerged twice",
            function=_layer(AdaptedLayer.merge, _folds(sign=-1, guard="none")),
            why="The second unmerge subtracted ΔW again, from a weight that does not hold it any more.",
        ),
        Bug(
            name="a guard that says nothing",
            function=_layer(_folds(guard="silent"), _folds(sign=-1, guard="silent")),
            why="A second merge changes nothing, but its caller believes that it did: raise a RuntimeError.",
        ),
        Bug(
            name="the guard comes too late",
            function=_layer(_folds(guard="after"), _folds(sign=-1, guard="after")),
            why="You raised after W had changed: whoever catches the error goes on with a broken weight. Ask first.",
        ),
        Bug(
            name="the flag is never set",
            function=_layer(_folds(flag=False), _folds(sign=-1, guard="none")),
            why="is_merged stays False, so forward adds the bypass to a weight that holds it already.",
        ),
        Bug(
            name="the flag is never cleared",
            function=_layer(AdaptedLayer.merge, _folds(sign=-1, flag=False)),
            why="After unmerge is_merged is still True: forward then uses W alone, without the adapter.",
        ),
        Bug(
            name="in place",
            function=_layer(_in_place),
            why="self.W += ΔW writes into the caller's array: everyone who holds that base model is merged with you.",
            link="8 · Break it",
        ),
    ),
)

# -------------------------------------------------------------------------------------------------- 09.2 equivalent


def equivalent(merged: ndarray, live: ndarray, base: ndarray, tolerance: float) -> bool:
    """Tell whether a merged model does what the adapter does: ‖merged − live‖ ≤ tolerance · ‖live − base‖.

    Raises:
        ValueError: if the adapter has no effect on these inputs, because then the comparison proves nothing.

    >>> base, live = np.zeros(2), np.array([0.0, 1e-4])
    >>> equivalent(live, live, base, 0.05), equivalent(base, live, base, 0.05)
    (True, False)
    """
    effect = np.linalg.norm(live - base)
    if effect == 0:
        raise ValueError("live and base are equal: the adapter has no effect here, so there is nothing to compare")
    return bool(np.linalg.norm(merged - live) <= tolerance * effect)


def output_inputs(rng: np.random.Generator) -> Case:
    """Outputs of a base model, of about 1; the effect of a young adapter on them, about 0.0003; and some noise."""
    base, effect, noise = rng.normal(size=(3, 6, 24))
    return {"base": base, "effect": 3e-4 * (effect - effect.mean()), "noise": noise - noise.mean(), "tolerance": 0.05}


def verdicts(function: Callable, case: Case) -> dict[str, str]:
    """What the function says of good merges and bad ones."""
    base, effect, noise, tolerance = case.values()
    small = 0.02 * np.linalg.norm(effect) / np.linalg.norm(noise) * noise  # 2 % of the effect
    live, large, other = base + effect, 1e6 * effect, np.roll(effect, 1, axis=0)
    broken = live.copy()
    broken[0, 0] = np.nan
    merges = {
        "a merge that is 2 % off": (live + small, live, base),
        "the same, of a large adapter": (base + large + 1e6 * small, base + large, base),
        "every output 2 % off": (base + 1.02 * effect, live, base),
        "the adapter erased": (base, live, base),
        "half of the adapter": (base + effect / 2, live, base),
        "half of a large adapter": (base + large / 2, base + large, base),
        "the adapter added twice": (live + effect, live, base),
        "another adapter of the same size": (base + other, live, base),
        "an output that is NaN": (broken, live, base),
        "an adapter without any effect": (base, base, base),
    }
    return {name: _verdict(function, outputs, tolerance) for name, outputs in merges.items()}


def _verdict(function: Callable, outputs: tuple, tolerance: float) -> str:
    try:
        answer = function(*(array.copy() for array in outputs), tolerance)
    except ValueError:
        return "refused (ValueError)"
    if answer is None or answer is ...:
        return f"answered {answer}"
    return "accepted" if answer else "rejected"


def grows_with_the_tolerance(function: Callable, case: Case) -> str | None:
    """What is 2 % off passes at 3 % and not at 1 %."""
    base, effect, noise, _ = case.values()
    off = base + effect + 0.02 * np.linalg.norm(effect) / np.linalg.norm(noise) * noise
    if not function(off, base + effect, base, 0.04):
        return "a merge that is 2 % off is rejected at a tolerance of 4 %"
    return (
        "a merge that is 2 % off is accepted at a tolerance of 1 %"
        if function(off, base + effect, base, 0.01)
        else None
    )


def _judge(rule: Callable[..., object], refuses: bool = True) -> Callable:
    """A wrong `equivalent` with this rule; it refuses adapters without effect, unless that is its mistake."""

    def wrong(merged: ndarray, live: ndarray, base: ndarray, tolerance: float) -> bool:
        if refuses and np.array_equal(live, base):
            raise ValueError("no effect")
        return bool(rule(merged, live, base, tolerance))

    return wrong


_norm = np.linalg.norm

EQUIVALENT = Exercise(
    id="09.2",
    title="A check that can fail",
    asks="equivalent(merged, live, base, tolerance) -> bool: ‖merged − live‖ ≤ tolerance · ‖live − base‖, "
    "and a ValueError where live equals base",
    points=3,
    minutes=10,
    difficulty=2,
    importance=3,
    reference=equivalent,
    generate=output_inputs,
    observe=verdicts,
    properties=(Property(name="it goes by the tolerance it is given", test=grows_with_the_tolerance),),
    hints=(
        "What would be lost if the merge went wrong? Only the adapter's effect, live − base. Measure against that.",
        "Use the norm of the difference: in a mean, errors of both signs cancel, and sizes alone know no direction.",
        "Multiply, do not divide: error <= tolerance * effect is False where anything is NaN, and needs no 0 / 0.",
        "If live equals base, no merge could ever fail this check. Say so with a ValueError.",
    ),
    bugs=(
        Bug(
            name="an absolute tolerance",
            function=_judge(lambda m, live, base, t: np.allclose(m, live, rtol=0, atol=1e-3), refuses=False),
            why="An error of 0.001 is more than this adapter does at all: the check accepts a model without it.",
            link="2 · The problem",
        ),
        Bug(
            name="the tolerance for np.allclose",
            function=_judge(lambda m, live, base, t: np.allclose(m, live, atol=t)),
            why="np.allclose takes the tolerance for an absolute error, and this adapter does less than that at all: "
            "multiply it by the norm of live − base.",
            link="2 · The problem",
        ),
        Bug(
            name="relative to the output",
            function=_judge(lambda m, live, base, t: _norm(m - live) <= t * _norm(live)),
            why="The output is nearly all base model. 5 % of it is room enough to lose the adapter.",
            link="2 · The problem",
        ),
        Bug(
            name="np.allclose and no refusal",
            function=_judge(lambda m, live, base, t: np.allclose(m, live, atol=t), refuses=False),
            why="np.allclose takes the tolerance for an absolute error, and this adapter does less than that at all. "
            "And where live equals base there is nothing to compare: raise a ValueError.",
            link="2 · The problem",
        ),
        Bug(
            name="too strict",
            function=_judge(lambda m, live, base, t: np.allclose(m, live)),
            why="np.allclose's own tolerances know nothing of the adapter: this rejects an honest merge in 16 bits.",
        ),
        Bug(
            name="entry by entry",
            function=_judge(lambda m, live, base, t: np.all(np.abs(m - live) <= t * np.abs(live - base))),
            why="You hold each output to a part of its own change. Where the adapter changes one by almost nothing, "
            "any rounding is too much: compare the norms of all of them together.",
        ),
        Bug(
            name="sizes compared",
            function=_judge(
                lambda m, live, base, t: abs(_norm(m - base) - _norm(live - base)) <= t * _norm(live - base)
            ),
            why="Two effects of the same size can point anywhere: compare the outputs, not their norms.",
        ),
        Bug(
            name="errors cancel",
            function=_judge(lambda m, live, base, t: abs(np.mean(m - live)) <= t * np.mean(np.abs(live - base))),
            why="In a mean, errors up and errors down cancel. Take the norm, or the mean of the absolute values.",
        ),
        Bug(
            name="NaN slips through",
            function=_judge(lambda m, live, base, t: not _norm(m - live) > t * _norm(live - base)),
            why="Every comparison with NaN is False, so `not (error > …)` is True. Ask for error <= … instead.",
        ),
        Bug(
            name="a comparison that cannot fail",
            function=_judge(lambda m, live, base, t: _norm(m - live) <= t * _norm(live - base), refuses=False),
            why="Where live equals base nothing can be lost, and you accepted: somebody compared a model with itself.",
            link="8 · Break it",
        ),
        Bug(
            name="0 / 0",
            function=_judge(lambda m, live, base, t: _norm(m - live) / _norm(live - base) <= t, refuses=False),
            why="Without an effect you divided 0 by 0, and NaN <= 0.05 is False: a verdict where there is none. "
            "Raise a ValueError.",
        ),
    ),
)

# ---------------------------------------------------------------------------------------------------- 09.3 folded_in


@contextlib.contextmanager
def folded_in(linear: nn.Linear, delta: Tensor) -> Iterator[None]:
    """Let `linear` compute with W + ΔW inside a `with`; after it, W is what it was, to the last bit.

    The sum is made in float32 and rounded once to W's own dtype.

    >>> linear = nn.Linear(2, 2).bfloat16()
    >>> before = linear.weight.clone()
    >>> with folded_in(linear, torch.rand(2, 2)):
    ...     pass
    >>> torch.equal(linear.weight, before)
    True
    """
    kept = linear.weight.data
    linear.weight.data = (kept.float() + delta).to(kept.dtype)
    try:
        yield
    finally:
        linear.weight.data = kept


def fold_inputs(rng: np.random.Generator) -> Case:
    """A weight for bfloat16 and thirty updates as large as it, in steps of 2⁻¹²: float32 adds them exactly."""
    in_steps = (np.round(rng.normal(size=(31, 24, 16)) * 4096) / 4096).astype(np.float32)
    return {"W": in_steps[0], "updates": in_steps[1:]}


def life_of_a_weight(function: Callable, case: Case) -> dict:
    """The weight inside one block, after it, after one that raises, and after thirty of them."""
    if is_stub(inspect.unwrap(function)):
        raise NotImplementedError
    linear = _linear(case["W"])
    updates = torch.from_numpy(case["updates"])
    seen = {}
    with function(linear, updates[0]):
        seen["dtype inside"] = str(linear.weight.dtype)
        seen["W inside"] = linear.weight.detach().float().clone()
    seen["W after"] = linear.weight.detach().float().clone()
    linear = _linear(case["W"])
    seen["an error inside"] = _what_becomes_of_an_error(function, linear, updates[0])
    seen["W after an error"] = linear.weight.detach().float().clone()
    linear = _linear(case["W"])
    for delta in updates:
        with function(linear, delta):
            pass
    seen["W after 30"] = linear.weight.detach().float().clone()
    return seen


def _linear(W: ndarray) -> nn.Linear:
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False)
    linear.weight = nn.Parameter(torch.from_numpy(W.copy()).bfloat16(), requires_grad=False)
    return linear


def _what_becomes_of_an_error(function: Callable, linear: nn.Linear, delta: Tensor) -> str:
    try:
        with function(linear, delta):
            raise KeyError("an error inside")
    except KeyError:
        return "comes out"
    return "is swallowed"


def comes_back_to_the_bit(function: Callable, case: Case) -> str | None:
    """After thirty blocks not one weight has another bit."""
    linear = _linear(case["W"])
    before = linear.weight.detach().clone()
    for delta in torch.from_numpy(case["updates"]):
        with function(linear, delta):
            pass
    changed = int((linear.weight.detach() != before).sum())
    return f"after 30 blocks {changed} of {before.numel()} weights are others than before" if changed else None


def _fold(
    add: Callable[[Tensor, Tensor], Tensor] = lambda W, delta: (W.float() + delta).to(W.dtype),
    undo: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda kept, now, delta: kept,
    always: bool = True,
    swallows: bool = False,
) -> Callable:
    """A wrong `folded_in` that differs from the right one in one of these."""

    @contextlib.contextmanager
    def wrong(linear: nn.Linear, delta: Tensor) -> Iterator[None]:
        kept = linear.weight.data
        linear.weight.data = add(kept, delta)
        try:
            yield
        except Exception:
            if always:
                linear.weight.data = undo(kept, linear.weight.data, delta)
            if not swallows:
                raise
        else:
            linear.weight.data = undo(kept, linear.weight.data, delta)

    return wrong


FOLD = Exercise(
    id="09.3",
    title="Back to the last bit",
    asks="with folded_in(linear, delta): the weight is W + ΔW, summed in float32 and rounded once; after it, exactly W",
    points=3,
    minutes=12,
    difficulty=2,
    importance=2,
    reference=folded_in,
    generate=fold_inputs,
    observe=life_of_a_weight,
    properties=(Property(name="after thirty different adapters W is the same to the bit", test=comes_back_to_the_bit),),
    hints=(
        "Everything before `yield` happens on the way in, everything after it on the way out.",
        "What was rounded away cannot be subtracted back. Keep W itself, and put it back.",
        "kept = linear.weight.data is a second name, not a copy: make the sum a new tensor instead of +=.",
        "If the block raises, the error arrives at `yield`: only what stands in a `finally:` still happens.",
    ),
    bugs=(
        Bug(
            name="by subtraction",
            function=_fold(undo=lambda kept, now, delta: (now.float() - delta).to(now.dtype)),
            why="What the sum rounded away stays lost, a little more with each adapter. Keep W and put it back.",
            link="7 · Run it",
        ),
        Bug(
            name="added whole, subtracted rounded",
            function=_fold(undo=lambda kept, now, delta: now - delta.to(now.dtype)),
            why="You added ΔW in float32 and subtracted it rounded to bfloat16: the halves do not fit. Keep W instead.",
            link="11 · The same in PEFT",
        ),
        Bug(
            name="never taken out",
            function=_fold(undo=lambda kept, now, delta: now),
            why="After the block the update is still in the weight: W was never put back, or `kept` was a second name "
            "for the tensor that you changed in place.",
        ),
        Bug(
            name="lost when the block raises",
            function=_fold(always=False),
            why="After an error inside the block W stays merged. Put it back in a `finally:`.",
        ),
        Bug(
            name="+= and -=",
            function=_fold(undo=lambda kept, now, delta: (now.float() - delta).to(now.dtype), always=False),
            why="Two mistakes: subtracting does not bring back what the sum rounded away, so keep W; and after an "
            "error inside the block nothing is subtracted at all, so put W back in a `finally:`.",
        ),
        Bug(
            name="the error is swallowed",
            function=_fold(swallows=True),
            why="An error inside the block must come out again: try … finally passes it on, `except` alone does not.",
        ),
        Bug(
            name="in float32",
            function=_fold(add=lambda W, delta: W.float() + delta),
            why="The merged weight is float32 now: twice the memory, and no bfloat16 input fits. Round to W's dtype.",
        ),
        Bug(
            name="rounded before the sum",
            function=_fold(add=lambda W, delta: W + delta.to(W.dtype)),
            why="You rounded ΔW to bfloat16 and then rounded the sum: two roundings. Add in float32 and round once.",
        ),
    ),
)

EXERCISES = [MERGE, EQUIVALENT, FOLD]

# ------------------------------------------------------------------------------------------------------- the gallery


def gallery() -> dict[str, tuple[ndarray, ndarray, ndarray]]:
    """Section 8's patients: merged, live and base output of each, as the author of the merge had them to compare.

    Kept here so that the lesson shows the symptoms before the names.
    """
    W, A, B = random_layer(64, 3)
    B, alpha = 3e-4 * B, 8.0  # s = 8/3, so that ΔW is as small as in section 2
    x = np.random.default_rng(3).normal(size=(24, 64))
    base, live = x @ W.T, lora_forward(x, W, A, B, alpha)

    def merged_by(name: str, times: int = 1) -> ndarray:
        layer = MERGE.bug(name)(W.copy(), A, B, alpha)
        for _ in range(times):
            layer.merge()
        return x @ layer.W.T

    unscaled = merged_by("no scaling")
    in_4_bits = merge_as("NF4", W, delta_weight(A, B, alpha))
    beside = x @ (in_4_bits.W + in_4_bits.meant).T
    return {
        "1": (unscaled, live, base),
        "2": (merged_by("ΔW transposed"), live, base),
        "3": (merged_by("merged twice", times=2), live, base),
        "4": (unscaled, unscaled, base),  # the live output was taken after an in-place merge
        "5": (x @ in_4_bits.merged.T, beside, x @ in_4_bits.W.T),
    }
