"""Serving: a batch in which every row has its own adapter is each row alone with that adapter in the model."""

import copy
import json
import threading
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minilora.cpu import Linear, each
from minilora.llm import Decoder, ModelConfig, generate
from minilora.qlora import NF4Linear
from minilora.torch_lora import LoRALinear, batch_rows, inject, load_adapter, remove, save_adapter
from minilora.torch_lora.adapter_cache import AdapterError
from minilora.torch_lora.serve import AdapterServer, RoutedLinear

PLENTY = 10**9
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}  # half a step beside 1


class Block(nn.Module):
    """Three layers of one x, called as the decoder does, and one that narrows their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = Linear(32, 48), Linear(32, 16), Linear(32, 16, bias=False)
        self.o_proj = nn.Linear(48, 32)

    def forward(self, x):
        q, k, v = each(x, self.q_proj, self.k_proj, self.v_proj)
        return self.o_proj(torch.tanh(q) + torch.cat((k, v, k), dim=-1))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(32, 20)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.lm_head(x)


KINDS = {  # every one differs from the others in r, strength, targets, or scaling
    "r1": (["q_proj", "v_proj"], {"r": 1, "alpha": 3.0}),
    "r4": ("all-linear", {"r": 4, "alpha": 8.0}),
    "r16": ("all-linear", {"r": 16, "alpha": 5.0}),
    "rslora": (["o_proj", "k_proj"], {"r": 4, "alpha": 7.0, "use_rslora": True}),
    "q": (["q_proj"], {"r": 2, "alpha": 2.0}),
}


@pytest.fixture
def model() -> Model:
    return Model().eval()


def write_adapters(model: nn.Module, folder: Path, kinds=KINDS) -> dict[str, Path]:
    folders = {}
    for name, (targets, settings) in kinds.items():
        inject(model, targets, lambda base, s=settings: LoRALinear(base, **s))
        for layer in model.modules():
            if isinstance(layer, LoRALinear):
                nn.init.normal_(layer.B, std=0.3)
        folders[name] = folder / name
        save_adapter(model, folders[name])
        remove(model)
    return folders


def server_of(model: nn.Module, folders: dict[str, Path], limit_bytes: int = PLENTY, **options) -> AdapterServer:
    server = AdapterServer(model, limit_bytes=limit_bytes, **options)
    for name, folder in folders.items():
        server.cache.register(name, folder)
    return server


def alone(model: nn.Module, folder: Path | None, x: torch.Tensor) -> torch.Tensor:
    """One row with its adapter in a copy of the model, as load_adapter puts it there."""
    model = copy.deepcopy(model)
    if folder is not None:
        load_adapter(model, folder)
    with torch.inference_mode():
        return model.eval()(x[None])[0]


MIXES = [
    ["r1", "r4", "r16", "rslora", "q"],
    ["r16", None, "r4", "r16", None, "r1", "r16"],
    ["r4", "r16", "r4", "r16"],  # slots of two rows, which do not lie together
    ["r4", "r4", "r4"],
    [None, None],
    ["q"],
]


@pytest.mark.parametrize("seq", [1, 3, 40])
@pytest.mark.parametrize("names", MIXES, ids=lambda names: "-".join(map(str, names)))
def test_every_row_is_what_it_is_alone_with_its_adapter(model, tmp_path, names, seq):
    """In float64, where 100 products of numbers near 1 are summed: 2⁻⁵³ · 100 · the depth leaves 1e-12."""
    folders = write_adapters(model, tmp_path)
    model.double()
    served = copy.deepcopy(model)
    server = server_of(served, folders)
    x = torch.randn(len(names), seq, 32, dtype=torch.float64)

    with server.rows(names), torch.inference_mode():
        together = served(x)

    for row, name in enumerate(names):
        expected = alone(model, folders.get(name), x[row])
        torch.testing.assert_close(together[row], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("few_tokens", [0, 8], ids=["in-bfloat16", "in-float32"])
@pytest.mark.parametrize("seq", [1, 5])
def test_in_bfloat16_a_row_is_within_the_roundings_of_both_ways(model, tmp_path, seq, few_tokens, monkeypatch):
    """One layer: y = W x + s·B (A x) with x, W, A, B in bfloat16.

    Alone, u is rounded twice (the product and its scaling), and y twice (base, sum); here s·A and u are rounded once
    each, and y twice. With unit 2⁻⁸ and magnitudes M = |W| |x| + |bias| and P = s·|B| (|A| |x|), two such results
    differ by at most (2 + 2)·unit·(M + P) for y and (2 + 2)·unit·P for u and s·A: 8 units of M + P hold both, and the
    float32 sums of 48 terms (48 · 2⁻²⁴) are nothing beside them.
    """
    monkeypatch.setattr(batch_rows, "FEW_TOKENS", few_tokens)
    kinds = {name: (["q_proj"], settings) for name, (_, settings) in KINDS.items()}
    folders = write_adapters(model, tmp_path, kinds)
    model.bfloat16()
    layer = model.layers[0].q_proj
    served = copy.deepcopy(model)
    server = server_of(served, folders)
    names = ["r1", None, "r16", "rslora", "r4", "r16"]
    x = torch.randn(len(names), seq, 32).bfloat16()

    with server.rows(names), torch.inference_mode():
        together = served.layers[0].q_proj(x)

    for row, name in enumerate(names):
        adapted = copy.deepcopy(model)
        bound = x[row].float().abs() @ layer.weight.float().abs().T + layer.bias.float().abs()
        if name:
            load_adapter(adapted, folders[name])
            it = adapted.layers[0].q_proj
            bound += it.scaling * (x[row].float().abs() @ it.A.abs().T) @ it.B.abs().T
        with torch.inference_mode():
            expected = adapted.layers[0].q_proj(x[row][None])[0]
        difference = (together[row].float() - expected.float()).abs()
        assert (difference <= 8 * UNIT[torch.bfloat16] * bound).all(), name


def test_rows_without_an_adapter_have_the_bits_of_the_plain_base(model, tmp_path):
    folders = write_adapters(model, tmp_path)
    served = copy.deepcopy(model)
    server = server_of(served, folders)
    x = torch.randn(4, 3, 32)

    with server.rows(["r4", None, "r16", None]), torch.inference_mode():
        together = served(x)

    with torch.inference_mode():
        plain = model(x)
    assert torch.equal(together[[1, 3]], plain[[1, 3]])
    assert not torch.allclose(together[[0, 2]], plain[[0, 2]], atol=1e-2)


def test_outside_the_with_and_after_close_the_model_is_the_plain_base(model, tmp_path):
    folders = write_adapters(model, tmp_path)
    x, before = torch.randn(2, 3, 32), dict(model.named_modules())
    plain = model(x)
    server = server_of(model, folders)
    with server.rows(["r4", "r16"]):
        assert not torch.equal(model(x), plain)
    assert torch.equal(model(x), plain)
    with pytest.raises(ZeroDivisionError), server.rows(["r4", "r16"]):
        raise ZeroDivisionError
    assert torch.equal(model(x), plain)

    server.close()

    assert dict(model.named_modules()) == before
    assert torch.equal(model(x), plain)


def test_every_target_is_wrapped_once_and_the_head_is_not(model):
    AdapterServer(model, limit_bytes=PLENTY)

    assert sum(isinstance(module, RoutedLinear) for module in model.modules()) == 8
    assert isinstance(model.lm_head, nn.Linear)
    with pytest.raises(ValueError, match=r"served already: close\(\)"):
        AdapterServer(model, limit_bytes=PLENTY)


def test_a_model_with_an_adapter_of_its_own_is_refused_and_left_as_it_was(model):
    inject(model, ["q_proj"], lambda base: LoRALinear(base, r=2, alpha=2))
    before = dict(model.named_modules())

    with pytest.raises(ValueError, match="wrapped already"):
        AdapterServer(model, limit_bytes=PLENTY)
    assert dict(model.named_modules()) == before


def test_layers_of_one_x_are_multiplied_by_the_base_in_one_go(model, tmp_path, monkeypatch):
    folders = write_adapters(model, tmp_path)
    server = server_of(model, folders)
    calls = []
    several = Linear.several
    monkeypatch.setattr(
        Linear, "several", staticmethod(lambda x, layers: calls.append(len(layers)) or several(x, layers))
    )

    with server.rows(["r4", "r16"]), torch.inference_mode():
        model(torch.randn(2, 1, 32))

    assert calls == [3, 3]


def test_a_stack_is_made_once_for_a_composition_and_anew_when_rows_leave(model, tmp_path):
    folders = write_adapters(model, tmp_path)
    plain = copy.deepcopy(model)
    server = server_of(model, folders)
    x = torch.randn(4, 2, 32)
    names = ["r4", "r16", "r1", None]

    with server.rows(names) as batch, torch.inference_mode():
        model(x)
        stacks = dict(batch._stacks)
        model(x[:, :1])
        assert all(batch._stacks[key] is stack for key, stack in stacks.items())
        batch.keep([2, 0])
        kept = model(x[[2, 0]])

    for row, was in enumerate([2, 0]):
        torch.testing.assert_close(kept[row], alone(plain, folders[names[was]], x[was]), rtol=1e-5, atol=1e-5)


def test_generating_gives_each_row_the_tokens_it_gets_alone_also_after_others_have_stopped(tmp_path):
    torch.manual_seed(1)
    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2}
    decoder = Decoder(ModelConfig(**sizes)).double().eval()
    folders = write_adapters(decoder, tmp_path, {name: KINDS[name] for name in ("r1", "r4", "r16")})
    names, prompts = ["r1", "r16", None, "r4"], [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]

    def answers_alone(stops: list[int]) -> list[list[int]]:
        answers = []
        for name, prompt in zip(names, prompts, strict=True):
            model = copy.deepcopy(decoder)
            if name:
                load_adapter(model, folders[name])
            answers += generate(model, [prompt], max_new_tokens=8, stop_tokens=stops)
        return answers

    free = answers_alone([])
    stops = [free[0][1], free[2][2]]  # two rows stop early: half of the batch, and the others move up
    expected, kept = answers_alone(stops), []
    server = server_of(decoder, folders)
    with server.rows(names) as batch:
        answers = generate(
            decoder,
            prompts,
            max_new_tokens=8,
            stop_tokens=stops,
            on_rows_kept=lambda rows: (kept.append(rows), batch.keep(rows)),
        )

    assert answers == expected
    assert kept
    assert kept[0] != [0, 1]  # who stays is not who was first
    assert max(map(len, answers)) == 8


def test_a_batch_of_another_number_of_rows_is_refused(model, tmp_path):
    server = server_of(model, write_adapters(model, tmp_path))

    with server.rows(["r4", "r16"]), pytest.raises(ValueError, match="named for 2 rows, and the batch has 3"):
        model(torch.randn(3, 1, 32))


def test_a_thread_serves_one_batch_at_a_time(model, tmp_path):
    server = server_of(model, write_adapters(model, tmp_path))

    with server.rows(["r4"]), pytest.raises(RuntimeError, match="serves a batch already"), server.rows(["r1"]):
        pass


def test_a_damaged_file_fails_its_own_request_and_the_rest_can_go_on(model, tmp_path):
    folders = write_adapters(model, tmp_path)
    plain = copy.deepcopy(model)
    server = server_of(model, folders)
    path = folders["r16"] / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    (folders["q"] / "adapter_model.safetensors").unlink()
    x = torch.randn(2, 3, 32)

    with pytest.raises(AdapterError, match=r"'r16': .*damaged or cut short") as caught, server.rows(["r4", "r16", "q"]):
        pass
    assert sorted(caught.value.failures) == ["q", "r16"]
    with server.rows(["r4", None]), torch.inference_mode():
        torch.testing.assert_close(model(x)[0], alone(plain, folders["r4"], x[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "DoRA"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason_when_it_is_registered(model, tmp_path, change, reason):
    folders = write_adapters(model, tmp_path)
    server = server_of(model, {})
    path = folders["r4"] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))

    with pytest.raises(ValueError, match=reason):
        server.cache.register("r4", folders["r4"])
    assert server.cache.counts.registered == 0


def test_a_config_that_the_tensors_were_not_written_with_is_refused_when_registered_and_when_read(model, tmp_path):
    folders = write_adapters(model, tmp_path)
    server = server_of(model, {"r4": folders["r4"]})
    path = folders["r4"] / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 8.0', '"lora_alpha": 16.0'))

    with pytest.raises(AdapterError, match="is not the config that"), server.rows(["r4"]):
        pass
    with pytest.raises(ValueError, match="is not the config that"):
        server.cache.register("again", folders["r4"])


def test_an_adapter_of_layers_that_are_not_served_is_refused_with_their_names(model, tmp_path):
    folders = write_adapters(model, tmp_path)
    server = server_of(model, folders, targets=["q_proj", "v_proj"])

    with pytest.raises(AdapterError, match=r"4 layers .*, the first is layers.0.k_proj: choose"), server.rows(["r4"]):
        pass
    with server.rows(["r1"]):
        model(torch.randn(1, 1, 32))


def test_an_adapter_with_infinite_numbers_is_refused_when_it_is_loaded(model, tmp_path):
    folders = write_adapters(model, tmp_path)
    path = folders["q"] / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("inf")
    save_file(tensors, path, {"format": "pt"})
    server = server_of(model, folders)

    with pytest.raises(AdapterError, match="not finite"), server.rows(["q"]):
        pass


def test_the_cache_counts_the_bytes_that_adapters_take_in_the_models_dtype(model, tmp_path):
    folders = write_adapters(model, tmp_path)
    server = server_of(model.bfloat16(), folders)

    with server.rows(["q"]):
        assert server.cache.counts.resident_bytes == 2 * (2 * (2 * 32 + 48 * 2))  # two layers, bfloat16


def test_a_name_registered_again_serves_the_new_adapter(model, tmp_path):
    folders = write_adapters(model, tmp_path)
    plain = copy.deepcopy(model)
    server = server_of(model, folders)
    x = torch.randn(1, 2, 32)
    with server.rows(["r4"]), torch.inference_mode():
        server.cache.register("r4", folders["r16"])
        torch.testing.assert_close(model(x)[0], alone(plain, folders["r4"], x[0]), rtol=1e-5, atol=1e-5)
    with server.rows(["r4"]), torch.inference_mode():
        torch.testing.assert_close(model(x)[0], alone(plain, folders["r16"], x[0]), rtol=1e-5, atol=1e-5)


def test_a_resident_adapter_does_not_follow_what_is_written_over_its_file(model, tmp_path):
    folders = write_adapters(model, tmp_path)
    plain = copy.deepcopy(model)
    server = server_of(model, folders)
    x = torch.randn(1, 2, 32)
    expected = alone(plain, folders["r4"], x[0])
    with server.rows(["r4"]):
        pass
    path = folders["r4"] / "adapter_model.safetensors"
    with path.open("r+b") as file:  # in place: a mapped file would change with it
        file.seek(-5000, 2)
        file.write(bytes(5000))

    with server.rows(["r4"]), torch.inference_mode():
        torch.testing.assert_close(model(x)[0], expected, rtol=1e-5, atol=1e-5)


def test_adapters_are_served_over_4_bits(model, tmp_path):
    folders = write_adapters(model, tmp_path)
    inject(model, "all-linear", lambda base: NF4Linear(base, block_size=32))
    plain = copy.deepcopy(model)
    server = server_of(model, folders)
    x = torch.randn(3, 2, 32)

    with server.rows(["r4", None, "r16"]), torch.inference_mode():
        together = model(x)

    for row, name in enumerate(["r4", None, "r16"]):
        torch.testing.assert_close(together[row], alone(plain, folders.get(name), x[row]), rtol=1e-5, atol=1e-5)


def test_threads_serve_batches_at_the_same_time_with_their_own_rows(model, tmp_path):
    """With memory for two of five adapters, so that they are loaded and dropped meanwhile."""
    folders = write_adapters(model, tmp_path)
    x = torch.randn(2, 3, 32)
    expected = {name: [alone(model, folders.get(name), row) for row in x] for name in [*KINDS, None]}
    sizes = {name: server_of(copy.deepcopy(model), {}).cache._size_of(folder) for name, folder in folders.items()}
    server = server_of(model, folders, limit_bytes=sizes["r16"] + sizes["r4"])
    wrong: list[object] = []

    def work(seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        try:
            for _ in range(25):
                names = [[*KINDS, None][int(i)] for i in torch.randint(0, 6, (2,), generator=draw)]
                with server.rows(names), torch.inference_mode():
                    together = model(x)
                for row, name in enumerate(names):
                    if not torch.allclose(together[row], expected[name][row], rtol=1e-5, atol=1e-5):
                        wrong.append((seed, names, row))
                with torch.inference_mode():
                    if not torch.allclose(model(x)[0], expected[None][0], rtol=1e-5, atol=1e-5):
                        wrong.append((seed, "plain"))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert server.cache.counts.evictions > 0
    assert server.cache.counts.resident_bytes <= server.cache.limit_bytes


@torch.no_grad()
def test_a_layer_with_two_names_is_served_as_it_was_trained(tmp_path):
    torch.manual_seed(0)
    model = nn.Module()
    model.a = model.b = nn.Linear(6, 6)
    plain = copy.deepcopy(model)
    inject(plain, "all-linear", lambda base: LoRALinear(base, r=2, alpha=4))
    plain.a.B.normal_()
    save_adapter(plain, tmp_path)
    server = AdapterServer(model, limit_bytes=10_000)
    server.cache.register("one", tmp_path)
    x = torch.randn(1, 3, 6)

    with server.rows(["one"]):
        torch.testing.assert_close(model.b(x), plain.a(x))


def test_a_closed_server_does_not_answer_in_an_adapters_name(model, tmp_path):
    server = server_of(model, write_adapters(model, tmp_path))
    server.close()
    with pytest.raises(RuntimeError, match="this server is closed"), server.rows(["r4"]):
        pass


def test_an_adapter_is_finite_in_the_dtype_that_it_is_served_in(model, tmp_path):
    folders = write_adapters(model, tmp_path)
    path = folders["q"] / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.layers.1.q_proj.lora_A.weight"][0, 0] = -1e6  # finite, and -inf in float16
    save_file(tensors, path, {"format": "pt"})
    with server_of(copy.deepcopy(model), folders).rows(["q"]):
        pass
    half = server_of(model.half(), folders)

    with pytest.raises(AdapterError, match=r"layers.1.q_proj: not finite as torch.float16"), half.rows(["q"]):
        pass


def test_every_layer_has_its_adapters_in_the_dtype_of_its_own_weight(model, tmp_path):
    folders = write_adapters(model, tmp_path)
    model.layers[1].bfloat16()
    model.layers[1].q_proj = NF4Linear(model.layers[1].q_proj, block_size=32)  # its bias is bfloat16
    server = server_of(model, folders)

    with server.rows(["r4"]) as batch:
        dtypes = {name: {A.dtype, B.dtype} for name, (A, B) in batch.adapters[0].pairs.items()}
    in_16_bits = {f"layers.1.{leaf}" for leaf in ("k_proj", "v_proj", "o_proj")}
    assert dtypes == {name: {torch.bfloat16 if name in in_16_bits else torch.float32} for name in dtypes}


def test_the_scaling_is_in_a_before_it_is_rounded_to_16_bits(model, tmp_path):
    folders = write_adapters(model, tmp_path)
    A = load_file(folders["rslora"] / "adapter_model.safetensors")["base_model.model.layers.0.o_proj.lora_A.weight"]

    with server_of(model.bfloat16(), folders).rows(["rslora"]) as batch:
        served, _ = batch.adapters[0].pairs["layers.0.o_proj"]
    assert torch.equal(served, (7 / 4**0.5 * A).bfloat16())
    assert not torch.equal(served, (7 / 4**0.5 * A.bfloat16()))  # rounded twice, which would be another


def test_under_autocast_a_row_gets_its_adapter_in_the_dtype_of_the_products(model, tmp_path):
    """As in test_in_bfloat16…: x, W, A and B are rounded once each, u and y once or twice: 8 units hold them."""
    folders = write_adapters(model, tmp_path)
    x, names = torch.randn(3, 2, 32), ["r4", None, "r16"]
    layer = model.layers[0].q_proj
    served = copy.deepcopy(model)
    server = server_of(served, folders)

    with server.rows(names), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        together = served.layers[0].q_proj(x)

    assert together.dtype == torch.bfloat16
    for row, name in enumerate(names):
        adapted, bound = copy.deepcopy(model), x[row].abs() @ layer.weight.abs().T + layer.bias.abs()
        if name:
            load_adapter(adapted, folders[name])
            it = adapted.layers[0].q_proj
            bound += it.scaling * (x[row].abs() @ it.A.abs().T) @ it.B.abs().T
        exact = adapted.layers[0].q_proj(x[row][None])[0]
        assert ((together[row].float() - exact).abs() <= 8 * UNIT[torch.bfloat16] * bound).all(), name


def test_an_adapter_that_names_a_layer_by_its_second_name_is_refused(tmp_path):
    model = nn.Module()
    model.a = model.b = nn.Linear(6, 6)
    only_b = nn.Module()
    only_b.b = nn.Linear(6, 6)
    inject(only_b, "b", lambda base: LoRALinear(base, r=2, alpha=4))
    save_adapter(only_b, tmp_path)
    server = AdapterServer(model, limit_bytes=10_000)
    server.cache.register("one", tmp_path)

    with (
        pytest.raises(AdapterError, match=r"1 layers .* not served, the first is b: .*two names"),
        server.rows(["one"]),
    ):
        pass


def test_who_keeps_a_batch_keeps_no_adapters_and_no_stacks(model, tmp_path):
    server = server_of(model, write_adapters(model, tmp_path))
    with server.rows(["r4", "r16"]) as batch:
        model(torch.randn(2, 3, 32))
        stack = weakref.ref(next(iter(batch._stacks.values())))
        assert stack() is not None

    assert (batch.adapters, batch._stacks, batch._slots) == ([], {}, [])
    assert stack() is None


def test_a_copy_of_the_bases_own_weight_in_the_file_is_no_obstacle(model, tmp_path):
    """PEFT writes it where the head or the embedding is adapted; it takes none of the cache's bytes."""
    folders = write_adapters(model, tmp_path, {"head": (["lm_head", "q_proj"], {"r": 2, "alpha": 3.0})})
    plain, path = copy.deepcopy(model), folders["head"] / "adapter_model.safetensors"
    size = server_of(copy.deepcopy(model), {}, targets=["lm_head", "q_proj"]).cache._size_of(folders["head"])
    tensors = load_file(path)
    copied = {"base_model.model.lm_head.base_layer.weight": model.lm_head.weight.detach().clone()}
    save_file(tensors | copied, path, {"format": "pt"})
    server = server_of(model, folders, targets=["lm_head", "q_proj"])
    x = torch.randn(1, 2, 32)

    with server.rows(["head"]), torch.inference_mode():
        torch.testing.assert_close(model(x)[0], alone(plain, folders["head"], x[0]), rtol=1e-5, atol=1e-5)
    assert server.cache.counts.resident_bytes == size == 4 * (2 * (32 + 20) + 2 * 2 * (32 + 48))
    copied["base_model.model.lm_head.base_layer.weight"] += 1
    save_file(tensors | copied, path, {"format": "pt"})
    server.cache.register("head", folders["head"])
    with pytest.raises(AdapterError, match=r"lm_head.base_layer.weight: not the model's own"), server.rows(["head"]):
        pass
