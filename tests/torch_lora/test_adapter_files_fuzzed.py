"""Damaged and hostile adapter files: each loads exactly or is refused with one clear error; the model stays as it was.

Every case is made from its number alone, which seeds it: a failure names the number and the mutation.
"""

import json
import os
import pickle
import random
import shutil
import struct
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from minilora.torch_lora import inject, load_adapter, lora_layer, remove, save_adapter, train_biases, train_modules
from minilora.torch_lora.consumers import acceptance
from minilora.torch_lora.import_layouts import convert
from minilora.torch_lora.inject import adapter_layers
from minilora.torch_lora.peft_whole import in_model

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
Case = tuple[str, bytes, bytes]  # what was done, the config, the tensors


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.q_proj, self.v_proj, self.norm = nn.Linear(4, 6), nn.Linear(6, 4), nn.LayerNorm(4)
        self.head = nn.Linear(4, 5, bias=False)


def originals(folder: Path) -> list[tuple[bytes, bytes]]:
    """Three good adapters: plain; with patterns and an embedding; with biases and a head of its own."""
    made = []
    for kind in range(3):
        torch.manual_seed(kind)
        model = Model()
        inject(model, "q_proj", lambda base: lora_layer(base, r=2, alpha=4))
        inject(model, "v_proj", lambda base, r=2 + kind: lora_layer(base, r=r, alpha=4.5, use_rslora=False))
        if kind == 1:
            inject(model, "embed", lambda base: lora_layer(base, r=1, alpha=4))
        if kind == 2:
            train_biases(model, "all")
            train_modules(model, "head")
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        save_adapter(model, folder)
        made.append(((folder / CONFIG).read_bytes(), (folder / TENSORS).read_bytes()))
    return made


# --- mutations: each takes a generator of random numbers and bytes, and gives what it did and other bytes

HOSTILE_JSON = [
    "null", "true", "false", "0", "-1", "1", "2", "2.0", "-0.0", "1e308", "1e999", "-1e999", "NaN", "Infinity",
    "-Infinity", "1" + "0" * 30, "9" * 4299, "1" + "0" * 5000, "1e-400", '""', '"x"', '"q_proj"', '"all"',
    '"lora_only"', '"none"', '"../../etc/passwd"', '"/etc/passwd"', '"\\ud800"', '"\\u0000"', '"(a+)+$"',
    '"' + "x" * 5000 + '"', "[]", "{}", "[null]", "[1, 2]", '["q_proj"]', '["head"]', '["embed"]', '["norm", "head"]',
    '[""]', '["../.."]', '{"q_proj": 2}', '{"q_proj": 1e999}', '{"v_proj": 3}', '{"(a+)+": 2}', '{".*": 2}', '{"": 2}',
    '{"^": 2}', '{"\\\\": 2}', '{"q_proj": {"q_proj": 2}}', '{"q_proj": true}', '{"q_proj": ' + "9" * 4299 + "}",
    "[" * 400 + "]" * 400, "[" * 100_000, '{"a":' * 900 + "1" + "}" * 900, "0x10", "01", "'x'", "{", "]", "",
]  # fmt: skip
KEYS = [
    "r", "lora_alpha", "lora_dropout", "bias", "modules_to_save", "rank_pattern", "alpha_pattern", "use_rslora",
    "use_dora", "peft_type", "init_lora_weights", "target_modules", "fan_in_fan_out", "base_model_name_or_path",
    "task_type", "inference_mode", "layers_to_transform", "loftq_config", "ensure_weight_tying", "eva_config",
    "auto_mapping", "runtime_config", "new_key", "../key", "__class__", "trainable_token_indices", "lora_bias",
]  # fmt: skip
NAMES = [
    "../../q_proj", "/etc/passwd", "", ".", "..", "q_proj\x00", "(.*)+", "q_proj.base", "__class__", "q_proj.__init__",
    "head", "embed", "norm", "q_proj.lora_A", "a" * 5000, "\u2603", "q_proj.weight", "head.original_module",
]  # fmt: skip
SUFFIXES = [
    ".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B", ".bias", ".base_layer.bias",
    ".base_layer.weight", ".weight", ".lora_magnitude_vector", ".lora_A.default.weight", ".modules_to_save.bias", "",
]  # fmt: skip
DTYPES = [
    torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.int8,
    torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip


def raw_json(pairs: list[tuple[str, str]]) -> bytes:
    return ("{" + ", ".join(f"{json.dumps(key)}: {value}" for key, value in pairs) + "}").encode()


def flip_bits(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    changed = bytearray(data)
    end = len(data) if rng.random() < 0.5 else min(len(data), 400)  # a safetensors header stands in front
    places = [rng.randrange(end) for _ in range(rng.choice([1, 1, 1, 2, 8]))]
    for place in places:
        changed[place] ^= 1 << rng.randrange(8)
    return f"bits flipped in bytes {places}", bytes(changed)


def cut(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    length = rng.randrange(len(data))
    return f"cut to {length} bytes", data[:length]


def splice(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    place, extra = rng.randrange(len(data)), rng.randbytes(rng.choice([1, 8, 100]))
    return f"{len(extra)} bytes put in at {place}", data[:place] + extra + data[place:]


def change_keys(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    pairs = [(key, json.dumps(value)) for key, value in json.loads(data).items()]
    done = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        key, value = rng.choice(KEYS), rng.choice(HOSTILE_JSON)
        pairs = [pair for pair in pairs if pair[0] != key or rng.random() < 0.05]  # kept: then it is there twice
        pairs.insert(rng.randrange(len(pairs) + 1), (key, value))
        done.append(f"{key} = {value[:60]}")
    return "; ".join(done), raw_json(pairs)


def drop_key(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    config = json.loads(data)
    key = rng.choice(sorted(config))
    del config[key]
    return f"without {key}", json.dumps(config).encode()


def change_patterns(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    pieces = [
        "q_proj",
        "v_proj",
        "embed",
        ".",
        r"\.",
        ".*",
        "^",
        "$",
        "(",
        ")",
        "|",
        "+",
        "*",
        r"\d",
        "[a-z]",
        "{9}",
        "\\",
    ]
    texts = ["".join(rng.choices(pieces, k=rng.randrange(1, 6))) for _ in range(rng.randrange(1, 4))]
    values = [rng.choice([1, 2, 3, 4, 4.5, 0, -1, 10**40, "2", None, True]) for _ in texts]
    changed = {rng.choice(["rank_pattern", "alpha_pattern"]): dict(zip(texts, values, strict=True))}
    return str(changed), json.dumps(json.loads(data) | changed).encode()


def change_tensor(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    tensors = load(data)
    key = rng.choice(sorted(tensors))
    old = tensors.pop(key)
    changes: list[tuple[str, Callable[[], torch.Tensor]]] = [
        (f"as {dtype}", lambda dtype=dtype: old.to(dtype)) for dtype in DTYPES
    ]
    changes += [
        ("transposed", lambda: old.T.contiguous()), ("flat", old.flatten), ("with an axis more", lambda: old[None]),
        ("empty", lambda: old[:0]), ("a single number", lambda: torch.tensor(1.0)),
        ("twice as long", lambda: torch.cat([old, old])),
        ("infinite", lambda: old / 0), ("NaN", lambda: old * float("nan")),
        ("huge", lambda: old.double() * 1e300),
        ("without width", lambda: old.reshape(-1)[:0].reshape(0, 2**31)),
        ("tiny", lambda: old.double() * 1e-320), ("one row less", lambda: old[1:]),
    ]  # fmt: skip
    what, change = rng.choice(changes)
    return f"{key} {what}", save(tensors | {key: change()}, {"format": "pt"})


def rename_tensor(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    tensors = load(data)
    key = rng.choice(sorted(tensors))
    new = rng.choice([PREFIX, PREFIX, "", "base_model."]) + rng.choice(NAMES) + rng.choice(SUFFIXES)
    what, tensor = rng.choice([("renamed to", tensors.pop(key)), ("also named", tensors.get(key, torch.zeros(2, 4)))])
    return f"{key} {what} {new[:60]!r}", save(tensors | {new: tensor.clone()}, {"format": "pt"})


def drop_tensor(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    tensors = load(data)
    dropped = rng.sample(sorted(tensors), rng.choice([1, 1, 2, len(tensors)]))
    return f"without {dropped}", save({key: tensors[key] for key in tensors if key not in dropped})


def change_header(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    key = rng.choice(sorted(header.keys() - {"__metadata__"}))
    what, value = rng.choice([
        ("dtype", rng.choice(["F9", "F4", "", None, 3, "F8_E8M0", "I64", "BOOL", "F6_E2M3"])),
        ("shape", rng.choice([[2**62, 2**62], [-1, 4], [2**64], "2", None, [2.5, 2], [0, 2**63 - 1], [[2]], [2] * 99])),
        ("data_offsets", rng.choice([[0, 2**63], [8, 0], [0, 0], [-8, 8], [0], "0", None, [0, 16], [2**64, 2**65]])),
    ])  # fmt: skip
    header[key] = header[key] | {what: value}
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        what, value, text = "header", "deeply nested", b'{"a":' * 50_000
    if rng.random() < 0.1:
        what, value, text = (
            "__metadata__",
            "of wrong types",
            text.replace(b'"__metadata__": {', b'"__metadata__": {"x": 1, '),
        )
    length = rng.choice([len(text)] * 8 + [2**63, 100_000_001, 0, len(text) + 1])
    return f"{key}: {what} = {str(value)[:60]}, a header of {length} bytes", struct.pack("<Q", length) + text + data[8:]


ON_CONFIG = [flip_bits, cut, splice, change_keys, change_keys, change_keys, change_keys, drop_key, change_patterns]
ON_TENSORS = [
    flip_bits,
    flip_bits,
    cut,
    splice,
    change_tensor,
    change_tensor,
    rename_tensor,
    drop_tensor,
    change_header,
]


def case(number: int, good: list[tuple[bytes, bytes]]) -> Case:
    rng = random.Random(number)
    config, tensors = good[number % len(good)]
    done = []
    if number % 10 < 5 or rng.random() < 0.1:
        mutate = rng.choice(ON_CONFIG)
        what, config = mutate(rng, config)
        done.append(f"config, {mutate.__name__}: {what}")
    if number % 10 >= 5:
        mutate = rng.choice(ON_TENSORS)
        what, tensors = mutate(rng, tensors)
        done.append(f"tensors, {mutate.__name__}: {what}")
    return f"case {number}: {'; '.join(done)}", config, tensors


# --- what must hold


class Watch:
    """Python's own audit events: nothing is written, no pickle, program or socket is opened while `on`."""

    FORBIDDEN = (
        "os.mkdir",
        "os.rename",
        "os.remove",
        "os.symlink",
        "os.system",
        "subprocess",
        "socket",
        "pickle",
        "shutil",
    )

    def __init__(self) -> None:
        self.on, self.seen = False, []
        sys.addaudithook(self.hear)

    def hear(self, event: str, args: tuple[object, ...]) -> None:
        if self.on and (event.startswith(self.FORBIDDEN) or (event == "open" and self.writes(*args))):
            self.seen.append((event, args))

    @staticmethod
    def writes(_path: object, mode: object, flags: object) -> bool:
        return any(letter in str(mode or "") for letter in "wax+") or bool(int(flags or 0) & (os.O_WRONLY | os.O_RDWR))


def check(model: Model, folder: Path, text: str, watch: Watch) -> bool:
    """Load a case; say whether it was accepted."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    modules = [type(module) for module in model.modules()]
    watch.on = True
    try:
        load_adapter(model, folder)
        error = None
    except Exception as caught:
        error = caught
    try:
        assert str(acceptance(folder)), text
    except (ValueError, FileNotFoundError):
        assert error is not None, text  # what loads has a report
    except Exception as caught:
        raise AssertionError(f"{text}\nacceptance raised {type(caught).__name__}") from caught
    watch.on = False
    if error is None:
        check_loaded_exactly(model, load((folder / TENSORS).read_bytes()), text)
        remove(model)
    else:
        assert type(error) in (ValueError, FileNotFoundError), f"{text}\nraised {type(error).__name__}: {error}"
        assert str(error), text
        assert [p.requires_grad for p in model.parameters()] == flags, text
    after = model.state_dict()
    assert [type(module) for module in model.modules()] == modules, text
    assert all(torch.equal(after[name], before[name]) for name in before), text
    assert watch.seen == [], text
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, TENSORS], text
    return error is None


def check_loaded_exactly(model: Model, tensors: dict[str, torch.Tensor], text: str) -> None:
    layers = adapter_layers(model)
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        suffix = next((suffix for suffix in SUFFIXES[:4] if name.endswith(suffix)), None)
        if suffix:
            layer = layers[name.removesuffix(suffix)]
            there = layer.A if "_A" in suffix else layer.B
        else:
            [place] = in_model(model, {name.replace(".base_layer.", "."): tensor})
            there = model.state_dict()[place]
        assert torch.isfinite(there).all(), f"{text}\n{key} became infinite"
        assert torch.equal(there.detach(), tensor.to(there.dtype)), f"{text}\n{key} was not loaded as it stands"


def fuzz(count: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    def refuse(*_args: object, **_settings: object) -> None:
        raise AssertionError("a pickle was opened")

    good = originals(folder)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    torch.manual_seed(7)
    model, watch, accepted = Model(), Watch(), 0
    for config, tensors in good:  # so that everything is imported, and the good ones are good
        (folder / CONFIG).write_bytes(config)
        (folder / TENSORS).write_bytes(tensors)
        assert check(model, folder, "the original", watch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a pattern that hits nothing is warned of, and loads
        for number in range(count):
            text, config, tensors = case(number, good)
            (folder / CONFIG).write_bytes(config)
            (folder / TENSORS).write_bytes(tensors)
            accepted += check(model, folder, text, watch)
    return accepted


def test_300_damaged_adapters_load_exactly_or_are_refused(tmp_path, monkeypatch):
    assert 10 < fuzz(300, tmp_path, monkeypatch) < 200  # both happen, or the mutations are no test


@pytest.mark.long
def test_10_000_damaged_adapters_load_exactly_or_are_refused(tmp_path, monkeypatch):
    assert 400 < fuzz(10_000, tmp_path, monkeypatch) < 6_000


def test_300_damaged_mlx_lm_adapters_are_converted_or_refused(tmp_path):
    config = json.dumps({"num_layers": 1, "lora_parameters": {"rank": 2, "scale": 2.0, "dropout": 0.0}}).encode()
    tensors = save({"q_proj.lora_a": torch.randn(4, 2), "q_proj.lora_b": torch.randn(2, 6)})
    source, converted = tmp_path / "mlx", 0
    source.mkdir()
    for number in range(300):
        rng = random.Random(number)
        what, changed, data = "nothing", config, tensors
        if number % 3 == 0:
            key, value = rng.choice(["rank", "scale", "dropout", "keys"]), rng.choice(HOSTILE_JSON)
            what = f"{key} = {value[:60]}"
            changed = raw_json([("lora_parameters", f'{{"rank": 2, "scale": 2.0, "{key}_": 0, "{key}": {value}}}')])
        elif number % 3 == 1:
            what, changed = rng.choice([flip_bits, cut, splice])(rng, config)
        else:
            what, data = rng.choice([flip_bits, cut, splice, change_tensor, drop_tensor, change_header])(rng, tensors)
        (source / "adapter_config.json").write_bytes(changed)
        (source / "adapters.safetensors").write_bytes(data)
        try:
            convert(source, tmp_path / "out")
        except (ValueError, FileNotFoundError) as error:
            assert type(error) in (ValueError, FileNotFoundError), f"case {number}: {what}"
            assert not (tmp_path / "out").exists(), f"case {number}: {what}"
        else:
            written = load((tmp_path / "out" / TENSORS).read_bytes())
            for key, tensor in load(data).items():
                name = f"{PREFIX}{key[:-2]}_{key[-1].upper()}.weight"
                assert torch.equal(written[name], tensor.T.float()), f"case {number}: {what}"
            shutil.rmtree(tmp_path / "out")
            converted += 1
    assert 20 < converted < 200
