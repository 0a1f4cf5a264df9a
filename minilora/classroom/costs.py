"""What the bypass costs, in multiplications and bytes, for each of its two bracketings. Exact, from the shapes alone.

    (x Aᵀ) Bᵀ        through the bottleneck: two thin products
    x (B A)ᵀ         the update formed first: as large as W, and thrown away again

One multiplication is one scalar product inside a matrix product; the factor alpha / r is left out of both.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class BypassCost:
    """One layer's forward on `rows` rows: counts of scalar multiplications, and bytes of arrays beside the result."""

    rows: int
    in_features: int
    out_features: int
    r: int

    @property
    def highway(self) -> int:
        """x Wᵀ, which is paid anyway."""
        return self.rows * self.in_features * self.out_features

    @property
    def through_bottleneck(self) -> int:
        """(x Aᵀ) Bᵀ."""
        return self.rows * self.r * (self.in_features + self.out_features)

    @property
    def formed_first(self) -> int:
        """x (B A)ᵀ, with B A formed for this one use."""
        return self.out_features * self.r * self.in_features + self.highway

    @property
    def ratio(self) -> float:
        """How many times as many multiplications x (B A)ᵀ needs.

        >>> BypassCost(rows=1, in_features=4, out_features=4, r=1).ratio  # 32 against 8
        4.0
        """
        return self.formed_first / self.through_bottleneck

    def scratch_bytes(self, *, formed: bool, itemsize: int = 4) -> int:
        """Bytes of the one array in between: B A if it is formed, else x Aᵀ."""
        numbers = self.out_features * self.in_features if formed else self.rows * self.r
        return numbers * itemsize

    @property
    def trainable(self) -> int:
        """Parameters of A and B."""
        return self.r * (self.in_features + self.out_features)

    @property
    def share(self) -> float:
        """Those parameters as a part of W's."""
        return self.trainable / (self.in_features * self.out_features)


def human_bytes(count: float) -> str:
    """A number of bytes as people read it.

    >>> human_bytes(512), human_bytes(65_536), human_bytes(64 * 2**20)
    ('512 B', '64 KiB', '64 MiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.3g} {unit}"


def human_count(count: float) -> str:
    """A large number in a few characters.

    >>> human_count(65_536), human_count(16_777_216), human_count(512)
    ('65.5 k', '16.8 M', '512')
    """
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return f"{count:g}"
