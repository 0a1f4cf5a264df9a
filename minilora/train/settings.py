"""What can be said of a method: its rank, its size, its start. Each method looks at some of these: train/methods.

Read before: torch_lora/config.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from minilora.llm.architectures import ALL_LINEAR
from minilora.llm.setup import default_start_r
from minilora.torch_lora.config import LoRAConfig, is_count


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
        LoRAConfig(r=self.r, alpha=self.alpha_or_2r, dropout=self.dropout, use_rslora=self.use_rslora)  # which raises
        n_words, ratio = len(self.words), self.loraplus_ratio
        rules = {
            "start_r": (
                self.start_r is None or is_count(self.start_r, self.r),
                f"a whole number from r, {self.r}, on",
            ),
            "bottleneck": (is_count(self.bottleneck), "a whole number of 1 or more"),
            "n_virtual": (is_count(self.n_virtual), "a whole number of 1 or more"),
            "mlp_features": (self.mlp_features is None or is_count(self.mlp_features), "a whole number of 1 or more"),
            "refresh": (is_count(self.refresh), "a whole number of 1 or more"),
            "loraplus_ratio": (ratio is None or 1 <= ratio < math.inf, "1 or more"),
            "galore_scale": (0 < self.galore_scale < math.inf, "a number above 0"),
            "words": (n_words in (0, self.n_virtual), f"n_virtual tokens, {self.n_virtual}, or none"),
        }
        problems = [
            f"{name} is {getattr(self, name)}: choose {what}" for name, (fits, what) in rules.items() if not fits
        ]
        if self.words and self.mlp_features is not None:
            problems.append("words and mlp_features exclude each other: an MLP cannot begin as words")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def alpha_or_2r(self) -> float:
        """Alpha beside r: what was given, or 2 r."""
        return 2.0 * self.r if self.alpha is None else self.alpha

    @property
    def first_r(self) -> int:
        """AdaLoRA's rank at the start."""
        return default_start_r(self.r) if self.start_r is None else self.start_r

    @property
    def first_alpha(self) -> float:
        """Alpha beside AdaLoRA's rank at the start, so that its scaling is the alpha / r that was asked for."""
        return self.alpha_or_2r * self.first_r / self.r
