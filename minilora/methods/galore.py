"""GaLore: all weights train, and the optimizer's moments are kept of a projection of their gradients, of rank r.

    G       gradient of a matrix               (rows, columns)
    P       its r leading singular vectors     (r, columns) where rows ≥ columns, else (rows, r)
    R       the projected gradient             (rows, r), or (r, columns)
    M, V    Adam's moments, of R: as small     of R's shape; M̂ and V̂ are corrected for their start at zero
    scale   of the projected steps beside those of what is not projected

        every `refresh` steps   P = the r leading rows, or columns, of G's singular vectors      [GaLore] algorithm 2
        R = G Pᵀ      N = M̂ / (√V̂ + eps)      W ← W − lr · scale · N P                           where rows ≥ columns
        R = Pᵀ G                              W ← W − lr · scale · P N                           elsewhere

The smaller side of the matrix is projected, so P is small too. When P changes, M and V stay as they are, as in the
paper, though they are coordinates in the old one. Adam and its decay are torch.optim.AdamW's: the authors' code adds
eps before it corrects √V for its start, and lets the weights decay after the step. All states are float32, where the
authors keep them in the dtype of the weights.

Not here: one optimizer a layer that steps inside the backward, which saves the gradients too ([GaLore] section 4.3).
Read before this file: nothing.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from minilora.torch_lora.config import is_count


class GaLoreAdamW(Optimizer):
    """AdamW for whole weights, in less memory: what it keeps of a matrix is of rank r.

        W ← (1 − lr · weight_decay) W − lr · scale · project_back(M̂ / (√V̂ + eps))            [GaLore] algorithm 2

    Vectors, and matrices with a side of r or less, of which a projection would save nothing, have plain AdamW; so have
    the parameters of a group with r=None, which for the authors are all but the matrices of attention and MLP:

        GaLoreAdamW([{"params": matrices}, {"params": others, "r": None}], lr=1e-3, r=128)

    Raises:
        ValueError: if a setting is out of its range.

    >>> W = torch.nn.Parameter(torch.ones(64, 128))
    >>> optimizer = GaLoreAdamW([W], lr=0.01, r=4)
    >>> print(optimizer.report())
    1 of 1 tensors projected: 1,024 bytes of projectors and 4,096 of moments; AdamW keeps 65,536, 12.8 times as many
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        r: int | None = 128,
        refresh: int = 200,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, adam | {"r": r, "refresh": refresh, "scale": scale})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters, with settings of their own if they have any.

        Raises:
            ValueError: as GaLoreAdamW.
        """
        check_settings(self.defaults | param_group)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take a step on every parameter that has a gradient; return what `closure` returns.

        Raises, before anything is changed:
            ValueError: if a gradient is sparse, or one of which singular vectors are wanted now is not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(group, p, p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for group, p, gradient in work:
            self._refuse(group, p, gradient)
        for group, p, gradient in work:
            self._update(group, p, gradient.float())
        return loss

    def _update(self, group: dict[str, Any], p: Tensor, G: Float[Tensor, "..."]) -> None:
        state, r = self.state[p], projected_r(p, group["r"])
        if r and is_due(state, group["refresh"]):
            state["P"] = leading_vectors(G, r)
        R = project(G, state["P"]) if r else G
        if not state.keys() & {"M", "V"}:
            state |= {"step": 0, "M": torch.zeros_like(R), "V": torch.zeros_like(R)}
        state["step"] += 1
        N = direction_(R, state["M"], state["V"], state["step"], group["betas"], group["eps"])
        update = group["scale"] * project_back(N, state["P"], p.shape) if r else N
        W = p.float()  # p itself, where it is float32 already
        W.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.mul_(group["lr"]))
        if W is not p:
            p.copy_(W)

    def _refuse(self, group: dict[str, Any], p: Tensor, gradient: Tensor) -> None:
        if gradient.is_sparse:
            raise ValueError("a gradient is sparse: GaLore projects whole ones, choose sparse=False in the embedding")
        wanted = projected_r(p, group["r"]) and is_due(self.state.get(p, {}), group["refresh"])
        if wanted and not torch.isfinite(gradient).all():
            raise ValueError(f"a gradient of shape {tuple(p.shape)} holds NaN or infinite values, and has no SVD")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state_dict, bit for bit. (torch's own would round the states to the dtype of the weights.)

        Raises:
            ValueError: if it does not fit these parameters: all misfits are named, nothing is changed.
        """
        theirs, sizes = state_dict["state"], [len(group["params"]) for group in self.param_groups]
        if (others := [len(group["params"]) for group in state_dict["param_groups"]]) != sizes:
            raise ValueError(f"this state has groups of {others} parameters, the optimizer has {sizes}")
        numbered = [(group, p) for group in self.param_groups for p in group["params"]]
        settings = [group for group in state_dict["param_groups"] for _ in group["params"]]
        problems = []
        for index, (_, p) in enumerate(numbered):
            shapes = state_shapes(p, settings[index]["r"])
            its = {k: tuple(v.shape) for k, v in theirs.get(index, {}).items() if isinstance(v, Tensor)}
            if index in theirs and (its != shapes or "step" not in theirs[index]):
                problems.append(f"parameter {index}: it has {its}, a step and {shapes} are needed")
        if problems:
            raise ValueError("this state does not fit the optimizer:\n  " + "\n  ".join(problems))
        super().load_state_dict(state_dict | {"state": {}})
        for index, its in theirs.items():
            p = numbered[index][1]
            tensors = {k: its[k].to(p.device, torch.float32, copy=True) for k in state_shapes(p, settings[index]["r"])}
            self.state[p] = {"step": int(its["step"]), **tensors}

    def report(self) -> "GaLoreReport":
        """Count the bytes of all states, those that the first step will make too."""
        trained = [(p, group["r"]) for group in self.param_groups for p in group["params"] if p.requires_grad]
        shapes = [state_shapes(p, r) for p, r in trained]
        return GaLoreReport(
            n_tensors=len(trained),
            n_projected=sum("P" in its for its in shapes),
            projector_bytes=sum(4 * torch.Size(its["P"]).numel() for its in shapes if "P" in its),
            moment_bytes=sum(2 * 4 * torch.Size(its["M"]).numel() for its in shapes),
            adamw_bytes=sum(2 * 4 * p.numel() for p, _ in trained),
        )


@dataclass(frozen=True)
class GaLoreReport:
    """Bytes of an optimizer's states, and of those that AdamW would keep in float32 for the same parameters."""

    n_tensors: int
    n_projected: int
    projector_bytes: int
    moment_bytes: int
    adamw_bytes: int

    @property
    def total_bytes(self) -> int:
        """Projectors and moments."""
        return self.projector_bytes + self.moment_bytes

    def __str__(self) -> str:
        return (
            f"{self.n_projected} of {self.n_tensors} tensors projected: {self.projector_bytes:,} bytes of projectors "
            f"and {self.moment_bytes:,} of moments; AdamW keeps {self.adamw_bytes:,}, "
            f"{self.adamw_bytes / max(self.total_bytes, 1):.1f} times as many"
        )


def projects_columns(shape: torch.Size) -> bool:
    """Whether the columns are the smaller side, which is the one projected; in a square matrix they are."""
    return shape[0] >= shape[1]


def leading_vectors(G: Float[Tensor, "rows columns"], r: int) -> Float[Tensor, "_ _"]:
    """P: the r leading right singular vectors of G as rows, (r, columns), or the left ones as columns, (rows, r)."""
    U, _, Vt = torch.linalg.svd(G, full_matrices=False)
    return (Vt[:r] if projects_columns(G.shape) else U[:, :r]).contiguous()  # not a view, which would keep all of it


def project(G: Float[Tensor, "rows columns"], P: Float[Tensor, "_ _"]) -> Float[Tensor, "_ _"]:
    """R = G Pᵀ, or Pᵀ G: the coordinates of G in the subspace."""
    return G @ P.T if projects_columns(G.shape) else P.T @ G


def project_back(N: Float[Tensor, "_ _"], P: Float[Tensor, "_ _"], shape: torch.Size) -> Float[Tensor, "rows columns"]:
    """N P, or P N: the matrix of this shape that has the coordinates N."""
    return N @ P if projects_columns(shape) else P @ N


def direction_(
    R: Float[Tensor, "*s"],
    M: Float[Tensor, "*s"],
    V: Float[Tensor, "*s"],
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> Float[Tensor, "*s"]:
    """Adam's direction at step number `step` (from 1); M and V change in place.

    M ← β₁ M + (1 − β₁) R      V ← β₂ V + (1 − β₂) R²      N = M / (1 − β₁ˢᵗᵉᵖ) / (√(V / (1 − β₂ˢᵗᵉᵖ)) + eps)
    """
    beta1, beta2 = betas
    M.lerp_(R, 1 - beta1)
    V.mul_(beta2).addcmul_(R, R, value=1 - beta2)
    spread = (V / (1 - beta2**step)).sqrt_().add_(eps)  # in place: of a vocabulary's embedding each copy is large
    return (M / (1 - beta1**step)).div_(spread)


def projected_r(p: Tensor, r: int | None) -> int:
    """The rank that a parameter's moments have; 0 for plain AdamW."""
    return r if r is not None and p.ndim == 2 and min(p.shape) > r else 0


def is_due(state: dict[str, Any], refresh: int) -> bool:
    """Whether the coming step begins with a new P: the first, and every `refresh` steps."""
    return state.get("step", 0) % refresh == 0


def state_shapes(p: Tensor, r: int | None) -> dict[str, tuple[int, ...]]:
    """The shapes of a parameter's states."""
    k = projected_r(p, r)
    if not k:
        return {"M": tuple(p.shape), "V": tuple(p.shape)}
    rows, columns = p.shape
    P, R = ((k, columns), (rows, k)) if projects_columns(p.shape) else ((rows, k), (k, columns))
    return {"P": P, "M": R, "V": R}


def check_settings(group: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: if a setting of this group is out of its range (says which).
    """
    betas = group["betas"]
    ranges = {
        "lr": group["lr"] >= 0,
        "r": group["r"] is None or is_count(group["r"]),
        "refresh": is_count(group["refresh"]),
        "scale": group["scale"] > 0,
        "betas": len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
        "eps": group["eps"] > 0,
        "weight_decay": group["weight_decay"] >= 0,
    }
    wrong = [f"{name} = {group[name]}" for name, fits in ranges.items() if not fits]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)}: lr and weight_decay are 0 or more, scale and eps above 0, betas from 0 and below 1, "
            "r and refresh whole numbers of 1 or more (r may be None: plain AdamW)"
        )
