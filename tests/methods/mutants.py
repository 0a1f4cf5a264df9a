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
    "adalora.py": ["methods/test_adalora.py"],
    "adalora_budget.py": ["methods/test_adalora.py"],
    "peft_adalora.py": ["methods/test_adalora.py", "compat/test_adalora_against_peft.py"],
    "galore.py": ["methods/test_galore.py"],
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
    Mutant("the values act on Q twice", "adalora.py", "x, self.A, self.B * self.E)", "x, self.E[:, None] * self.A, self.B * self.E)"),
    Mutant("a Conv1D's update is not transposed", "adalora.py", "delta.T if self.stores_in_by_out else delta", "delta"),
    Mutant("pruning leaves the values", "adalora.py", "self.E.masked_fill_(~self.kept, 0)", "pass"),
    Mutant("a fresh layer has no triplets", "adalora.py", "return self.kept | (self.E != 0)", "return self.E != 0"),
    Mutant("what is left is scaled by its own rank", "adalora.py", "alpha=self.scaling * r,", "alpha=self.alpha,"),
    Mutant("the penalty pulls to zero", "adalora.py", "gram - torch.eye(len(gram), device=gram.device)", "gram"),
    Mutant("there is no penalty", "adalora.py", "return distances.square().sum() if squared else distances.mean()", "return 0 * distances.sum()"),
    Mutant("the penalty is the sum", "adalora.py", "else distances.mean()", "else distances.sum()"),
    Mutant("the paper's penalty is not squared", "adalora.py", "distances.square().sum() if squared", "distances.sum() if squared"),
    Mutant("a layer of two names becomes two", "adalora.py", "setattr(parent, name, new[child])", "setattr(parent, name, child.as_lora() or child.base)"),
    Mutant("the smoothing has the wrong sign", "adalora_budget.py", ".mul_(beta1).add_((1 - beta1) * sensitivity)", ".mul_(beta1).sub_((1 - beta1) * sensitivity)"),
    Mutant("the surprise is smoothed by the other beta", "adalora_budget.py", ".mul_(beta2).add_((1 - beta2) * surprise)", ".mul_(beta1).add_((1 - beta1) * surprise)"),
    Mutant("the sensitivity is the gradient's", "adalora_budget.py", "(p * p.grad).abs()", "p.grad.abs()"),
    Mutant("Q does not count", "adalora_budget.py", '(s[f"{n}.A"].mean(1) + s[f"{n}.B"].mean(0))', 's[f"{n}.B"].mean(0)'),
    Mutant("the budget is a step late", "adalora_budget.py", "min(max(number, self.t_init), self.end)", "min(max(number - 1, self.t_init), self.end)"),
    Mutant("the budget falls from the first step on", "adalora_budget.py", "min(max(number, self.t_init), self.end) - self.t_init) / (self.end - self.t_init)", "min(number, self.end)) / self.end"),
    Mutant("the last choice waits for its turn", "adalora_budget.py", "number == self.end or (", "("),
    Mutant("every step prunes", "adalora_budget.py", " and number % self.delta_t == 0)", ")"),
    Mutant("what was pruned for good comes back", "adalora_budget.py", "layer.prune(layer.kept)", "pass"),
    Mutant("one too many goes", "adalora_budget.py", "[: self.first - budget]", "[: self.first - budget + 1]"),
    Mutant("a resumed run forgets what was pruned", "adalora_budget.py", 'layer.kept.copy_(state[f"kept/{name}"])', "pass"),
    Mutant("all triplets are written", "peft_adalora.py", "chosen = {name: layer.in_use() for", "chosen = {name: layer.in_use() | True for"),
    Mutant("the pattern is not written", "peft_adalora.py", 'config["rank_pattern"] = {', "_ = {"),
    Mutant("the triplets are read to the front", "peft_adalora.py", "chosen = layer.kept\n", "chosen = torch.arange(layer.r) < layer.kept.sum()\n"),
    Mutant("the moments are not projected", "galore.py", 'R = project(G, state["P"]) if r else G', 'R = project_back(project(G, state["P"]), state["P"], p.shape) if r else G'),
    Mutant("the projector is on the wrong side", "galore.py", "return shape[0] >= shape[1]", "return shape[0] < shape[1]"),
    Mutant("the last singular vectors are taken", "galore.py", "(Vt[:r] if", "(Vt[-r:] if"),
    Mutant("the whole of V stays in memory", "galore.py", ".contiguous()  # not a view", "  # not a view"),
    Mutant("the scale is forgotten", "galore.py", 'update = group["scale"] * project_back(', "update = project_back("),
    Mutant("plain AdamW is scaled too", "galore.py", "p.shape) if r else N", 'p.shape) if r else group["scale"] * N'),
    Mutant("the projector is made anew every step", "galore.py", 'return state.get("step", 0) % refresh == 0', "return True"),
    Mutant("a new projector forgets the moments", "galore.py", 'if not state.keys() & {"M", "V"}:', 'if not state.keys() & {"M", "V"} or is_due(state, group["refresh"]):'),
    Mutant("the decay goes through the gradient", "galore.py", 'W.mul_(1 - group["lr"] * group["weight_decay"])', "W"),
    Mutant("states are rounded to the weights' dtype", "galore.py", "its[k].to(p.device, torch.float32, copy=True)", "its[k].to(p, copy=True)"),
    Mutant("a loaded state is shared", "galore.py", "its[k].to(p.device, torch.float32, copy=True)", "its[k]"),
    Mutant("the report forgets V", "galore.py", "moment_bytes=sum(2 * 4 *", "moment_bytes=sum(4 *"),
]  # fmt: skip
