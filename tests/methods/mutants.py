# ruff: noqa: E501  (a mutant is a line)
"""Intentionally broken copies of the methods: a line of the source, and what stands there instead.

Each is a mistake that somebody made, or could. test_mutants runs the method's own tests on a copy of the package with
that one line changed: they have to fail.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    """One wrong line in one file of minilora/methods."""

    says: str
    file: str
    line: str
    instead: str


TESTS = {
    "dora.py": ["methods/test_dora.py", "compat/test_dora_against_peft.py"],
    "loraplus.py": ["methods/test_loraplus.py"],
}
MUTANTS = [
    Mutant("the norm goes over the other axis", "dora.py", "V.norm(dim=1)", "V.norm(dim=0)"),
    Mutant("the norm is that of W alone", "dora.py", "self.squares + 2 * (B * AW.T).sum(1)", "self.squares + 0 * (B * AW.T).sum(1)"),
    Mutant("the norm leaves the square of the update out", "dora.py", " + (B @ (A @ A.T) * B).sum(1)", ""),
    Mutant("the norm forgets the scaling", "dora.py", "A, B = self.A, self.scaling * self.B", "A, B = self.A, self.B"),
    Mutant("the norm takes the bias for a part of W", "dora.py", "AW if self.base.bias is None else AW - self.base.bias", "AW"),
    Mutant("the norm has a gradient", "dora.py", "    @torch.no_grad()\n    def lengths", "    def lengths"),
    Mutant("the bias is scaled", "dora.py", "y += ((1 - g) * bias).to(h.dtype)", "pass"),
    Mutant("m has no gradient", "dora.py", "torch.where(g == 0, 0, dg / g), None", "torch.zeros_like(g), None"),
    Mutant("m's gradient takes the bias along", "dora.py", "dg -= bias * dy.sum(tokens, dtype=g.dtype)", "pass"),
    Mutant("x's gradient is not scaled", "dora.py", "return g.to(dy.dtype) * dy,", "return dy,"),
    Mutant("m begins at one", "dora.py", "nn.Parameter(self.squares.sqrt())", "nn.Parameter(torch.ones_like(self.squares))"),
    Mutant("dropout falls on the base's own output", "dora.py", "return self.base(x) + (g - 1) * h", "return self.base(dropped) + (g - 1) * h"),
    Mutant("dropout leaves the correction alone", "dora.py", "h, g = self.base(dropped)", "h, g = self.base(x)"),
    Mutant("a Conv1D's columns are taken for rows", "dora.py", "return W.T if self.stores_in_by_out else W", "return W"),
    Mutant("m is not saved", "dora.py", 'return super().adapter_tensors() | {"m": self.m}', "return super().adapter_tensors()"),
    Mutant("the update is LoRA's", "dora.py", "return AdapterLayer.delta_weight(self)", "return super().delta_weight()"),
    Mutant("a row of zeros becomes NaN", "dora.py", ".clamp_min(0).sqrt().clamp_min(TINY)", ".sqrt()"),
    Mutant("a copy of the result is kept", "dora.py", "ctx.save_for_backward(y, g, bias)", "ctx.save_for_backward(h * g, g, bias)"),
    Mutant("A gets B's rate", "loraplus.py", 'of_adapters.get(p) == "B"', 'of_adapters.get(p) == "A"'),
    Mutant("the ratio is forgotten", "loraplus.py", "lr * ratio if like_b", "lr if like_b"),
    Mutant("magnitudes go with A", "loraplus.py", 'of_adapters.get(p) == "B" or p.ndim == 1', 'of_adapters.get(p) == "B"'),
    Mutant("embeddings go with the others", "loraplus.py", "embedding_lr if p in of_embeddings else ", ""),
    Mutant("biases decay", "loraplus.py", "0.0 if p.ndim == 1 and p not in of_adapters else weight_decay", "weight_decay"),
    Mutant("magnitudes do not decay", "loraplus.py", "p.ndim == 1 and p not in of_adapters", "p.ndim == 1"),
]  # fmt: skip
