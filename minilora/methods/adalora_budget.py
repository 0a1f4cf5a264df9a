"""AdaLoRA's budget: which triplets of all layers are worth their rank, and how many may stay.

    w, g    a number of P, Λ or Q, and its gradient         b(t)   triplets left after step t: b_0 at first, then b_T
    β₁, β₂  how much of the past stays                      T      steps, of which the first t_init and the last t_final
                                                                   prune nothing

        I  = |w · g|                                              its sensitivity: what the loss would lose     eq. 8
        Ī ← β₁ Ī + (1 − β₁) I      Ū ← β₂ Ū + (1 − β₂) |I − Ī|    smoothed, and how uncertain that is       eq. 9, 10
        S  = s(Λ_k) + mean s(P_k) + mean s(Q_k)  with s = Ī · Ū   the importance of triplet k               eq. 7, 11
        Λ_k ← 0   unless S_k is among the b(t) largest of all layers                                            eq. 6
        b(t) = ⌊b_T + (b_0 − b_T) (1 − (t − t_init) / (T − t_final − t_init))³⌋                            appendix A

The equations' numbers are [AdaLoRA]'s. A value that was set to zero still has a gradient and may come back, until the
budget is reached; then the choice is final. As in the authors' code, w is what the optimizer's step has made of it.

Read before this file: adalora.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minilora.methods.adalora import adalora_layers


@dataclass(frozen=True, kw_only=True)
class RankSchedule:
    """When how many triplets are left, and how their importance is smoothed.

    The first `t_init` steps and the last `t_final` of all `n_steps` change no rank; in between the least important
    triplets are set to zero after every `delta_t`-th step. The defaults are PEFT's.

    Raises:
        ValueError: if no step is left to prune in, or a number is out of its range.
    """

    target_r: int  # triplets a layer at the end, on average
    n_steps: int
    t_init: int = 0
    t_final: int = 0
    delta_t: int = 1
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        if min(self.target_r, self.delta_t) < 1 or min(self.t_init, self.t_final) < 0:
            raise ValueError(
                f"target_r is {self.target_r} and delta_t {self.delta_t}, which are 1 or more; "
                f"t_init is {self.t_init} and t_final {self.t_final}, which are 0 or more"
            )
        if self.t_init >= self.end:
            raise ValueError(
                f"of {self.n_steps} steps the first {self.t_init} and the last {self.t_final} change no rank, which "
                "leaves none to prune in: choose a smaller t_init or t_final, or more steps"
            )
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1):
            raise ValueError(f"beta1 is {self.beta1} and beta2 {self.beta2}: they weigh the past, between 0 and 1")

    @property
    def end(self) -> int:
        """The step after which the choice is final."""
        return self.n_steps - self.t_final

    def budget(self, number: int, first: int, last: int) -> int:
        """How many triplets step `number` (from 1) leaves, of `first` at the start and `last` at the end.

            b(t) = ⌊b_T + (b_0 − b_T) (1 − (t − t_init) / (T − t_final − t_init))³⌋       [AdaLoRA] appendix A

        >>> schedule = RankSchedule(target_r=2, n_steps=8, t_init=2, t_final=2)
        >>> [schedule.budget(number, 16, 8) for number in range(1, 9)]
        [16, 16, 11, 9, 8, 8, 8, 8]
        """
        share_left = 1 - (min(max(number, self.t_init), self.end) - self.t_init) / (self.end - self.t_init)
        return int((first - last) * share_left**3 + last)

    def prunes(self, number: int) -> bool:
        """Whether triplets are chosen anew after this step; up to t_init the budget lets all of them stay."""
        return number == self.end or (number < self.end and number % self.delta_t == 0)


class RankAllocator:
    """Watches how much every triplet matters, and sets the least important ones to zero as the budget falls.

    `step` stands between the optimizer's step and zero_grad, because it needs the gradients; a loop that calls the two
    itself can be told so by the optimizer:

        optimizer.register_step_post_hook(lambda *_: allocator.step(allocator.done + 1))

    Nothing is drawn at random: equal gradients give equal ranks, in every process.

    Raises:
        ValueError: if the model has no AdaLoRA layer, or fewer triplets than the schedule's target.
    """

    def __init__(self, model: nn.Module, schedule: RankSchedule):
        self.layers, self.schedule = adalora_layers(model), schedule
        self.done = 0  # steps
        self.first = sum(layer.r for layer in self.layers.values())
        self.last = schedule.target_r * len(self.layers)
        if self.last > self.first:
            raise ValueError(
                f"target_r is {schedule.target_r}, but {len(self.layers)} layers begin with {self.first} triplets, "
                f"{self.first / len(self.layers):g} a layer: choose a larger r, or a smaller target_r"
            )
        self.sensitivity = {key: torch.zeros_like(p) for key, p in self._watched().items()}  # Ī
        self.uncertainty = {key: torch.zeros_like(p) for key, p in self._watched().items()}  # Ū

    @torch.no_grad()
    def step(self, number: int) -> None:
        """Look at the gradients of step `number` (from 1), and prune if the schedule says so, in place.

        Raises:
            ValueError: if this is not the step after the last one, or a gradient is missing; nothing is changed then.
        """
        if number != self.done + 1:
            raise ValueError(f"step {number} follows {self.done}: call step once after every step of the optimizer")
        if number < self.schedule.end:
            self._observe()
        if self.schedule.prunes(number):
            self._choose(self.schedule.budget(number, self.first, self.last))
        elif number > self.schedule.end:
            for layer in self.layers.values():
                layer.prune(layer.kept)
        if number == self.schedule.end:
            self.sensitivity, self.uncertainty = {}, {}  # as many bytes as the optimizer's moments
        self.done = number

    def scores(self) -> dict[str, Float[Tensor, "r"]]:
        """The importance S of every triplet, by layer, as long as the choice is not final.

        S_k = s(Λ_k) + mean s(P_k) + mean s(Q_k)    with s = Ī · Ū          [AdaLoRA] eq. 7 and 11
        """
        s = {key: self.sensitivity[key] * self.uncertainty[key] for key in self.sensitivity}
        return {n: s[f"{n}.E"] + (s[f"{n}.A"].mean(1) + s[f"{n}.B"].mean(0)) for n in self.layers}

    def state_dict(self) -> dict[str, Tensor]:
        """Give all that the next step depends on, as tensors with names: the very ones, not copies."""
        smoothed = {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty}
        state = {f"{kind}/{key}": tensor for kind, tensors in smoothed.items() for key, tensor in tensors.items()}
        kept = {f"kept/{name}": layer.kept for name, layer in self.layers.items()}
        return state | kept | {"done": torch.tensor(self.done)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state_dict, bit for bit; the layers' own numbers come with the model's.

        Raises:
            ValueError: if it is of other layers: all misfits are named, nothing is changed.
        """
        watched = self._watched() if "done" in state and int(state["done"]) < self.schedule.end else {}
        shapes = {f"{kind}/{key}": p.shape for kind in ("sensitivity", "uncertainty") for key, p in watched.items()}
        shapes |= {f"kept/{name}": layer.kept.shape for name, layer in self.layers.items()} | {"done": torch.Size()}
        theirs = {key: tensor.shape for key, tensor in state.items()}
        odd = sorted(k for k in shapes.keys() | theirs.keys() if shapes.get(k) != theirs.get(k))
        if odd:
            raise ValueError(f"this state is of other layers, or another schedule: {', '.join(odd)} differ")
        self.sensitivity = {key: state[f"sensitivity/{key}"].to(p, copy=True) for key, p in watched.items()}
        self.uncertainty = {key: state[f"uncertainty/{key}"].to(p, copy=True) for key, p in watched.items()}
        for name, layer in self.layers.items():
            layer.kept.copy_(state[f"kept/{name}"])
        self.done = int(state["done"])

    def _watched(self) -> dict[str, Tensor]:
        return {f"{n}.{letter}": p for n, y in self.layers.items() for letter, p in y.adapter_tensors().items()}

    def _observe(self) -> None:
        """Smooth the sensitivity of every number, and how far it is from what was expected."""
        beta1, beta2 = self.schedule.beta1, self.schedule.beta2
        watched = self._watched()
        now = {key: (p * p.grad).abs() for key, p in watched.items() if p.grad is not None}  # I
        if len(now) < len(watched):
            first = next(key for key in watched if key not in now)
            raise ValueError(f"{first} has no gradient: call step between optimizer.step() and optimizer.zero_grad()")
        for key, sensitivity in now.items():
            self.sensitivity[key].mul_(beta1).add_((1 - beta1) * sensitivity)
            surprise = (sensitivity - self.sensitivity[key]).abs()
            self.uncertainty[key].mul_(beta2).add_((1 - beta2) * surprise)

    def _choose(self, budget: int) -> None:
        """Keep the most important triplets of all layers together; of equal ones the later."""
        scores = self.scores()
        least = torch.cat(list(scores.values())).argsort(stable=True)[: self.first - budget]
        kept = torch.ones(self.first, dtype=torch.bool, device=least.device)
        kept[least] = False
        for layer, its in zip(self.layers.values(), kept.split([len(s) for s in scores.values()]), strict=True):
            layer.prune(its)
