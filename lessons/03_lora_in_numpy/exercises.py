"""Lesson 03: the forward pass, its three gradients, and a training loop, with the mistakes that learners make in each.

The inputs are generic on purpose: in ≠ out, r ≠ alpha, B ≠ 0. With r = alpha a forgotten alpha / r could not be seen,
with B = 0 most mistakes in the bypass could not.
"""

import functools
from collections.abc import Callable, Iterator

import numpy as np
from numpy import ndarray

from minilora.classroom.exercises import Bug, Case, Exercise, Property
from minilora.classroom.instrumented import watch
from minilora.numpy_lora.forward import delta_weight, lora_backward, lora_forward, lora_init

# ------------------------------------------------------------------------------------------------------- 03.1 forward


def forward_inputs(rng: np.random.Generator) -> Case:
    """Five rows through a 12 → 7 layer with a rank-3 adapter that has already learned something."""
    return {
        "x": rng.normal(size=(5, 12)),
        "W": rng.normal(size=(7, 12)),
        "A": rng.normal(size=(3, 12)),
        "B": rng.normal(size=(7, 3)),
        "alpha": 8.0,
    }


def changes_nothing_at_zero(function: Callable, case: Case) -> str | None:
    """At B = 0 the layer is the frozen layer."""
    h = function(case["x"], case["W"], case["A"], np.zeros_like(case["B"]), case["alpha"])
    away, largest = np.max(np.abs(h - case["x"] @ case["W"].T)), np.max(np.abs(h))
    return None if away <= 1e-5 * largest else f"with B = 0 the output is up to {away:.3g} away from x Wᵀ"


def takes_sequences(function: Callable, case: Case) -> str | None:
    """An input (batch, seq, in) gives (batch, seq, out), row for row."""
    stacked = np.stack([case["x"], 2 * case["x"]])
    h = function(stacked, *list(case.values())[1:])
    rows = np.stack([function(one, *list(case.values())[1:]) for one in stacked])
    if np.shape(h) != rows.shape:
        return f"for x {stacked.shape} the output has shape {np.shape(h)}, expected {rows.shape}"
    is_close = np.max(np.abs(h - rows)) <= 1e-5 * np.max(np.abs(rows))
    return None if is_close else "a row's output depends on the other rows"


def never_forms_the_product(function: Callable, case: Case) -> str | None:
    """No array with the shape of W is ever made."""
    (x, W, A, B), log = watch(case["x"], case["W"], case["A"], case["B"])
    function(x, W, A, B, case["alpha"])
    made_by = log.forms(*case["W"].shape)
    return made_by and f"np.{made_by} made an array as large as W, {case['W'].shape}: in a real layer that is 64 MiB"


FORWARD = Exercise(
    id="03.1",
    title="The forward pass",
    asks="lora_forward(x, W, A, B, alpha) returns h = x Wᵀ + (alpha / r) · (x Aᵀ) Bᵀ, and makes no array like W",
    points=2,
    minutes=8,
    difficulty=1,
    importance=3,
    reference=lora_forward,
    generate=forward_inputs,
    properties=(
        Property(name="at B = 0 it changes nothing", test=changes_nothing_at_zero),
        Property(name="a batch of sequences works like its rows", test=takes_sequences),
        Property(name="it never makes an array as large as W", test=never_forms_the_product),
    ),
    hints=(
        "Write the shapes under the letters: x (n, in), W (out, in), A (r, in), B (out, r). The result is (n, out).",
        "Two roads, added: the highway x @ W.T, and the bypass, which goes from in to r to out. A is met first.",
        "r is not given: it is the number of rows of A. The bypass, and only the bypass, is multiplied by alpha / r.",
    ),
    bugs=(
        Bug(
            name="no scaling",
            function=lambda x, W, A, B, alpha: x @ W.T + (x @ A.T) @ B.T,
            why="You left out alpha / r: alpha has no effect at all.",
            link="5 · Derivation",
        ),
        Bug(
            name="alpha alone",
            function=lambda x, W, A, B, alpha: x @ W.T + alpha * (x @ A.T) @ B.T,
            why="You scaled by alpha; the factor is alpha / r, so that the bypass does not grow louder with r.",
            link="5 · Derivation",
        ),
        Bug(
            name="upside down",
            function=lambda x, W, A, B, alpha: x @ W.T + (len(A) / alpha) * (x @ A.T) @ B.T,
            why="You scaled by r / alpha; the factor is alpha / r.",
        ),
        Bug(
            name="root of r",
            function=lambda x, W, A, B, alpha: x @ W.T + (alpha / np.sqrt(len(A))) * (x @ A.T) @ B.T,
            why="You scaled by alpha / √r, which is rsLoRA's factor; LoRA's is alpha / r.",
        ),
        Bug(
            name="r read from the wrong side",
            function=lambda x, W, A, B, alpha: x @ W.T + (alpha / A.shape[1]) * (x @ A.T) @ B.T,
            why="You divided by the number of columns of A, which is in; r is its number of rows.",
        ),
        Bug(
            name="r read from B's rows",
            function=lambda x, W, A, B, alpha: x @ W.T + (alpha / B.shape[0]) * (x @ A.T) @ B.T,
            why="You divided by the number of rows of B, which is out; r is its number of columns, and of A's rows.",
        ),
        Bug(
            name="the highway scaled too",
            function=lambda x, W, A, B, alpha: (alpha / len(A)) * (x @ W.T + (x @ A.T) @ B.T),
            why="You scaled the whole sum: the frozen layer must come through as it was.",
        ),
        Bug(
            name="scaled twice",
            function=lambda x, W, A, B, alpha: x @ W.T + (alpha / len(A)) ** 2 * (x @ A.T) @ B.T,
            why="You applied alpha / r in both halves of the bypass, so it counts squared.",
        ),
        Bug(
            name="no highway",
            function=lambda x, W, A, B, alpha: (alpha / len(A)) * (x @ A.T) @ B.T,
            why="You returned the bypass alone: x Wᵀ is missing.",
            link="4 · The one picture",
        ),
        Bug(
            name="B A formed first",
            function=lambda x, W, A, B, alpha: x @ W.T + (alpha / len(A)) * x @ (B @ A).T,
            why="The numbers are right, but B @ A is as large as W: use (x @ A.T) @ B.T.",
            link="4 · The one picture",
        ),
        Bug(
            name="W not transposed",
            function=lambda x, W, A, B, alpha: x @ W + (alpha / len(A)) * (x @ A.T) @ B.T,
            why="W is (out, in), as in nn.Linear: the product is x @ W.T. With a square W this mistake runs, silently.",
        ),
        Bug(
            name="A not transposed",
            function=lambda x, W, A, B, alpha: x @ W.T + (alpha / len(A)) * (x @ A) @ B,
            why="A is (r, in): x meets it as x @ A.T.",
        ),
    ),
)

# ------------------------------------------------------------------------------------------------------ 03.2 backward


def backward_inputs(rng: np.random.Generator) -> Case:
    """The same layer, and a gradient that comes back from above."""
    case = forward_inputs(rng)
    return {"dy": rng.normal(size=(5, 7)), **case}


def central_differences(case: Case, step: float = 1.0) -> Iterator[tuple[str, ndarray]]:
    """∂loss/∂x, ∂loss/∂A, ∂loss/∂B for loss = Σ dy · h, entry by entry: (loss(+step) − loss(−step)) / 2 step.

    A step of 1 is not too long: the loss is a straight line along every single entry, so the difference is exact.
    """
    for name in ("x", "A", "B"):
        gradient = np.zeros_like(case[name])
        for at in np.ndindex(gradient.shape):
            losses = []
            for sign in (1, -1):
                moved = {key: np.array(case[key]) for key in ("x", "W", "A", "B")}
                moved[name][at] += sign * step
                losses.append(np.sum(case["dy"] * lora_forward(**moved, alpha=case["alpha"])))
            gradient[at] = (losses[0] - losses[1]) / (2 * step)
        yield f"d{name}", gradient


def agrees_with_differences(function: Callable, case: Case) -> str | None:
    """dx, dA and dB beside the differences, as `cmp`: exact, approximately, largest difference."""
    gradients = function(*case.values())
    if not isinstance(gradients, (tuple, list)) or len(gradients) != 3:
        count = f"{len(gradients)} values" if isinstance(gradients, (tuple, list)) else f"a {type(gradients).__name__}"
        return f"{count}; expected three arrays: dx, dA, dB"
    lines, is_right = [], True
    for (name, want), got in zip(central_differences(case), gradients, strict=True):
        if np.shape(got) != want.shape:
            lines.append(f"{name}  has shape {np.shape(got)}, expected {want.shape}")
            is_right = False
            continue
        furthest = float(np.max(np.abs(want - got)))
        is_close = furthest <= 1e-5 * np.max(np.abs(want))
        is_right = is_right and is_close
        exact, close = "yes" if np.array_equal(want, got) else "no ", "yes" if is_close else "NO "
        lines.append(f"{name}  exact: {exact}  approximate: {close}  maxdiff: {furthest:.2g}")
    return None if is_right else "\n".join(lines)


def only_B_moves_first(function: Callable, case: Case) -> str | None:
    """At B = 0: dA is exactly zero, dB is not."""
    start = {**case, "B": np.zeros_like(case["B"])}
    _, dA, dB = function(*start.values())
    if np.any(dA):
        return f"with B = 0 the gradient of A reaches {np.max(np.abs(dA)):.3g}; it must be exactly 0"
    return None if np.any(dB) else "with B = 0 the gradient of B is 0 everywhere: nothing would ever learn"


def backward_never_forms_the_product(function: Callable, case: Case) -> str | None:
    """No array with the shape of W is ever made: not B A, and not a gradient for the frozen W."""
    (dy, x, W, A, B), log = watch(*(case[name] for name in ("dy", "x", "W", "A", "B")))
    function(dy, x, W, A, B, case["alpha"])
    made_by = log.forms(*case["W"].shape)
    return made_by and f"np.{made_by} made an array as large as W, {case['W'].shape}: W is frozen and needs no gradient"


def _with(change: Callable[..., tuple]) -> Callable:
    """A wrong lora_backward: `change` gets the right dx, dA, dB, the scaling s and the inputs."""

    def wrong(dy: ndarray, x: ndarray, W: ndarray, A: ndarray, B: ndarray, alpha: float) -> tuple:
        dx, dA, dB = lora_backward(dy, x, W, A, B, alpha)
        return change(dx, dA, dB, s=alpha / len(A), dy=dy, x=x, W=W, A=A, B=B)

    return wrong


BACKWARD = Exercise(
    id="03.2",
    title="The gradients by hand",
    asks="lora_backward(dy, x, W, A, B, alpha) returns dx, dA, dB",
    points=4,
    minutes=15,
    difficulty=2,
    importance=3,
    reference=lora_backward,
    generate=backward_inputs,
    tolerance=None,
    outputs=("dx", "dA", "dB"),
    properties=(
        Property(name="dx, dA and dB agree with central differences", test=agrees_with_differences),
        Property(name="at B = 0 the gradient of A is exactly 0 and that of B is not", test=only_B_moves_first),
        Property(name="it never makes an array as large as W", test=backward_never_forms_the_product),
    ),
    hints=(
        "Name the narrow middle: u = x Aᵀ, of shape (n, r). Then h = x Wᵀ + s · u Bᵀ with s = alpha / r.",
        "First du, of shape (n, r): what reaches the middle from above. It is made of dy (n, out), B (out, r) and s.",
        "dB is (out, r): from dy and u. dA is (r, in): from du and x. In both, the rows of the batch are summed away.",
        "x feeds both roads, so dx is a sum of two: dy W from the highway, du A from the bypass.",
    ),
    bugs=(
        Bug(
            name="no bypass in dx",
            function=_with(lambda dx, dA, dB, *, s, dy, x, W, A, B: (dy @ W, dA, dB)),
            why="x feeds both roads, so dx = dy W + du A; you kept the first term. One layer alone still trains.",
            link="8 · Break it",
        ),
        Bug(
            name="no highway in dx",
            function=_with(lambda dx, dA, dB, *, s, dy, x, W, A, B: (s * dy @ B @ A, dA, dB)),
            why="W is frozen, but the gradient still passes through it to the layers below: dx = dy W + du A.",
            link="5 · Derivation",
        ),
        Bug(
            name="no scaling",
            function=_with(lambda dx, dA, dB, *, s, dy, x, W, A, B: (dy @ W + dy @ B @ A, dA / s, dB / s)),
            why="You left out alpha / r everywhere: it multiplies the bypass, so it multiplies du and dB.",
            link="5 · Derivation",
        ),
        Bug(
            name="no scaling in dB",
            function=_with(lambda dx, dA, dB, *, s, dy, x, W, A, B: (dx, dA, dB / s)),
            why="dB = s · dyᵀ u: you left the factor alpha / r out of dB.",
        ),
        Bug(
            name="no scaling in dA",
            function=_with(lambda dx, dA, dB, *, s, dy, x, W, A, B: (dx, dA / s, dB)),
            why="dA = duᵀ x with du = s · dy B: you left the factor alpha / r out of dA.",
        ),
        Bug(
            name="no scaling in dx",
            function=_with(lambda dx, dA, dB, *, s, dy, x, W, A, B: (dy @ W + dy @ B @ A, dA, dB)),
            why="dx = dy W + du A with du = s · dy B: you left the factor alpha / r out of dx.",
        ),
        Bug(
            name="scaled twice",
            function=_with(lambda dx, dA, dB, *, s, dy, x, W, A, B: (dy @ W + s**2 * dy @ B @ A, s * dA, dB)),
            why="du = s · dy B carries alpha / r already; you multiplied by it again in dA and in dx.",
        ),
        Bug(
            name="B transposed in du",
            function=_with(lambda dx, dA, dB, *, s, dy, x, W, A, B: dy @ B.T),
            why="dy is (n, out) and B is (out, r): du, of shape (n, r), is s · dy B, without a transpose.",
            link="5 · Derivation",
        ),
        Bug(
            name="mean over the rows",
            function=_with(lambda dx, dA, dB, *, s, dy, x, W, A, B: (dx, dA / len(x), dB / len(x))),
            why="You averaged over the rows. Where the loss is a mean, dy carries the 1 / n already: rows are summed.",
        ),
        Bug(
            name="A and B transposed",
            function=_with(lambda dx, dA, dB, *, s, dy, x, W, A, B: (dx, dA.T, dB.T)),
            why="dA and dB came back transposed: a gradient has the shape of what it is the gradient of.",
        ),
        Bug(
            name="order of the answers",
            function=_with(lambda dx, dA, dB, *, s, dy, x, W, A, B: (dA, dB, dx)),
            why="You returned dA, dB, dx; asked for are dx, dA, dB.",
        ),
        Bug(
            name="a gradient for W",
            function=_with(lambda dx, dA, dB, *, s, dy, x, W, A, B: (dx, dA, dB, dy.T @ x)),
            why="W is frozen: computing its gradient costs more than everything else together, for nothing.",
        ),
    ),
)

# ------------------------------------------------------------------------------------------------------- 03.3 training


def train(
    batches: list, W: ndarray, A: ndarray, B: ndarray, alpha: float, lr: float, backward: Callable = lora_backward
) -> tuple[ndarray, ndarray]:
    """Fit A and B by stochastic gradient descent on ½ ‖h − y‖², averaged over the rows of a batch. W stays as it is.

    >>> case = training_inputs(np.random.default_rng(0))
    >>> recovers_the_update(train, case) is None
    True
    """
    for x, y in batches:
        dy = (lora_forward(x, W, A, B, alpha) - y) / len(x)
        _, dA, dB = backward(dy, x, W, A, B, alpha)
        A, B = A - lr * dA, B - lr * dB
    return A, B


def planted_update(rng: np.random.Generator, out_features: int, in_features: int) -> ndarray:
    """A random update with exactly three singular values: 3, 2 and 1."""
    left, _ = np.linalg.qr(rng.normal(size=(out_features, 3)))
    right, _ = np.linalg.qr(rng.normal(size=(in_features, 3)))
    return left * [3.0, 2.0, 1.0] @ right.T


def training_inputs(rng: np.random.Generator, r: int = 3, steps: int = 250) -> Case:
    """Batches of a teacher W + ΔW without noise, the frozen W, and a new adapter. ΔW itself is under "planted"."""
    in_features, out_features = 16, 12
    W = rng.normal(size=(out_features, in_features)) / np.sqrt(in_features)
    planted = planted_update(rng, out_features, in_features)
    inputs = rng.normal(size=(steps, 32, in_features))
    A, B = lora_init(r, in_features, out_features, rng)
    batches = [(x, x @ (W + planted).T) for x in inputs]
    return {"batches": batches, "W": W, "A": A, "B": B, "alpha": 6.0, "lr": 0.05, "planted": planted}


def first_steps(function: Callable, case: Case) -> tuple[ndarray, ndarray]:
    """Where A and B stand after five batches: there a mistake shows its own hand, before it has run off to infinity."""
    return trained(function, {**case, "batches": case["batches"][:5]})


def trained(function: Callable, case: Case) -> tuple[ndarray, ndarray]:
    """Run a training function on a case; it does not get to see what was planted."""
    return function(*(case[name] for name in ("batches", "W", "A", "B", "alpha", "lr")))


def recovers_the_update(function: Callable, case: Case) -> str | None:
    """‖(alpha / r) B A − planted‖ ≤ 10⁻³ ‖planted‖."""
    A, B = trained(function, case)
    if not (np.isfinite(A).all() and np.isfinite(B).all()):
        return "the training ran off: A or B holds NaN or infinite values"
    error = np.linalg.norm(delta_weight(A, B, case["alpha"]) - case["planted"]) / np.linalg.norm(case["planted"])
    return None if error <= 1e-3 else f"after training, B A is {error:.2g} of the planted update away from it"


def takes_these_steps(function: Callable, case: Case) -> str | None:
    """After five batches A and B stand where plain SGD on this loss leads, to 10⁻⁶ of the largest entry."""
    for name, got, want in zip("AB", first_steps(function, case), first_steps(train, case), strict=True):
        away, largest = np.max(np.abs(got - want)), np.max(np.abs(want))
        if not away <= 1e-6 * largest:
            return f"after five batches {name} is off by up to {away:.2g}, where entries reach {largest:.2g}"
    return None


def both_move(function: Callable, case: Case) -> str | None:
    """A and B both end elsewhere than they began."""
    A, B = trained(function, case)
    still = [name for name, end in (("A", A), ("B", B)) if np.array_equal(end, case[name])]
    return f"{' and '.join(still)} did not move" if still else None


def _training(
    direction: float = -1.0,
    moves_A: bool = True,
    per: Callable = len,
    only: int | None = None,
    restarts: bool = False,
    in_turn: bool = False,
) -> Callable:
    """A wrong `train` that differs from the right one in one of these."""

    def wrong(batches: list, W: ndarray, A: ndarray, B: ndarray, alpha: float, lr: float) -> tuple[ndarray, ndarray]:
        begin_A, begin_B = A, B
        for x, y in batches[:only]:
            dy = (lora_forward(x, W, A, B, alpha) - y) / per(y)
            _, dA, dB = lora_backward(dy, x, W, A, B, alpha)
            start_A, start_B = (begin_A, begin_B) if restarts else (A, B)
            A = start_A + direction * lr * dA if moves_A else A
            if in_turn:
                _, _, dB = lora_backward(dy, x, W, A, B, alpha)
            B = start_B + direction * lr * dB
        return A, B

    return wrong


TRAINING = Exercise(
    id="03.3",
    title="Learn the planted update",
    asks="train(batches, W, A, B, alpha, lr) returns A and B after one SGD step for each (x, y) in batches",
    points=3,
    minutes=12,
    difficulty=2,
    importance=2,
    reference=train,
    generate=training_inputs,
    observe=first_steps,
    outputs=("A", "B"),
    tolerance=None,
    properties=(
        Property(name="A and B both move", test=both_move),
        Property(name="the planted rank-3 update is recovered to 1e-3", test=recovers_the_update),
        Property(name="each step is one of SGD on ½ ‖h − y‖², averaged over the rows", test=takes_these_steps),
    ),
    hints=(
        "One step: run forward, turn the error into dy, run backward, move A and B a little against their gradients.",
        "The loss is ½ ‖h − y‖² averaged over the rows, so dy = (h − y) / len(x).",
        "Write A = A - lr * dA, not A -= lr * dA: the second changes the caller's array.",
    ),
    bugs=(
        Bug(
            name="uphill",
            function=_training(direction=1.0),
            why="You added the gradient; to make the loss smaller, subtract it.",
            link="8 · Break it",
        ),
        Bug(
            name="only B is trained",
            function=_training(moves_A=False),
            why="A stayed as it was drawn: B can then only reach updates whose rows A happens to span.",
            link="8 · Break it",
        ),
        Bug(
            name="summed over the rows",
            function=_training(per=lambda y: 1),
            why="You did not divide by the number of rows: the step is 32 times as long as lr says.",
            link="8 · Break it",
        ),
        Bug(
            name="factor 2",
            function=_training(per=lambda y: len(y) / 2),
            why="The loss has a ½ in front, which the square's 2 cancels: dy = (h − y) / n. Yours is twice as long.",
        ),
        Bug(
            name="mean over all entries",
            function=_training(per=np.size),
            why="You divided by all entries of h, rows times columns; the loss is averaged over the rows only.",
        ),
        Bug(
            name="A before B",
            function=_training(in_turn=True),
            why="You moved A, then took B's gradient with the new A: both gradients belong to where the step began.",
        ),
        Bug(
            name="one batch only",
            function=_training(only=1),
            why="You returned after the first batch: is the `return` inside the loop?",
        ),
        Bug(
            name="each step from the start",
            function=_training(restarts=True),
            why="Every step started again from the first A and B instead of the last ones.",
        ),
    ),
)

# --------------------------------------------------------------------------------------- section 8: which bug is this?

PATIENTS = {
    "1": ("03.3", "summed over the rows"),
    "2": ("03.3", "only B is trained"),
    "3": ("03.2", "no scaling"),
    "4": ("03.2", "no bypass in dx"),
}


def patients() -> dict[str, Callable]:
    """The training function of each patient: a catalogued bug, or the right one over a catalogued bug's gradients."""
    return {
        name: TRAINING.bug(bug) if exercise_id == TRAINING.id else functools.partial(train, backward=BACKWARD.bug(bug))
        for name, (exercise_id, bug) in PATIENTS.items()
    }


EXERCISES = [FORWARD, BACKWARD, TRAINING]
