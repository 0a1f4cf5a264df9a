"""Sums of adapters, each with its error: exact by concatenation, best of a rank by SVD, and PEFT's "linear".

    i, w_i         one of several adapters, and its weight in the sum: any finite number, also a negative one
    S (out, in)    the sum that is meant, of one layer:  S = Σ_i w_i · s_i · B_i A_i,  s_i the adapter's own scaling
    A, B           what stands for S afterwards, with a scaling of 1
    error          ‖B A − S‖ / ‖S‖, Frobenius norms, of A and B as stored in float32

No (out, in) matrix is made: where R is the sum of the ranks, everything happens in (out, R), (R, in) and (R, R), in
float64. A layer that an adapter leaves alone adds nothing there.

    adapters = []
    for folder in folders:
        load_adapter(model, folder)
        adapters.append(updates_of(model))
        remove(model)
    combined = svd(adapters, [0.7, -0.3], r=16)
    print(combined.report)
    set_updates(model, combined.updates)       # an adapter like any other: save_adapter writes it

TIES and DARE are in ties_dare. Read before this file: updates; numpy_lora/rank says what the SVD promises.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from minilora.torch_lora.updates import Adapter, Update

ROUNDING = 4 * torch.finfo(torch.float64).eps  # measured, of sums that cancel: below 1 eps of ‖B‖ ‖A‖


@dataclass(frozen=True)
class Distance:
    """How far what was made is from a matrix that was meant, in Frobenius norms."""

    error: float  # ‖made − meant‖
    norm: float  # ‖meant‖

    @property
    def relative(self) -> float:
        """error / norm: 0 is exact, 1 is as far off as nothing at all. Where nothing was meant, 0 or infinity."""
        if self.norm == 0:
            return math.inf if self.error else 0.0
        return self.error / self.norm


@dataclass(frozen=True)
class LayerReport:
    """One layer: its new rank, and how far B A is from the sum and from what its method means to give.

    The two differ for TIES and DARE alone, which mean another matrix than the sum.
    """

    r: int
    from_sum: Distance
    from_meant: Distance


@dataclass(frozen=True)
class ErrorReport:
    """The errors of a method, layer by layer; prints as a table."""

    method: str
    layers: dict[str, LayerReport]

    @property
    def from_sum(self) -> Distance:
        """Of all layers as one matrix, from the weighted sum."""
        return overall([layer.from_sum for layer in self.layers.values()])

    @property
    def from_meant(self) -> Distance:
        """Of all layers as one matrix, from what the method means to give."""
        return overall([layer.from_meant for layer in self.layers.values()])

    def __str__(self) -> str:
        rows = {name: (str(y.r), y.from_sum, y.from_meant) for name, y in self.layers.items()}
        rows["all layers"] = ("", self.from_sum, self.from_meant)
        width = max(map(len, [*rows, self.method]))
        lines = [f"{self.method:<{width}}     r     ‖sum‖  from the sum  from what it means"]
        for name, (r, off, own) in rows.items():
            lines.append(f"{name:<{width}} {r:>5} {off.norm:>9.3e} {off.relative:>13.2e} {own.relative:>19.2e}")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Combined:
    """What several adapters became: one update for each layer, all of scaling 1, and how far they are from the sum."""

    updates: dict[str, Update]
    report: ErrorReport


def cat(adapters: Sequence[Adapter], weights: Sequence[float]) -> Combined:
    """Concatenate: the sum itself, at the price of rank R = Σ r_i.

        A = [A_1; A_2; …],  B = [w_1 s_1 B_1, w_2 s_2 B_2, …]        so that  B A = Σ w_i s_i B_i A_i

    Weight and scaling go into B whole, sign and all: A keeps its bits, no root is taken, and each number of B is
    rounded once. Where w_i s_i is a power of two, nothing is rounded at all.

    Raises:
        ValueError: if there are no adapters, or not as many weights, or shapes, weights or values are impossible (all
            of them at once).
    """
    stacks = stacked(adapters, weights)
    return combine("cat", stacks, stacks)


def svd(adapters: Sequence[Adapter], weights: Sequence[float], r: int) -> Combined:
    """Give the best update of rank r, from the factors alone.

        B_R = Q_B T_B,  A_Rᵀ = Q_A T_A,  T_B T_Aᵀ = U Σ Vᵀ     (T is triangular, U Σ Vᵀ is R × R)
        B = Q_B U_r √Σ_r,  A = √Σ_r V_rᵀ Q_Aᵀ                  with B_R, A_R those of cat

    The singular values are those of S, so no update of rank r is nearer: ‖B A − S‖² = Σ_{i > r} σᵢ² (Eckart and Young
    1936), to the rounding of A and B. Where S has fewer than r singular values, r is their number.

    Raises:
        ValueError: if r is below 1; else as `cat`.
    """
    check_rank(r)
    stacks = stacked(adapters, weights)
    return combine(f"svd, r={r}", {name: truncated(B, A, r) for name, (B, A) in stacks.items()}, stacks)


def linear(adapters: Sequence[Adapter], weights: Sequence[float]) -> Combined:
    """Add the As and the Bs apart, as PEFT's "linear" does: not the sum of the updates. To be compared, not to be used.

        B A = (Σ √|c_i| B_i) (Σ ±√|c_i| A_i),  c_i = w_i s_i

    Multiplied out this is the sum and the cross-terms √|c_i c_j| B_i A_j of adapters that were never trained together;
    for two unrelated adapters they are as large as the sum itself: an error of about 1. It keeps the rank, as `svd`
    with the same r does, which is never worse.

    Raises:
        ValueError: if a layer's ranks differ; else as `cat`.
    """
    stacks = stacked(adapters, weights)
    ranks = {name: [adapter[name].r for adapter in adapters if name in adapter] for name in stacks}
    if uneven := [f"{name}: ranks {found}" for name, found in ranks.items() if len(set(found)) > 1]:
        raise ValueError("matrices of different ranks cannot be added; svd can:\n  " + "\n  ".join(uneven))
    made = {}
    for name in stacks:
        terms = [(w * a[name].scaling, a[name]) for a, w in zip(adapters, weights, strict=True) if name in a]
        B = torch.stack([math.sqrt(abs(c)) * _double(update.B) for c, update in terms]).sum(dim=0)
        A = torch.stack([math.copysign(math.sqrt(abs(c)), c) * _double(update.A) for c, update in terms]).sum(dim=0)
        made[name] = (B, A)
    return combine("linear", made, stacks)


def stacked(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, tuple[Tensor, Tensor]]:
    """B and A whose product is S, of every layer that any adapter has; checked, in float64.

    Raises:
        ValueError: as `cat`.
    """
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights: give one weight for each adapter")
    problems = [
        f"weight {i} is {w}: a finite number that float32 holds is needed"
        for i, w in enumerate(weights)
        if not abs(w) <= torch.finfo(torch.float32).max
    ]
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter))
    for name in names:
        found = [adapter[name] for adapter in adapters if name in adapter]
        shapes = {(update.B.shape[0], update.A.shape[1]) for update in found}
        if len(shapes) > 1:
            problems.append(f"{name}: updates of shapes {sorted(shapes)}: these adapters are of different models")
        if not all(torch.isfinite(y.A).all() and torch.isfinite(y.B).all() for y in found):
            problems.append(f"{name}: holds NaN or infinite values")
    if problems or not names:
        raise ValueError("these adapters have no sum:\n  " + "\n  ".join(problems or ["they have no layers"]))
    pairs = list(zip(adapters, weights, strict=True))
    stacks = {
        name: (
            torch.cat([w * a[name].scaling * _double(a[name].B) for a, w in pairs if name in a], dim=1),
            torch.cat([_double(a[name].A) for a, _ in pairs if name in a], dim=0),
        )
        for name in names
    }
    if large := [name for name, (B, _) in stacks.items() if not B.float().isfinite().all()]:
        raise ValueError(f"weight · scaling · B is more than float32 holds in {large}: choose smaller weights")
    return stacks


def truncated(B: Float[Tensor, "out R"], A: Float[Tensor, "R in"], r: int) -> tuple[Tensor, Tensor]:
    """The nearest product of rank r (or of the full rank, where that is smaller) to B A: see `svd`."""
    Q_B, T_B = torch.linalg.qr(B)
    Q_A, T_A = torch.linalg.qr(A.T)
    U, sigma, Vt = torch.linalg.svd(T_B @ T_A.T, full_matrices=False)
    root = sigma[:r].sqrt()
    return Q_B @ (U[:, :r] * root), (root[:, None] * Vt[:r]) @ Q_A.T


def product_norm(B: Float[Tensor, "out R"], A: Float[Tensor, "R in"]) -> float:
    """‖B A‖ from the factors: the orthogonal parts of their QR change no norm.

    ‖B A‖² = trace((BᵀB)(A Aᵀ)) costs half as much, but squares what cancels in a difference: half of the digits. What
    is less than the rounding of the terms counts as 0: of an adapter minus itself nothing but that is left.
    """
    T_B, T_A = torch.linalg.qr(B, mode="r").R, torch.linalg.qr(A.T, mode="r").R
    norm, terms = torch.linalg.matrix_norm(T_B @ T_A.T).item(), (T_B.norm() * T_A.norm()).item()
    return norm if norm > ROUNDING * terms else 0.0


def combine(method: str, made: dict[str, tuple[Tensor, Tensor]], stacks: dict[str, tuple[Tensor, Tensor]]) -> Combined:
    """Store B and A of every layer in float32, and measure how far what is stored is from the sum."""
    updates = {name: Update(A.float().contiguous(), B.float().contiguous()) for name, (B, A) in made.items()}
    layers = {}
    for name, update in updates.items():
        off = distance_from_sum(update, *stacks[name])
        layers[name] = LayerReport(update.r, off, off)
    return Combined(updates, ErrorReport(method, layers))


def distance_from_sum(update: Update, B: Float[Tensor, "out R"], A: Float[Tensor, "R in"]) -> Distance:
    """How far an update of scaling 1 is from B A."""
    difference = torch.cat([_double(update.B), -B], dim=1), torch.cat([_double(update.A), A], dim=0)
    return Distance(product_norm(*difference), product_norm(B, A))


def overall(distances: Sequence[Distance]) -> Distance:
    """The distance of several matrices taken as one."""
    return Distance(math.hypot(*(d.error for d in distances)), math.hypot(*(d.norm for d in distances)))


def check_rank(r: int) -> None:
    """
    Raises:
        ValueError: if r is no rank.
    """
    if not isinstance(r, int) or r < 1:
        raise ValueError(f"r is {r}: it counts the rows of the new A, so it must be a whole number of 1 or more")


def _double(matrix: Tensor) -> Tensor:
    return matrix.detach().to("cpu", torch.float64)
