"""Every method by its name: how it is put on a model, what takes its steps, and how it is written.

    put_new(model, "ia3", Settings())             the model has it, and only what is its own trains
    METHODS["ia3"].learning(Settings())           what fine_tune takes as `learning`
    METHODS["ia3"].save(model, folder)            None where all weights train: then the model is what is written

A method looks at some of the settings, those in `uses`.

Read before: methods, train/settings, train/finetune.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import nn
from tqdm import tqdm

from minilora.llm.model import Decoder
from minilora.methods import (
    GaLoreAdamW,
    HoulsbyLinear,
    LoftQLinear,
    PrefixTuning,
    PromptTuning,
    RankAllocator,
    RankSchedule,
    adalora_layer,
    dora_layer,
    inject_ia3,
    loraplus_groups,
    olora_layer,
    orthogonality,
    pissa_layer,
    rank_report,
    save_adalora,
    save_houlsby,
    save_ia3,
    save_prompt,
)
from minilora.qlora import PagedAdamW
from minilora.qlora.linear import DEFAULT_FORM, kept_as
from minilora.torch_lora import inject, lora_layer, save_adapter
from minilora.torch_lora.inject import match_targets
from minilora.train.finetune import Learning, Recipe, by_adamw
from minilora.train.settings import Settings

GAMMA = 0.5  # of AdaLoRA's penalty, as in its authors' code


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method, as training and the command line need it."""

    does: str
    uses: frozenset[str]  # settings that it looks at, besides the seed
    put: Callable[[Decoder, Settings], None]  # drawn from torch's own generator: put_new seeds it
    learning: Callable[[Settings], Callable[[nn.Module, Recipe, int], Learning]] = lambda settings: by_adamw
    save: Callable[..., None] | None = save_adapter
    report: Callable[[nn.Module], str] = lambda model: ""  # of what it found, in lines
    lr: float = 2e-4  # where none is given
    in_processes: bool = False  # torchrun's; tested with these
    decays: bool = True  # whether a weight decay has something to pull at: torch_lora/decay


def put_new(model: Decoder, name: str, settings: Settings) -> None:
    """Put a new one on a model, in place; the same for the same seed.

    Raises:
        ValueError, TypeError: as the method's layers do.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        METHODS[name].put(model, settings)


# --- how each is put on a model -----------------------------------------------------------------------------------


def _lora(model: Decoder, s: Settings, wrap: Callable[..., nn.Module], form: str | None = None) -> None:
    keep = kept_as(form)

    def layer(base: nn.Module) -> nn.Module:
        return wrap(keep(base), r=s.r, alpha=s.alpha_or_2r, dropout=s.dropout, use_rslora=s.use_rslora)

    inject(model, s.targets, layer)


def _begun_by_weights(model: Decoder, s: Settings, wrap: Callable[..., nn.Module]) -> None:
    """A singular value decomposition or the like of every weight: seconds of a small model, minutes of a large one."""
    n_layers = sum(len(names) for names in match_targets(model, s.targets).values())
    with tqdm(total=n_layers, desc="directions of the weights", unit="layer", leave=False, disable=None) as bar:

        def layer(base: nn.Module) -> nn.Module:
            made = wrap(base, r=s.r, alpha=s.alpha_or_2r, dropout=s.dropout, use_rslora=s.use_rslora)
            bar.update()
            return made

        inject(model, s.targets, layer)


def _adalora(model: Decoder, s: Settings) -> None:
    inject(model, s.targets, lambda base: adalora_layer(base, r=s.first_r, alpha=s.first_alpha, dropout=s.dropout))


def _ia3(model: Decoder, s: Settings) -> None:
    inject_ia3(model, outputs=["k_proj", "v_proj"], inputs=["down_proj"])


def _houlsby(model: Decoder, s: Settings) -> None:
    inject(model, ["o_proj", "down_proj"], lambda base: HoulsbyLinear(base, bottleneck=s.bottleneck))


def _prefix(model: Decoder, s: Settings) -> None:
    inject(
        model,
        ["model"],
        lambda base: PrefixTuning(base, n_virtual=s.n_virtual, mlp_features=s.mlp_features, words=s.words),
    )


def _prompt(model: Decoder, s: Settings) -> None:
    inject(model, ["model"], lambda base: PromptTuning(base, n_virtual=s.n_virtual, words=s.words))


def _all_weights(model: Decoder, s: Settings) -> None:
    if narrow := sorted({str(p.dtype) for p in model.parameters() if p.dtype != torch.float32}):
        raise ValueError(
            f"all weights train, and these are {', '.join(narrow)}, where a step that is smaller than a part in 256 of "
            "a weight is lost: load the model in float32 (--dtype fp32)"
        )
    model.requires_grad_(True)


# --- what takes their steps ---------------------------------------------------------------------------------------


def _with_loraplus(s: Settings) -> Callable[[nn.Module, Recipe, int], Learning]:
    if s.loraplus_ratio is None:
        return by_adamw
    ratio = s.loraplus_ratio

    def begin(model: nn.Module, recipe: Recipe, n_steps: int) -> Learning:
        groups = loraplus_groups(model, lr=recipe.lr, ratio=ratio, weight_decay=recipe.weight_decay)
        return Learning(optimizer=PagedAdamW(groups, lr=recipe.lr, state_bits=recipe.state_bits))

    return begin


def _with_budget(s: Settings) -> Callable[[nn.Module, Recipe, int], Learning]:
    """AdaLoRA's: ranks fall from a tenth of the steps to seven tenths, and the last three tenths tune what is left.

    An adapter that is saved before then, as the best of a run may be, has the ranks of its step.
    """

    def begin(model: nn.Module, recipe: Recipe, n_steps: int) -> Learning:
        optimizer = by_adamw(model, recipe, n_steps).optimizer
        schedule = RankSchedule(target_r=s.r, n_steps=n_steps, t_init=n_steps // 10, t_final=3 * n_steps // 10)
        allocator = RankAllocator(model, schedule)
        optimizer.register_step_post_hook(lambda *_: allocator.step(allocator.done + 1))
        return Learning(optimizer=optimizer, penalty=lambda: GAMMA * orthogonality(model), beside=allocator)

    return begin


def _projected(s: Settings) -> Callable[[nn.Module, Recipe, int], Learning]:
    """GaLore's: the matrices of attention and MLP are projected; embeddings, head and norms are not."""

    def begin(model: nn.Module, recipe: Recipe, n_steps: int) -> Learning:
        if recipe.state_bits != 32:
            raise ValueError(f"galore is an AdamW of its own, with moments in 32 bits, not {recipe.state_bits}")
        linear = {m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p in linear]},
            {"params": [p for p in trained if p not in linear], "r": None},
        ]
        optimizer = GaLoreAdamW(
            groups, lr=recipe.lr, r=s.r, refresh=s.refresh, scale=s.galore_scale, weight_decay=recipe.weight_decay
        )
        if not optimizer.report().n_projected:
            raise ValueError(f"r is {s.r}, and no matrix has both sides above it: GaLore would be AdamW, choose less")
        return Learning(optimizer=optimizer)

    return begin


# --- all of them --------------------------------------------------------------------------------------------------

LORA = frozenset({"r", "alpha", "dropout", "use_rslora", "targets", "loraplus_ratio"})
BEGUN = LORA - {"loraplus_ratio"}

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "lora": Method(
            does="B A beside every linear layer",
            uses=LORA,
            put=partial(_lora, wrap=lora_layer),
            learning=_with_loraplus,
            in_processes=True,
        ),
        "dora": Method(
            does="LoRA for the direction of each row, its length apart",
            uses=LORA,
            put=partial(_lora, wrap=dora_layer),
            learning=_with_loraplus,
            in_processes=True,
        ),
        "qlora": Method(
            does="LoRA over weights in 4 bits",
            uses=LORA,
            put=partial(_lora, wrap=lora_layer, form=DEFAULT_FORM),
            learning=_with_loraplus,
            in_processes=True,
        ),
        "adalora": Method(
            lr=1e-3,
            does="LoRA whose layers compete for rank",
            uses=LORA - {"use_rslora", "loraplus_ratio"} | {"start_r"},
            put=_adalora,
            learning=_with_budget,
            report=lambda model: f"{rank_report(model)}\n",
            save=save_adalora,
        ),
        "pissa": Method(
            does="LoRA that begins at the weights' largest directions",
            uses=BEGUN,
            put=partial(_begun_by_weights, wrap=pissa_layer),
            decays=False,
        ),
        "olora": Method(
            does="LoRA that begins at orthonormal directions of the weights",
            uses=BEGUN,
            put=partial(_begun_by_weights, wrap=olora_layer),
            decays=False,
        ),
        "loftq": Method(
            does="LoRA over 4 bits that begins with what rounding took",
            uses=BEGUN,
            put=partial(_begun_by_weights, wrap=LoftQLinear),
            decays=False,
        ),
        "ia3": Method(
            lr=1e-2,
            does="a factor for each key, value and input of down_proj",
            uses=frozenset(),
            put=_ia3,
            save=save_ia3,
            decays=False,
        ),
        "houlsby": Method(
            lr=1e-3,
            does="two small layers after attention and after the MLP",
            uses=frozenset({"bottleneck"}),
            put=_houlsby,
            save=save_houlsby,
        ),
        "prefix": Method(
            lr=1e-2,
            does="learned keys and values before every text",
            uses=frozenset({"n_virtual", "words", "mlp_features"}),
            put=_prefix,
            save=save_prompt,
        ),
        "prompt": Method(
            lr=3e-2,
            does="learned embeddings before every text",
            uses=frozenset({"n_virtual", "words"}),
            put=_prompt,
            save=save_prompt,
        ),
        "galore": Method(
            lr=1e-3,
            does="all weights, with moments of projected gradients",
            uses=frozenset({"r", "refresh", "galore_scale"}),
            put=_all_weights,
            learning=_projected,
            save=None,
        ),
        "full": Method(lr=2e-5, does="all weights", uses=frozenset(), put=_all_weights, save=None),
    }
)
