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
    "ia3.py": ["methods/test_ia3.py", "compat/test_ia3_against_peft.py"],
    "peft_ia3.py": ["methods/test_ia3.py", "compat/test_ia3_against_peft.py"],
    "houlsby.py": ["methods/test_houlsby.py"],
    "houlsby_format.py": ["methods/test_houlsby.py"],
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
    Mutant("l begins at zero", "ia3.py", "torch.ones(out_features", "torch.zeros(out_features"),
    Mutant("l is rounded to x's dtype", "ia3.py", "return self.base((self.l * x).to(x.dtype))", "return self.base(self.l.to(x.dtype) * x)"),
    Mutant("l is rounded to the output's dtype", "ia3.py", "return (self.l * h).to(h.dtype)", "return self.l.to(h.dtype) * h"),
    Mutant("the output is scaled without its bias", "ia3.py", "h = self.base(x)\n", "h = self.base(x) - (0 if self.base.bias is None else (1 - 1 / self.l) * self.base.bias)\n"),
    Mutant("a merged layer scales once more", "ia3.py", "        if self.is_merged:\n            return self.base(x)\n", ""),
    Mutant("rows are taken for columns", "ia3.py", 'of_rows = (self.scales == "output") !=', 'of_rows = (self.scales == "input") !='),
    Mutant("a Conv1D's columns are taken for rows", "ia3.py", " != self.stores_in_by_out", ""),
    Mutant("merging leaves the bias as it was", "ia3.py", 'return self.l * bias if self.scales == "output" else bias', "return bias"),
    Mutant("merging scales the bias of every layer", "ia3.py", 'self.l * bias if self.scales == "output" else bias', "self.l[: len(bias)] * bias"),
    Mutant("who reads the bias gets the base's own", "ia3.py", "self.base.bias if self.is_merged else self.merged_bias()", "self.base.bias"),
    Mutant("the base trains on", "ia3.py", "        freeze(base)  # last: whoever is refused leaves the base as it was\n", ""),
    Mutant("inputs are scaled like outputs", "ia3.py", 'scales="input" if id(base) in read else "output"', 'scales="output"'),
    Mutant("a layer may be both", "ia3.py", "if both := given.keys() & read.keys():", "if both := set():"),
    Mutant("a row is written for a column", "peft_ia3.py", 'return (out_features, 1) if scales == "output" else (1, in_features)', 'return (1, out_features) if scales == "output" else (in_features, 1)'),
    Mutant("no word says what is feed-forward", "peft_ia3.py", '"feedforward_modules": feedforward,', '"feedforward_modules": [],'),
    Mutant("PEFT is left to choose what is feed-forward", "peft_ia3.py", '"feedforward_modules": feedforward,', '"feedforward_modules": feedforward or None,'),
    Mutant("words are compared as wholes", "peft_ia3.py", "or any(name.endswith(tuple(words)) for name in outputs)", "or any(name in words for name in outputs)"),
    Mutant("a name that ends another is not seen", "peft_ia3.py", "    if wrong:\n", "    if False:\n"),
    Mutant("layers that scale something else are filled", "peft_ia3.py", 'getattr(module, "scales", None) != which', "False"),
    Mutant("shapes are not looked at", "peft_ia3.py", "if tuple(l.shape) != expected:", "if l.numel() == 0:"),
    Mutant("the config's words are not read", "peft_ia3.py", "if isinstance(words, list):", "if False:"),
    Mutant("there is no way around the bottleneck", "houlsby.py", "return h + F.linear(u, W_up, b_up)", "return F.linear(u, W_up, b_up)"),
    Mutant("the adapter reads the layer's input", "houlsby.py", "(F.linear(h, W_down, b_down))", "(F.linear(x, W_down[:, :1].expand(-1, x.shape[-1]), b_down))"),
    Mutant("it is linear", "houlsby.py", "u = NONLINEARITIES[self.nonlinearity](F.linear(h, W_down, b_down))", "u = F.linear(h, W_down, b_down)"),
    Mutant("GELU is the exact one", "houlsby.py", 'partial(F.gelu, approximate="tanh")', "F.gelu"),
    Mutant("the choice of nonlinearity is forgotten", "houlsby.py", "NONLINEARITIES[self.nonlinearity](", 'NONLINEARITIES["gelu"]('),
    Mutant("b_down is left out", "houlsby.py", "F.linear(h, W_down, b_down)", "F.linear(h, W_down)"),
    Mutant("b_up is left out", "houlsby.py", "F.linear(u, W_up, b_up)", "F.linear(u, W_up)"),
    Mutant("W_up does not begin at zero", "houlsby.py", "torch.zeros(d, bottleneck, device=device)", "torch.full((d, bottleneck), 1e-3, device=device)"),
    Mutant("W_down begins at zero, and never learns", "houlsby.py", "        nn.init.trunc_normal_(self.W_down, std=STD, a=-2 * STD, b=2 * STD, generator=generator)\n", "        nn.init.zeros_(self.W_down)\n"),
    Mutant("W_down's tails are not cut", "houlsby.py", "nn.init.trunc_normal_(self.W_down, std=STD, a=-2 * STD, b=2 * STD, generator=generator)", "nn.init.normal_(self.W_down, std=STD, generator=generator)"),
    Mutant("W_down ignores the generator", "houlsby.py", "b=2 * STD, generator=generator)", "b=2 * STD)"),
    Mutant("merging is refused with the way out of 4 bits", "houlsby.py", "        self.adapt(torch.empty(0, 0))\n", "        super().merge()\n"),
    Mutant("a bias is not saved", "houlsby.py", '"b_down": self.b_down, "W_up"', '"W_up"'),
    Mutant("the base trains on", "houlsby.py", "        freeze(base)  # last: whoever is refused leaves the base as it was\n", ""),
    Mutant("PEFT takes the file for LoRA's", "houlsby_format.py", '"peft_type": "HOULSBY"}', '"peft_type": "LORA"}'),
    Mutant("the file forgets the nonlinearity", "houlsby_format.py", 'bottleneck=_bottleneck(tensors), nonlinearity=config["nonlinearity"]', "bottleneck=_bottleneck(tensors)"),
    Mutant("layers of another nonlinearity are filled", "houlsby_format.py", "its != theirs", "its[0] != m"),
    Mutant("shapes are not looked at", "houlsby_format.py", "if tuple(tensor.shape) != shapes[ours] or not m", "if not m"),
]  # fmt: skip
