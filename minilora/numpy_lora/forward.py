"""LoRA as plain arithmetic: forward, gradients and merge, on NumPy arrays.

    W  frozen weight             (out, in)
    A  down-projection           (r, in)      small random numbers at the start
    B  up-projection             (out, r)     zeros at the start, so training begins at W

`B` is always this matrix. The batch axes are written `*n`, never B; they may be none, one or many.

What is left out: the bias (LoRA does not touch it), dropout and rsLoRA. They are in torch_lora/layers.
Read before this file: nothing. Read after it: torch_lora/layers, which is tested against it.
"""

import math

import numpy as np
from jaxtyping import Float
from numpy import ndarray


def lora_init(
    r: int, in_features: int, out_features: int, rng: np.random.Generator
) -> tuple[Float[ndarray, "r in"], Float[ndarray, "out r"]]:
    """Draw A and B of a new adapter.

        A ~ U(−1/√in, 1/√in),  B = 0        Kaiming's uniform rule with a = √5: [Kaiming] eq. 14

    The paper says Gaussian for A; its authors' code, PEFT and we draw from the uniform distribution.
    B = 0 makes B A = 0: a new adapter changes nothing.

    Raises:
        ValueError: if `r` or a number of features is below 1.

    >>> A, B = lora_init(2, 6, 4, np.random.default_rng(0))
    >>> A.shape, B.shape, bool(np.any(B))
    ((2, 6), (4, 2), False)
    """
    for name, value in {"r": r, "in_features": in_features, "out_features": out_features}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}: it counts rows or columns of A and B, so it must be 1 or more")
    bound = 1 / math.sqrt(in_features)
    return rng.uniform(-bound, bound, size=(r, in_features)), np.zeros((out_features, r))


def lora_forward(
    x: Float[ndarray, "*n in"],
    W: Float[ndarray, "out in"],
    A: Float[ndarray, "r in"],
    B: Float[ndarray, "out r"],
    alpha: float,
) -> Float[ndarray, "*n out"]:
    """Add the low-rank bypass to the frozen layer.

        h = x Wᵀ + (alpha / r) · (x Aᵀ) Bᵀ             [LoRA] eq. 3

    The brackets matter: (x Aᵀ) Bᵀ costs r·(in + out) multiplications a row, while forming
    B A first costs r·in·out once and then in·out a row.

    >>> x, W = np.ones((1, 3)), np.zeros((2, 3))
    >>> A, B = np.ones((1, 3)), np.array([[1.0], [2.0]])
    >>> lora_forward(x, W, A, B, alpha=1.0)
    array([[3., 6.]])
    """
    r = len(A)
    return x @ W.T + (alpha / r) * (x @ A.T) @ B.T


def lora_backward(
    dy: Float[ndarray, "*n out"],
    x: Float[ndarray, "*n in"],
    W: Float[ndarray, "out in"],
    A: Float[ndarray, "r in"],
    B: Float[ndarray, "out r"],
    alpha: float,
) -> tuple[Float[ndarray, "*n in"], Float[ndarray, "r in"], Float[ndarray, "out r"]]:
    """Turn the gradient of the output, dy = ∂loss/∂h, into dx, dA and dB. W is frozen and gets none.

        with  u = x Aᵀ  and  s = alpha / r,  h = x Wᵀ + s · u Bᵀ,  so

        du = s · dy B
        dB = s · dyᵀ u          rows of the batch are summed
        dA = duᵀ x              rows of the batch are summed
        dx = dy W + du A

    Where B = 0, du = 0 and so dA = 0: the first step of training moves only B.
    Nothing here is as large as W: the largest new array is dx.
    """
    s = alpha / len(A)
    rows_x, rows_dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    u = rows_x @ A.T  # (rows, r)
    du = s * rows_dy @ B  # (rows, r)
    dA = du.T @ rows_x
    dB = s * rows_dy.T @ u
    dx = rows_dy @ W + du @ A
    return dx.reshape(x.shape), dA, dB


def delta_weight(A: Float[ndarray, "r in"], B: Float[ndarray, "out r"], alpha: float) -> Float[ndarray, "out in"]:
    """Form the update that the adapter stands for.

        ΔW = (alpha / r) · B A                         [LoRA] section 4.1

    Its rank is at most r, whatever the training did.
    """
    return (alpha / len(A)) * B @ A


def merge(
    W: Float[ndarray, "out in"], A: Float[ndarray, "r in"], B: Float[ndarray, "out r"], alpha: float
) -> Float[ndarray, "out in"]:
    """Fold the adapter into a new weight; the layer is then one product again, as fast as before.

        W′ = W + ΔW,  so  x W′ᵀ = lora_forward(x, W, A, B, alpha)   up to rounding

    Raises:
        ValueError: if W, A or B holds a NaN or an infinity.
    """
    for name, array in {"W": W, "A": A, "B": B}.items():
        _refuse_non_finite(name, array)
    return W + delta_weight(A, B, alpha)


def unmerge(
    merged: Float[ndarray, "out in"], A: Float[ndarray, "r in"], B: Float[ndarray, "out r"], alpha: float
) -> Float[ndarray, "out in"]:
    """Take the adapter out again, by subtraction.

        W ≈ W′ − (alpha / r) · B A

    Not bit-exact: what the sum rounded away stays lost (at most half a unit in the last place of the larger
    term, each way). The exact way is to keep W: torch_lora/layers does.
    """
    return merged - delta_weight(A, B, alpha)


def _refuse_non_finite(name: str, array: Float[ndarray, "..."]) -> None:
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        where = tuple(int(i) for i in bad[0])
        raise ValueError(
            f"{name} holds {len(bad)} values that are NaN or infinite, the first at {where}: "
            "merging would spread them over the weight; find the training step that made them"
        )
