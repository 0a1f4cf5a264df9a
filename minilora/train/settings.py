"""What can be said of a method: its rank, its size, its start. Each method looks at some of these: train/methods.

Read before: torch_lora/config.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from minilora.llm.architectures import ALL_LINEAR
from minilora.torch_lora.config import LoRAConfig


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the methods ask for; None is the method's own default.

    Raises:
        ValueError: if a number is impossible.
    """

    r: int = 16  # of LoRA; of AdaLoRA on average at the end; of GaLore's projection
    alpha: float | None = None  # 2 r
    dropout: float = 0.0
    use_rslora: bool = False
    targets: str | Sequence[str] = ALL_LINEAR
    loraplus_ratio: float | None = None  # B's rate / A's
    start_r: int | None = None  # AdaLoRA's at the start: 1.5 r
    bottleneck: int = 64
    n_virtual: int = 20
    words: Sequence[int] = ()  # tokens that virtual tokens begin as
    mlp_features: int | None = None  # of prefix tuning's MLP
    refresh: int = 200  # steps from one of GaLore's projections to the next
    galore_scale: float = 0.25
    seed: int = 0  # of what is drawn

    def __post_init__(self) -> None:
        LoRAConfig(r=self.r, alpha=self.scale, dropout=self.dropout, use_rslora=self.use_rslora)  # which raises
        whole = ("start_r", "bottleneck", "n_virtual", "mlp_features", "refresh")
        odd = [name for name in whole if getattr(self, name) is not None and getattr(self, name) < 1]
        problems = [f"{name} is {getattr(self, name)}: choose 1 or more" for name in odd]
        if self.start_r is not None and self.start_r < self.r:
            problems.append(f"start_r is {self.start_r}, below r, {self.r}: AdaLoRA begins with more than it keeps")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def scale(self) -> float:
        """Alpha: what was given, or 2 r."""
        return 2.0 * self.r if self.alpha is None else self.alpha

    @property
    def first_r(self) -> int:
        """AdaLoRA's rank at the start."""
        return -(-3 * self.r // 2) if self.start_r is None else self.start_r
