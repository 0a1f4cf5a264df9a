"""Lesson 05: which modules a target hits, adapters put in by name, what they count, a budget, and learners' mistakes.

The models are small and full of traps: twelve layers or so (1 and 11), fewer heads of keys than of queries (GQA), a
norm called q_proj_norm, GPT-2's Conv1D, three layers called c_proj, and an output head that is a linear layer.
"""

import copy
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.classroom.exercises import Bug, Case, Exercise, Property
from minilora.llm.architectures import ARCHITECTURES, Architecture, Linear, layer_linears
from minilora.llm.config import ModelConfig
from minilora.llm.model import Decoder
from minilora.llm.sizes import lora_params
from minilora.torch_lora.adapter_layer import AdapterLayer
from minilora.torch_lora.inject import (
    ALL_LINEAR,
    adapter_layers,
    freeze_all_but_adapters,
    inject,
    match_targets,
)
from minilora.torch_lora.layers import LoRALinear, is_linear
from minilora.torch_lora.wrap import lora_layer

NUMBER = re.compile(r"\.\d+\.")  # of a decoder layer, inside a name
Names = dict[str, list[str]]  # what each target hits
Wrap = Callable[[nn.Module], nn.Module]


class Conv1D(nn.Module):
    """GPT-2's linear layer: its weight is stored as (in, out), and it is no nn.Linear."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class GPT2Attention(nn.Module):
    """One head, of which one matrix makes q, k and v."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_attn, self.c_proj = Conv1D(3 * width, width), Conv1D(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).chunk(3, dim=-1)
        return self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class GPT2MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(4 * width, width), Conv1D(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class GPT2Layer(nn.Module):
    """As in GPT-2, with the second attention that its decoders beside an encoder have."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn, self.cross_attn, self.mlp = GPT2Attention(width), GPT2Attention(width), GPT2MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.attn, self.cross_attn, self.mlp):
            x = x + part(F.layer_norm(x, x.shape[-1:]))
        return x


class GPT2(nn.Module):
    """A model with GPT-2's names: `h.0.attn.c_attn`, `h.0.mlp.c_proj`, …"""

    def __init__(self, n_layers: int, width: int = 8, vocab: int = 19) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab, width)
        self.h = nn.ModuleList(GPT2Layer(width) for _ in range(n_layers))
        self.lm_head = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens)
        for layer in self.h:
            x = layer(x)
        return self.lm_head(x)


# 3 heads of queries and 1 of keys, and a head_dim that is not hidden / heads.
TINY = Architecture(
    family="llama", n_layers=12, hidden=12, intermediate=20, n_heads=3, n_kv_heads=1, head_dim=6, vocab=19
)


def config_of(arch: Architecture) -> ModelConfig:
    """The same numbers, as the package's model takes them."""
    return ModelConfig(
        vocab_size=arch.vocab,
        hidden_size=arch.hidden,
        intermediate_size=arch.intermediate,
        n_layers=arch.n_layers,
        n_heads=arch.n_heads,
        n_kv_heads=arch.n_kv_heads,
        head_dim=arch.head_dim,
        tie_word_embeddings=arch.tied,
    )


def of_shape(arch: Architecture) -> Decoder:
    """The package's model of these numbers, without memory."""
    with torch.device("meta"):
        return Decoder(config_of(arch))


def tiny_llama(n_layers: int) -> Decoder:
    """The package's own model, small, with weights."""
    return Decoder(config_of(replace(TINY, n_layers=n_layers)))


def with_query_norms(model: Decoder) -> Decoder:
    """The model with a norm called q_proj_norm in every layer, as newer models have them."""
    for layer in model.model.layers:
        attention: Any = layer.get_submodule("self_attn")
        attention.q_proj_norm = nn.LayerNorm(6)
    return model


def a_block() -> nn.Module:
    """Lesson 04's block: four matrices whose whole names are q_proj, k_proj, v_proj, o_proj."""
    return nn.ModuleDict({f"{letter}_proj": nn.Linear(6, 6) for letter in "qkvo"})


def models(rng: np.random.Generator) -> Case:
    """The three models of this lesson, with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**31)))
        n_layers = int(rng.integers(11, 14))
        return {"llama": with_query_norms(tiny_llama(n_layers)), "gpt2": GPT2(2), "block": a_block()}


def small_models(rng: np.random.Generator) -> Case:
    """Two of them as small as can be: they are copied for every scene."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**31)))
        return {"llama": tiny_llama(2), "gpt2": GPT2(1)}


# ------------------------------------------------------------------------------------------------------ 05.1 matching

QUESTIONS: tuple[tuple[str, list[str]], ...] = (
    ("llama", ["q_proj", "v_proj"]),
    ("llama", ["1.mlp.up_proj"]),
    ("llama", ["q_proj", "v_porj"]),
    ("llama", ["proj"]),
    ("llama", [ALL_LINEAR]),
    ("gpt2", ["c_proj"]),
    ("gpt2", ["attn.c_proj"]),
    ("gpt2", [ALL_LINEAR]),
    ("block", ["q_proj"]),
)


def summary(names: Iterable[str]) -> str:
    """Names in a few words, the numbers of layers left out.

    >>> summary(["layers.0.q_proj", "layers.1.q_proj", "lm_head"])
    '2 layers.*.q_proj, 1 lm_head'
    """
    counts = Counter(NUMBER.sub(".*.", name) for name in names)
    return ", ".join(f"{count} {name.removeprefix('model.')}" for name, count in sorted(counts.items())) or "none"


def answers(function: Callable, case: Case) -> dict[str, str]:
    """What a matcher says to each question, in words; where it raises on all of them, the first exception comes out."""
    said, errors = {}, []
    for model, targets in QUESTIONS:
        question = f"{model} {targets}"
        try:
            hits = function(case[model], list(targets))
            said[question] = listing(hits)
        except ValueError as error:
            said[question] = "refused"
            errors.append(error)
        except NotImplementedError:
            raise
        except Exception as error:
            said[question] = f"raised {type(error).__name__}"
            errors.append(error)
    if len(errors) == len(QUESTIONS):
        raise errors[0]
    return said


def listing(hits: Any) -> str:
    """A dict of names, in words, or what came instead."""
    if not isinstance(hits, Mapping):
        return f"a {type(hits).__name__}, not a dict of lists"
    if not all(isinstance(names, list | tuple | set) for names in hits.values()):
        return "a dict, whose values are not lists of names"
    return "; ".join(f"{target}: {summary(names)}" for target, names in hits.items())


def names_what_it_missed(function: Callable, case: Case) -> str | None:
    """The error over a misspelt target has the target in it; a right one is no error."""
    function(case["llama"], ["q_proj"])
    try:
        function(case["llama"], ["q_proj", "v_porj"])
    except ValueError as error:
        return None if "v_porj" in str(error) else f"the error says {str(error)!r:.60}: name the target, 'v_porj'"
    return "nothing was raised"


def is_head(name: str) -> bool:
    return name.rpartition(".")[2] == "lm_head"


def ends_in(name: str, target: str) -> bool:
    """PEFT's rule, and ours."""
    return name == target or name.endswith(f".{target}")


def _matching(
    hits: Callable[[str, str], bool] = ends_in,
    linear: Callable[[nn.Module], bool] = is_linear,
    head: Callable[[str], bool] = is_head,
    refuses: Callable[[Names], bool] = lambda found: not all(found.values()),
    keeps: Callable[[list[str]], list[str]] = lambda names: names,
    says: str = "no module is named {}",
) -> Callable[[nn.Module, Sequence[str]], Names]:
    """A learner's match_targets, right but for what is given."""

    def match(model: nn.Module, targets: Sequence[str]) -> Names:
        modules = [(name, module) for name, module in model.named_modules() if name]
        found = {}
        for target in targets:
            if target == ALL_LINEAR:
                names = [name for name, module in modules if linear(module) and not head(name)]
            else:
                names = [name for name, _ in modules if hits(name, target)]
            found[target] = keeps(names)
        if refuses(found):
            raise ValueError(says.format([target for target, names in found.items() if not names]))
        return found

    return match


MATCH = Exercise(
    id="05.1",
    title="Which modules a target hits",
    asks="match_targets(model, targets) -> {target: [module names]}; ValueError where a target hits nothing",
    points=2,
    minutes=10,
    difficulty=1,
    importance=3,
    reference=match_targets,
    generate=models,
    observe=answers,
    tolerance=0,
    properties=(Property(name="the error names the target that hits nothing", test=names_what_it_missed),),
    hints=(
        'model.named_modules() gives (name, module) for every module at any depth. The model itself has the name "".',
        'A name is hit if it is the target, or ends in "." and the target. Two conditions; the dot is what keeps '
        "q_proj apart from qq_proj.",
        '"all-linear" asks the module, not its name: is_linear(module) knows GPT-2\'s Conv1D too. Leave out the one '
        'whose last part, name.rpartition(".")[2], is lm_head.',
        "Collect the targets whose list is empty; if there is one, raise ValueError with them in the text.",
    ),
    bugs=(
        Bug(
            name="substring",
            function=_matching(hits=lambda name, target: target in name),
            why="You asked `target in name`: q_proj then hits q_proj_norm, and 1.mlp.up_proj also layer 11.",
            link="8 · Break it",
        ),
        Bug(
            name="the end without the dot",
            function=_matching(hits=lambda name, target: name.endswith(target)),
            why='endswith(target) without the "." before it: attn.c_proj hits cross_attn.c_proj, and proj everything.',
        ),
        Bug(
            name="the last part alone",
            function=_matching(hits=lambda name, target: name.rpartition(".")[2] == target),
            why="You compared the last part of the name only; attn.c_proj has a dot in it, and is to be told from "
            "mlp.c_proj.",
        ),
        Bug(
            name="only after a dot",
            function=_matching(hits=lambda name, target: name.endswith(f".{target}")),
            why="A module at the top of the model has no dot before its name: it is hit where name == target.",
        ),
        Bug(
            name="the head too",
            function=_matching(head=lambda name: False),
            why="all-linear leaves out lm_head. It is a linear layer, and as wide as the vocabulary: see what it "
            "costs.",
            link="8 · Break it",
        ),
        Bug(
            name="nn.Linear alone",
            function=_matching(linear=lambda module: isinstance(module, nn.Linear)),
            why="GPT-2's Conv1D is a linear layer that is no nn.Linear: ask is_linear(module).",
        ),
        Bug(
            name="whatever has a matrix",
            function=_matching(
                linear=lambda module: getattr(getattr(module, "weight", None), "ndim", 0) == 2,
            ),
            why="An embedding has a matrix as well and is no linear layer: ask is_linear(module).",
        ),
        Bug(
            name="nothing is refused",
            function=_matching(refuses=lambda found: False),
            why="A misspelt target hits nothing, silently, and you train fewer layers than you meant: raise "
            "ValueError.",
        ),
        Bug(
            name="refused only if all miss",
            function=_matching(refuses=lambda found: not any(found.values())),
            why="One good target hides the misspelt one beside it (PEFT lets that pass): every target must hit "
            "something.",
            link="11 · The same in PEFT",
        ),
        Bug(
            name="one name a target",
            function=_matching(keeps=lambda names: names[-1:]),
            why="You kept one name for each target; a target hits a module in every layer: collect a list.",
        ),
        Bug(
            name="an error without a name",
            function=_matching(says="not found"),
            why="The error does not say which target hit nothing. Whoever reads it has seven to choose from.",
        ),
    ),
)

# -------------------------------------------------------------------------------------------------------- 05.2 inject

adapter = partial(lora_layer, r=2, alpha=6.0)


class Refusing:
    """A wrap function that refuses the third module that it gets."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, base: nn.Module) -> nn.Module:
        self.calls += 1
        if self.calls == 3:
            raise TypeError("this layer cannot be wrapped")
        return adapter(base)


Call = tuple[list[str], Wrap | None]  # targets, and a wrap function where it is not the usual one
SCENES: dict[str, tuple[str, list[list[str]]]] = {
    "q_proj and v_proj of Llama": ("llama", [["q_proj", "v_proj"]]),
    "all-linear on GPT-2": ("gpt2", [[ALL_LINEAR]]),
    "q_proj, then k_proj": ("llama", [["q_proj"], ["k_proj"]]),
    "q_proj twice": ("llama", [["q_proj"], ["q_proj"]]),
    "q_proj, then k_proj and q_proj": ("llama", [["q_proj"], ["k_proj", "q_proj"]]),
    "q_proj, then all-linear": ("llama", [["q_proj"], [ALL_LINEAR]]),
    "a misspelt target": ("llama", [["q_proj", "v_porj"]]),
}


def scenes(function: Callable, case: Case) -> dict[str, str]:
    """What becomes of fresh models in each scene, in words; an exception in the first scene comes out."""
    seen = {}
    for number, (scene, (name, calls)) in enumerate(SCENES.items()):
        seen[scene] = played(function, copy.deepcopy(case[name]), calls, [adapter] * len(calls), comes_out=number == 0)
    refused = copy.deepcopy(case["llama"])
    seen["wrap refuses the third module"] = played(function, refused, [["v_proj", "k_proj"]], [Refusing()]).partition(
        ","
    )[0]
    return seen


def played(
    function: Callable, model: nn.Module, calls: list[list[str]], wraps: Sequence[Wrap], comes_out: bool = False
) -> str:
    """Where adapters are after these calls and what trains; and whether the last call was refused."""
    names = [name for name, module in model.named_modules() if name]
    ends = ""
    for targets, wrap in zip(calls, wraps, strict=True):
        try:
            function(model, targets, wrap)
            ends = ""
        except (ValueError, TypeError) as error:
            if comes_out:
                raise
            ends = f"; {'refused' if isinstance(error, ValueError) else 'wrap refused'}"
        except NotImplementedError:
            raise
        except Exception as error:
            if comes_out:
                raise
            return f"raised {type(error).__name__}"
    return state_of(model, names) + ends


def state_of(model: nn.Module, names: Iterable[str]) -> str:
    """Which of these modules have an adapter now, and what trains."""
    adapters = {name: module for name in names if isinstance(module := reached(model, name), AdapterLayer)}
    doubled = {name: module.base for name, module in adapters.items() if isinstance(module.base, AdapterLayer)}
    layers: list[Any] = [*adapters.values(), *doubled.values()]
    wanted = {id(matrix) for layer in layers for matrix in (layer.A, layer.B)}
    trains = {id(each) for each in model.parameters() if each.requires_grad}
    words = [f"adapters on {leaves(adapters)}"]
    words += [f"and inside those on {leaves(doubled)}"] if doubled else []
    if not adapters:
        words.append(f"{len(trains)} tensors train")
    elif trains == wanted:
        words.append("they alone train")
    else:
        words.append(f"{len(trains & wanted)} of {len(wanted)} A and B train and {len(trains - wanted)} others")
    return ", ".join(words)


def reached(model: Any, name: str) -> nn.Module:
    """The module that a forward pass meets under this name."""
    for part in name.split("."):
        model = getattr(model, part)
    return model


def leaves(names: Iterable[str]) -> str:
    """The last parts of names, counted."""
    counts = Counter(name.rpartition(".")[2] for name in names)
    return " ".join(f"{count} {leaf}" for leaf, count in sorted(counts.items())) or "nothing"


@torch.no_grad()
def changes_nothing_at_first(function: Callable, case: Case) -> str | None:
    """With new adapters in it, a model says what it said, bit for bit."""
    tokens = torch.arange(15).reshape(3, 5)
    model = case["gpt2"]  # its forward pass imports nothing, so it runs where a submission is graded
    before = model(tokens)
    function(model, [ALL_LINEAR], adapter)
    if not torch.equal(model(tokens), before):
        return "the output is another one"
    return None


def every_adapter_learns(function: Callable, case: Case) -> str | None:
    """The forward pass goes through every adapter: each B gets a gradient."""
    model = case["gpt2"]
    function(model, ["c_attn", "c_fc"], adapter)
    model(torch.arange(15).reshape(3, 5)).square().sum().backward()
    layers: dict[str, Any] = dict(adapter_layers(model))
    without = [name for name, layer in layers.items() if layer.B.grad is None]
    if not layers:
        return "there is no adapter in the model"
    return f"{len(without)} of {len(layers)} adapters get no gradient, {without[0]} first" if without else None


def wraps_each_once(function: Callable, case: Case) -> str | None:
    """wrap is called once for each module that is hit, also where two targets hit the same one."""
    model, given = case["llama"], []

    def wrap(base: nn.Module) -> nn.Module:
        given.append(id(base))
        return adapter(base)

    n_layers = len(model.model.layers)
    function(model, ["q_proj", "self_attn.q_proj"], wrap)
    return None if len(given) == n_layers else f"wrap was called {len(given)} times for {n_layers} modules"


def names_hit(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """What a learner's match_targets gives, in one list: it does look inside adapters."""
    return list(dict.fromkeys(name for names in _matching()(model, targets).values() for name in names))


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Hang a module in the place of another."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def is_adapted(model: nn.Module, name: str) -> bool:
    """Whether a module is an adapter, or a part of one."""
    return any(name == each or name.startswith(f"{each}.") for each in adapter_layers(model))


def _checked(model: nn.Module, targets: Sequence[str]) -> list[str]:
    names = names_hit(model, targets)
    if any(is_adapted(model, name) for name in names):
        raise ValueError("wrapped already")
    return names


def _wrapped(model: nn.Module, names: Sequence[str], wrap: Wrap) -> None:
    wrapped = {name: wrap(model.get_submodule(name)) for name in names}
    for name, module in wrapped.items():
        put(model, name, module)


def _nothing_checked(model: nn.Module, targets: Sequence[str], wrap: Wrap) -> None:
    for name in names_hit(model, targets):
        put(model, name, wrap(model.get_submodule(name)))
    freeze_all_but_adapters(model)


def _one_by_one(model: nn.Module, targets: Sequence[str], wrap: Wrap) -> None:
    for name in _checked(model, targets):
        put(model, name, wrap(model.get_submodule(name)))
    freeze_all_but_adapters(model)


def _not_inside(model: nn.Module, targets: Sequence[str], wrap: Wrap) -> None:
    names = names_hit(model, targets)
    if any(isinstance(model.get_submodule(name), AdapterLayer) for name in names):
        raise ValueError("wrapped already")
    _wrapped(model, names, wrap)
    freeze_all_but_adapters(model)


def _skips(model: nn.Module, targets: Sequence[str], wrap: Wrap) -> None:
    _wrapped(model, [name for name in names_hit(model, targets) if not is_adapted(model, name)], wrap)
    freeze_all_but_adapters(model)


def _rest_trains(model: nn.Module, targets: Sequence[str], wrap: Wrap) -> None:
    _wrapped(model, _checked(model, targets), wrap)


def _all_frozen(model: nn.Module, targets: Sequence[str], wrap: Wrap) -> None:
    _wrapped(model, _checked(model, targets), wrap)
    model.requires_grad_(False)


def _earlier_frozen(model: nn.Module, targets: Sequence[str], wrap: Wrap) -> None:
    names = _checked(model, targets)
    model.requires_grad_(False)
    _wrapped(model, names, wrap)


def _dotted(model: nn.Module, targets: Sequence[str], wrap: Wrap) -> None:
    for name, module in {name: wrap(model.get_submodule(name)) for name in _checked(model, targets)}.items():
        setattr(model, name, module)  # a new module whose name has dots in it; nobody calls it
    freeze_all_but_adapters(model)


def _loop_variable(model: nn.Module, targets: Sequence[str], wrap: Wrap) -> None:
    for name in _checked(model, targets):
        module = model.get_submodule(name)
        module = wrap(module)
    freeze_all_but_adapters(model)


def _a_copy(model: nn.Module, targets: Sequence[str], wrap: Wrap) -> nn.Module:
    copied = copy.deepcopy(model)
    inject(copied, targets, wrap)
    return copied


def _walks_on(model: nn.Module, targets: Sequence[str], wrap: Wrap) -> None:
    _checked(model, targets)

    def visit(module: nn.Module, prefix: str = "") -> None:
        for name, child in module.named_children():
            whole = f"{prefix}{name}"
            is_target = is_linear(child) and not is_head(whole) if ALL_LINEAR in targets else False
            if is_target or any(ends_in(whole, target) for target in targets):
                setattr(module, name, wrap(child))
        for name, child in module.named_children():
            visit(child, f"{prefix}{name}.")

    visit(model)
    freeze_all_but_adapters(model)


INJECT = Exercise(
    id="05.2",
    title="Inject",
    asks="inject(model, targets, wrap) puts wrap(module) in the place of each module hit, in place; only adapters "
    "train",
    points=4,
    minutes=15,
    difficulty=3,
    importance=3,
    reference=inject,
    generate=small_models,
    observe=scenes,
    tolerance=0,
    properties=(
        Property(name="new adapters change nothing, bit for bit", test=changes_nothing_at_first),
        Property(name="every adapter is reached: each B gets a gradient", test=every_adapter_learns),
        Property(name="wrap is called once for each module", test=wraps_each_once),
    ),
    hints=(
        "Four steps, in this order: find the names (05.1), refuse, wrap all of them into a dict, and only then put "
        "them "
        "in. Then freeze_all_but_adapters(model).",
        "Refuse with a ValueError if one of the names is an adapter or lies inside one: adapter_layers(model) gives "
        "the "
        'names of those there are; inside means that the name starts with one of them and a ".".',
        'A module hangs in its parent: parent, _, leaf = name.rpartition("."), then '
        "setattr(model.get_submodule(parent), leaf, module).",
        "Two targets may hit one module: dict.fromkeys(names) keeps each name once.",
    ),
    bugs=(
        Bug(
            name="nothing is checked",
            function=_nothing_checked,
            why="Nothing is looked at before the first module is replaced: a second call goes inside the adapters of "
            "the "
            "first, or stops half-way with some modules replaced.",
            link="8 · Break it",
        ),
        Bug(
            name="one by one",
            function=_one_by_one,
            why="You replace each module as soon as it is wrapped; where wrap refuses the third, two are replaced "
            "already. Wrap all, then put them in.",
        ),
        Bug(
            name="adapters inside adapters",
            function=_not_inside,
            why="You refuse a hit that is an adapter; all-linear also finds the base inside it, and wraps that. Refuse "
            "what lies inside one, too.",
            link="8 · Break it",
        ),
        Bug(
            name="skips what is wrapped",
            function=_skips,
            why="A second call passes as if it had done something. Its r and alpha are ignored without a word: refuse "
            "it.",
        ),
        Bug(
            name="the rest still trains",
            function=_rest_trains,
            why="wrap freezes the base of each adapter; embeddings, norms and other layers still train: freeze all but "
            "adapters.",
            link="lesson 04",
        ),
        Bug(
            name="the adapters frozen too",
            function=_all_frozen,
            why="model.requires_grad_(False) at the end freezes A and B as well: use freeze_all_but_adapters(model).",
        ),
        Bug(
            name="earlier adapters frozen",
            function=_earlier_frozen,
            why="model.requires_grad_(False) before you wrap also freezes the adapters of an earlier call: after "
            "q_proj, then k_proj, both must train.",
        ),
        Bug(
            name="the whole name as an attribute",
            function=_dotted,
            why='setattr(model, "layers.0.q_proj", …) makes a new module with dots in its name, which nobody calls: '
            "set "
            "the last part, on the parent.",
            link="8 · Break it",
        ),
        Bug(
            name="only the loop's variable",
            function=_loop_variable,
            why="module = wrap(module) gives your variable a new value; the model still holds the old module: setattr "
            "on its parent.",
        ),
        Bug(
            name="a copy",
            function=_a_copy,
            why="You changed a copy of the model; the caller's own is as before. Change it in place.",
        ),
        Bug(
            name="walks into what it put in",
            function=_walks_on,
            why="The walk goes on into the adapter that it has just made, finds a linear layer there, wraps it, and "
            "so on. "
            "Collect all names before you change anything.",
        ),
    ),
)

# --------------------------------------------------------------------------------------------------------- 05.3 count

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION, FEED_FORWARD = KINDS[:4], KINDS[4:]


def architecture_inputs(rng: np.random.Generator) -> Case:
    """A Llama with few heads of keys, head_dim ≠ hidden / heads, and a set of targets with k and down in it."""
    n_kv_heads = int(rng.integers(2, 4))
    arch = Architecture(
        family="llama",
        n_layers=int(rng.integers(3, 7)),
        hidden=int(rng.integers(50, 70)),
        intermediate=int(rng.integers(100, 140)),
        n_heads=4 * n_kv_heads,
        n_kv_heads=n_kv_heads,
        head_dim=2 * int(rng.integers(5, 8)),
        vocab=int(rng.integers(150, 200)),
    )
    return {"arch": arch, "r": int(rng.integers(3, 9)), "targets": ["q_proj", "k_proj", "o_proj", "down_proj"]}


def counts(function: Callable, case: Case) -> tuple[Any, Any]:
    """The count for some targets, and for all-linear."""
    arch, r = case["arch"], case["r"]
    return function(arch, r, list(case["targets"])), function(arch, r, ALL_LINEAR)


def is_a_real_model_s(function: Callable, case: Case) -> str | None:
    """It is what a model without memory counts after inject."""
    for targets in (case["targets"], ["v_proj"], ALL_LINEAR):
        model = of_shape(case["arch"])
        report = inject(model, targets, lambda base: LoRALinear(base, r=case["r"], alpha=1.0))
        told = function(case["arch"], case["r"], targets)
        if told != report.count.trainable:
            return f"{told!r} for {targets}; inject counts {report.count.trainable:,} in the model"
    return None


PUBLISHED: dict[tuple[str, int, str], int] = {  # r · Σ (in + out) · layers, by hand in section 5
    ("llama-2-7b", 16, "q_proj v_proj"): 8_388_608,
    ("llama-2-7b", 16, "q_proj k_proj v_proj o_proj"): 16_777_216,
    ("llama-2-7b", 16, ALL_LINEAR): 39_976_960,
    ("llama-3-8b", 16, "q_proj v_proj"): 6_815_744,
    ("llama-3-8b", 16, ALL_LINEAR): 41_943_040,
    ("smollm2-135m", 16, ALL_LINEAR): 4_884_480,
}


def is_right_for_real_models(function: Callable, case: Case) -> str | None:
    """Llama-2-7B, Llama-3-8B and SmolLM2-135M."""
    for (name, r, targets), wanted in PUBLISHED.items():
        told = function(ARCHITECTURES[name], r, targets if targets == ALL_LINEAR else targets.split())
        if told != wanted:
            return f"{told!r} for {name}, r = {r}, {targets}; it is {wanted:,}"
    return None


def _counting(
    features: Callable[[Architecture, Linear], tuple[int, int]] = lambda arch, linear: (
        linear.in_features,
        linear.out_features,
    ),
    params: Callable[[int, int, int], int] = lambda r, m, n: r * (m + n),
    layers: Callable[[Architecture], int] = lambda arch: arch.n_layers,
    all_linear: Sequence[str] = KINDS,
    extra: Callable[[Architecture, int], int] = lambda arch, r: 0,
) -> Callable[[Architecture, int, str | Sequence[str]], int]:
    """A learner's count, right but for what is given."""

    def count(arch: Architecture, r: int, targets: str | Sequence[str]) -> int:
        wanted = all_linear if targets == ALL_LINEAR else targets
        chosen = [linear for linear in layer_linears(arch) if linear.name.rpartition(".")[2] in wanted]
        one_layer = sum(params(r, *features(arch, linear)) for linear in chosen)
        return layers(arch) * one_layer + (extra(arch, r) if targets == ALL_LINEAR else 0)

    return count


def _leaf(linear: Linear) -> str:
    return linear.name.rpartition(".")[2]


def _without_gqa(arch: Architecture, linear: Linear) -> tuple[int, int]:
    q = arch.n_heads * arch.head_dim
    return (arch.hidden, q) if _leaf(linear) in ("k_proj", "v_proj") else (linear.in_features, linear.out_features)


def _hidden_for_heads(arch: Architecture, linear: Linear) -> tuple[int, int]:
    return (arch.hidden, arch.hidden) if _leaf(linear) in ("q_proj", "o_proj") else _plain(linear)


def _head_dim_by_division(arch: Architecture, linear: Linear) -> tuple[int, int]:
    kv = arch.n_kv_heads * (arch.hidden // arch.n_heads)
    if _leaf(linear) in ("k_proj", "v_proj"):
        return arch.hidden, kv
    return _hidden_for_heads(arch, linear)


def _plain(linear: Linear) -> tuple[int, int]:
    return linear.in_features, linear.out_features


COUNT = Exercise(
    id="05.3",
    title="What a set of targets counts",
    asks="count(arch, r, targets) -> parameters of all A and B; targets is a list of names or 'all-linear'",
    points=3,
    minutes=12,
    difficulty=2,
    importance=3,
    reference=lora_params,
    generate=architecture_inputs,
    observe=counts,
    outputs=("q, k, o and down", "all-linear"),
    tolerance=0,
    properties=(
        Property(name="it is what inject counts in a real model of that shape", test=is_a_real_model_s),
        Property(name="six counts of Llama-2-7B, Llama-3-8B and SmolLM2-135M", test=is_right_for_real_models),
    ),
    hints=(
        "A is (r, in) and B is (out, r): a matrix costs r · (in + out). So all that is asked is in and out of seven "
        "matrices.",
        "The heads decide: q makes n_heads · head_dim numbers, k and v make n_kv_heads · head_dim each, and o takes "
        "what "
        "q makes.",
        "gate and up go from hidden to intermediate, down the other way. Put in + out into a dict by name, and sum "
        "over "
        "the targets; then times r, times n_layers.",
        '"all-linear" is a string and stands for the seven: `for name in "all-linear"` would go through its letters.',
    ),
    bugs=(
        Bug(
            name="k and v as wide as q",
            function=_counting(features=_without_gqa),
            why="k and v have n_kv_heads heads, and Llama-3 has a quarter as many of those as of queries: that is GQA.",
            link="5 · Derivation",
        ),
        Bug(
            name="every matrix a square",
            function=_counting(features=lambda arch, linear: (arch.hidden, arch.hidden)),
            why="You took hidden × hidden for all seven; only q and o of some models are square.",
        ),
        Bug(
            name="head_dim by division",
            function=_counting(features=_head_dim_by_division),
            why="You took hidden / n_heads for the width of a head; it is a number of its own, arch.head_dim.",
        ),
        Bug(
            name="q and o square",
            function=_counting(features=_hidden_for_heads),
            why="q makes n_heads · head_dim numbers and o takes them; that need not be hidden.",
        ),
        Bug(
            name="one layer",
            function=_counting(layers=lambda arch: 1),
            why="You counted one layer: times arch.n_layers.",
        ),
        Bug(
            name="the whole update",
            function=_counting(params=lambda r, m, n: m * n),
            why="You counted the matrix, in · out. A and B have r · in and r · out.",
        ),
        Bug(
            name="A alone",
            function=_counting(params=lambda r, m, n: r * m),
            why="You counted A, r · in, and not B, out · r.",
        ),
        Bug(
            name="twice A",
            function=_counting(params=lambda r, m, n: 2 * r * m),
            why="2 · r · in holds for square matrices only; B has out · r.",
        ),
        Bug(
            name="a product for a sum",
            function=_counting(params=lambda r, m, n: r * m * n),
            why="r · in · out is what forming B A costs in multiplications; the parameters are r · (in + out).",
        ),
        Bug(
            name="all-linear is attention",
            function=_counting(all_linear=ATTENTION),
            why="all-linear has seven matrices a layer: gate, up and down too, which are the largest.",
        ),
        Bug(
            name="all-linear with the head",
            function=_counting(extra=lambda arch, r: r * (arch.hidden + arch.vocab)),
            why="all-linear leaves the output head out.",
        ),
    ),
)

# -------------------------------------------------------------------------------------------------------- 05.4 budget


def best_targets(gains: Mapping[str, float], costs: Mapping[str, int], budget: int) -> set[str]:
    """The set of names with the largest sum of gains among those whose costs do not exceed the budget in sum.

    >>> sorted(best_targets({"q": 2.0, "v": 3.0, "up": 4.0}, {"q": 1, "v": 1, "up": 2}, budget=2))
    ['q', 'v']
    """
    sets = [names for size in range(len(gains) + 1) for names in itertools.combinations(gains, size)]
    within = [names for names in sets if sum(costs[name] for name in names) <= budget]
    return set(max(within, key=lambda names: sum(gains[name] for name in names)))


def _greedy(order: Callable[[str, Mapping[str, float], Mapping[str, int]], float], stops: bool = False) -> Callable:
    """Take names in an order for as long as they fit; `stops` at the first that does not."""

    def choose(gains: Mapping[str, float], costs: Mapping[str, int], budget: int) -> set[str]:
        chosen: set[str] = set()
        for name in sorted(gains, key=lambda name: order(name, gains, costs), reverse=True):
            if sum(costs[each] for each in chosen) + costs[name] <= budget:
                chosen.add(name)
            elif stops:
                break
        return chosen

    return choose


def _by_gain(name: str, gains: Mapping[str, float], costs: Mapping[str, int]) -> float:
    return gains[name]


def _by_ratio(name: str, gains: Mapping[str, float], costs: Mapping[str, int]) -> float:
    return gains[name] / costs[name]


def _cheapest(name: str, gains: Mapping[str, float], costs: Mapping[str, int]) -> float:
    return -costs[name]


def _below(gains: Mapping[str, float], costs: Mapping[str, int], budget: int) -> set[str]:
    return best_targets(gains, costs, budget - 1)


def _fullest(gains: Mapping[str, float], costs: Mapping[str, int], budget: int) -> set[str]:
    return best_targets(dict(costs), costs, budget)


def _one_name(gains: Mapping[str, float], costs: Mapping[str, int], budget: int) -> set[str]:
    fits = [name for name in gains if costs[name] <= budget]
    return {max(fits, key=lambda name: gains[name])} if fits else set()


def _each_alone(gains: Mapping[str, float], costs: Mapping[str, int], budget: int) -> set[str]:
    return {name for name in gains if costs[name] <= budget}


BUDGET_BUGS = (
    Bug(
        name="the largest gain first",
        function=_greedy(_by_gain),
        why="You took the largest gain, then the next that fits. Two smaller ones may give more for the same money.",
    ),
    Bug(
        name="the largest gain per parameter first",
        function=_greedy(_by_ratio),
        why="You took the best gain per parameter first. What is left over at the end may be worth more in another "
        "set: "
        "try all 128.",
        link="7 · Run it",
    ),
    Bug(
        name="stops at the first that does not fit",
        function=_greedy(_by_ratio, stops=True),
        why="You stopped at the first one that was too dear; a cheaper one behind it may still fit.",
    ),
    Bug(
        name="the cheapest first",
        function=_greedy(_cheapest),
        why="You took as many as possible, the cheapest first, and never asked what they gain.",
    ),
    Bug(
        name="strictly below",
        function=_below,
        why="A set that costs exactly the budget is within it: at most, not less than.",
    ),
    Bug(
        name="the fullest set",
        function=_fullest,
        why="You spent as much of the budget as possible; asked for is the largest gain.",
    ),
    Bug(
        name="one alone",
        function=_one_name,
        why="You chose among single names; a set may have up to seven.",
    ),
    Bug(
        name="each for itself",
        function=_each_alone,
        why="Each of these fits alone; together they exceed the budget. It is their sum that counts.",
    ),
)


def budget_inputs(rng: np.random.Generator) -> Case:
    """Gains and costs of seven kinds, and a budget, for which every rule of thumb fails and no two sets tie."""
    rules = [bug.function for bug in BUDGET_BUGS]
    while True:
        case: Case = {
            "gains": {kind: round(float(rng.uniform(1, 15)), 2) for kind in KINDS},
            "costs": {kind: int(rng.integers(300, 2200)) for kind in KINDS},
            "budget": int(rng.integers(3000, 6000)),
        }
        told = [tuple(chosen(rule, case).values()) for rule in (best_targets, *rules)]
        if len(set(told)) == len(told) and not _ties(case["gains"]):
            return case


def _ties(gains: Mapping[str, float]) -> bool:
    """Whether two sets gain the same, so that rounding would decide between them."""
    sets = itertools.product((False, True), repeat=len(gains))
    sums = sorted(math.fsum(itertools.compress(gains.values(), each)) for each in sets)
    return any(above - below < 1e-6 for below, above in itertools.pairwise(sums))


def chosen(function: Callable, case: Case) -> dict[str, str]:
    """The chosen names as words: under the budget, and under one that the best set meets exactly."""
    gains, costs, budget = case.values()
    exact = sum(costs[name] for name in best_targets(gains, costs, budget))
    return {f"budget {each:,}": in_words(function(gains, costs, each)) for each in (budget, exact)}


def in_words(names: Any) -> str:
    """A set of names, sorted, or what came instead."""
    if names is ...:
        raise NotImplementedError
    if isinstance(names, str) or not isinstance(names, Collection):
        return f"a {type(names).__name__}, not a set of names"
    return ", ".join(sorted(str(name).removesuffix("_proj") for name in names)) or "nothing"


def is_best_at_other_budgets(function: Callable, case: Case) -> str | None:
    """At 0, at the cheapest, at half, and where everything fits."""
    gains, costs, budget = case.values()
    for other in (0, min(costs.values()), budget // 2, sum(costs.values())):
        told, best = (in_words(choose(gains, costs, other)) for choose in (function, best_targets))
        if told != best:
            return f"{told} with a budget of {other:,}; the best is {best}"
    return None


BUDGET = Exercise(
    id="05.4",
    title="The best set under a budget",
    asks="best_targets(gains, costs, budget) -> the set of names with the largest total gain whose cost is at most "
    "budget",
    points=2,
    minutes=10,
    difficulty=2,
    importance=2,
    reference=best_targets,
    generate=budget_inputs,
    observe=chosen,
    tolerance=0,
    properties=(Property(name="it is the best at other budgets, 0 among them", test=is_best_at_other_budgets),),
    hints=(
        "Seven names have 2⁷ = 128 sets, the empty one among them. Try them all.",
        "itertools.combinations(gains, size) gives all sets of a size; size goes from 0 to len(gains).",
        "Keep those whose sum of costs is ≤ budget, and return set(max(those, key=…)) with the sum of gains as key.",
    ),
    bugs=BUDGET_BUGS,
)


def fill_with_gradient(model: nn.Module, gradients: Mapping[str, Any], lr: float) -> None:
    """Give the adapter on each of these layers the step −lr · Gᵣ: B = −lr · U diag(S), A = Vᵀ, where alpha = r."""
    layers: dict[str, Any] = dict(adapter_layers(model))
    with torch.no_grad():
        for name, layer in layers.items():
            gradient, r = gradients[name], layer.r
            layer.A.copy_(gradient.V[:, :r].T)
            layer.B.copy_(-lr / layer.scaling * gradient.U[:, :r] * gradient.S[:r])


EXERCISES = [MATCH, INJECT, COUNT, BUDGET]
