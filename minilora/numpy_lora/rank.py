"""What rank means for a weight update: the best low-rank copy, how much rank is used, and which directions.

    M        any matrix (out, in); here mostly ΔW
    σ₁ ≥ σ₂ ≥ …   its singular values
    φ        overlap of two subspaces, 0 (orthogonal) to 1 (one lies in the other)

Read before this file: forward.
"""

import numpy as np
from jaxtyping import Float
from numpy import ndarray


def truncated_svd(M: Float[ndarray, "out in"], r: int) -> tuple[Float[ndarray, "out r"], Float[ndarray, "r in"]]:
    """Split M into the two factors of its best rank-r approximation.

        B A = Σ_{i ≤ r} σᵢ uᵢ vᵢᵀ       with  B = U_r √Σ_r,  A = √Σ_r V_rᵀ

    No matrix of rank r is nearer to M (Eckart and Young 1936): ‖M − B A‖²_F = Σ_{i > r} σᵢ².

    Raises:
        ValueError: if `r` is below 1 or above the smaller side of M.
    """
    largest = min(M.shape)
    if not 1 <= r <= largest:
        raise ValueError(f"r is {r}: a matrix of shape {M.shape} has ranks 1 to {largest}")
    U, sigma, Vt = np.linalg.svd(M, full_matrices=False)
    root = np.sqrt(sigma[:r])
    return U[:, :r] * root, root[:, None] * Vt[:r]


def effective_rank(M: Float[ndarray, "out in"], energy: float = 0.99) -> int:
    """Count the singular values that hold a share `energy` of ‖M‖²_F.

        the smallest k with  Σ_{i ≤ k} σᵢ² ≥ energy · Σᵢ σᵢ²

    At most the matrix's rank; 0 for the zero matrix.

    Raises:
        ValueError: if `energy` is not above 0 and at most 1.

    >>> effective_rank(np.diag([10.0, 1.0, 0.1]), energy=0.99)
    1
    >>> effective_rank(np.diag([10.0, 1.0, 0.1]), energy=0.9999)
    2
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy is {energy}: it is the share of ‖M‖² to keep, above 0 and at most 1, such as 0.99")
    squares = np.linalg.svd(M, compute_uv=False) ** 2
    total = squares.sum()
    if total == 0:
        return 0
    # Summed from the small end, the tail keeps its digits; and k values suffice when what is left out is small enough.
    tail = np.append(np.cumsum(squares[::-1])[::-1][1:], 0.0)  # tail[k − 1] = Σ_{i > k} σᵢ²
    rounding = len(squares) * np.finfo(squares.dtype).eps * total
    return int(np.argmax(tail <= (1 - energy) * total + rounding)) + 1


def subspace_similarity(A1: Float[ndarray, "r1 in"], A2: Float[ndarray, "r2 in"], i: int, j: int) -> float:
    """Ask how much of the span of A1's top i directions lies in the span of A2's top j.

        φ = ‖U₁ᵢᵀ U₂ⱼ‖²_F / min(i, j)                  [LoRA] eq. 4

    with the right singular vectors in the columns of U. Symmetric under a swap of (A1, i) with (A2, j).
    Two random subspaces of R^in have about max(i, j) / in.

    Raises:
        ValueError: if `i` or `j` is not between 1 and the rows of its matrix.
    """
    for name, count, matrix in (("i", i, A1), ("j", j, A2)):
        if not 1 <= count <= min(matrix.shape):
            raise ValueError(
                f"{name} is {count}: its matrix has shape {matrix.shape}, so choose 1 to {min(matrix.shape)}"
            )
    V1 = np.linalg.svd(A1, full_matrices=False)[2][:i]  # (i, in)
    V2 = np.linalg.svd(A2, full_matrices=False)[2][:j]  # (j, in)
    return float(np.sum((V1 @ V2.T) ** 2) / min(i, j))
