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
    "inits.py": ["methods/test_inits.py", "compat/test_inits_against_peft.py"],
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
    Mutant("two large products are subtracted", "inits.py", "torch.cat([self.A - self.A0, self.A0]), torch.cat([self.B, self.B - self.B0], dim=1)", "torch.cat([self.A, self.A0]), torch.cat([self.B, -self.B0], dim=1)"),
    Mutant("the start is not taken off A", "inits.py", "torch.cat([self.A - self.A0, self.A0])", "torch.cat([self.A, self.A0])"),
    Mutant("what B learns along A0 is lost", "inits.py", "torch.cat([self.B, self.B - self.B0], dim=1)", "torch.cat([self.B, 0 * self.B], dim=1)"),
    Mutant("a Conv1D's weight is not turned", "inits.py", "W = W.T if self.stores_in_by_out else W", "W = W"),
    Mutant("what is kept of the start is not state", "inits.py", 'self.register_buffer("A0", A0.contiguous())', 'self.register_buffer("A0", A0.contiguous(), persistent=False)'),
    Mutant("A begins at zero", "inits.py", "self.A.copy_(A0)", "self.A.zero_()"),
    Mutant("PiSSA forgets the scaling", "inits.py", "root = (sigma[:r] / scaling).sqrt()", "root = sigma[:r].sqrt()"),
    Mutant("A alone has the singular values", "inits.py", "return root[:, None] * Vt[:r], U[:, :r] * root", "return root[:, None] ** 2 * Vt[:r], U[:, :r]"),
    Mutant("the smallest singular values are taken", "inits.py", "return root[:, None] * Vt[:r], U[:, :r] * root", "return root[:, None] * Vt[-r:], U[:, -r:] * root"),
    Mutant("OLoRA takes the last columns", "inits.py", "return R[:r], Q[:, :r]", "return R[-r:], Q[:, -r:]"),
    Mutant("the file's scaling is half", "inits.py", "self.alpha * (math.sqrt(2) if self.use_rslora else 2)", "self.alpha"),
    Mutant("rsLoRA's alpha is doubled too", "inits.py", "(math.sqrt(2) if self.use_rslora else 2)", "2"),
    Mutant("saving draws random numbers", "inits.py", "generator=own", "generator=None"),
    Mutant("a merged layer's LoRA adds the update again", "inits.py", "        layer._kept = self._kept\n", ""),
    Mutant("a weight of NaN is let in", "inits.py", "if not W.isfinite().all():", "if False:"),
    Mutant("every step quantizes W itself", "inits.py", "quantize(W - update, codebook", "quantize(W, codebook"),
    Mutant("LoftQ splits W and not what was lost", "inits.py", "A, B = principal(lost, r, scaling)", "A, B = principal(W, r, scaling)"),
    Mutant("LoftQ forgets the scaling", "inits.py", "A, B = principal(lost, r, scaling)", "A, B = principal(lost, r, 1.0)"),
    Mutant("the error is that of the last rounding", "inits.py", "errors = errors or [(lost.norm() / norm).item()]", "errors = [*errors[1:], (lost.norm() / norm).item()]"),
    Mutant("LoftQ's base passes for W in 4 bits", "inits.py", 'if steps > 1 else ""', 'if False else ""'),
    Mutant("LoftQ drops the bias", "inits.py", "LoftQBase(Q, base.bias, r", "LoftQBase(Q, None, r"),
]  # fmt: skip
