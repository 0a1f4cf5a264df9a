"""The loss in chunks against torch's over all logits: values, gradients, and how much is ever formed."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minilora.torch_lora import LoRALinear
from minilora.train.data import IGNORED, collate, mask_prompt
from minilora.train.loss import ROWS_AT_ONCE, chunked_cross_entropy, loss_of


class TinyModel(nn.Module):
    """A language model without memory, shaped as `loss_of` wants it: `.model` and `.lm_head`."""

    def __init__(self, vocab=12):
        super().__init__()
        self.model = nn.Embedding(vocab, 16)
        self.lm_head = nn.Linear(16, vocab, bias=False)


class Shapes(TorchDispatchMode):
    """The shape of every tensor that torch makes, and the operation that made it."""

    def __init__(self):
        super().__init__()
        self.seen, self.operations, self.dtypes = [], [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.seen.append(tuple(result.shape))
            self.operations.append(function.overloadpacket.__name__)
            self.dtypes.append(result.dtype)
        return result

    def rows_and_dtypes(self, columns):
        tensors = zip(self.seen, self.dtypes, strict=True)
        return [(shape[0], dtype) for shape, dtype in tensors if len(shape) == 2 and shape[1] == columns]


@pytest.fixture
def batch():
    return collate([mask_prompt([1, 2], [3, 4, 5], eos=0), mask_prompt([6], [7], eos=0)], pad=0)


def plain(hidden, weight, targets):
    logits = hidden @ weight.T
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


def value_and_gradients(function, hidden, weight, targets, *rest):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = function(hidden, weight, targets, *rest)
    (3 * loss).backward()  # a loss that is scaled, as under accumulation
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("chunk_tokens", [7, 20])
@pytest.mark.parametrize("n", [1, 6, 7, 8, 21])
def test_chunks_give_the_whole(n, chunk_tokens):
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, 5, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    targets = torch.randint(0, 11, (n,))
    ours = value_and_gradients(chunked_cross_entropy, hidden, weight, targets, chunk_tokens)

    for mine, theirs in zip(ours, value_and_gradients(plain, hidden, weight, targets), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_bfloat16_is_no_further_from_the_truth_than_torch():
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 32).bfloat16(), torch.randn(200, 32).bfloat16()
    targets = torch.randint(0, 200, (40,))
    exact = value_and_gradients(plain, hidden.double(), weight.double(), targets)
    ours = value_and_gradients(chunked_cross_entropy, hidden, weight, targets, 16)
    theirs = value_and_gradients(plain, hidden, weight, targets)

    assert [grad.dtype for grad in ours] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for mine, peer, right in zip(ours, theirs, exact, strict=True):
        assert (mine - right).norm() <= 1.1 * (peer - right).norm()


def test_no_tensor_is_tokens_by_vocabulary():
    hidden, weight = torch.randn(40, 8, requires_grad=True), torch.randn(300, 8)
    with Shapes() as shapes:
        chunked_cross_entropy(hidden, weight, torch.zeros(40, dtype=torch.long), 16).backward()
    with Shapes() as plain_shapes:
        plain(hidden, weight, torch.zeros(40, dtype=torch.long)).backward()

    rows = [shape[0] for shape in shapes.seen if shape[-1:] == (300,)]
    assert max(rows) == 16
    assert (40, 300) in plain_shapes.seen


def test_few_rows_are_widened_at_a_time():
    hidden, weight = torch.randn(40, 8, requires_grad=True, dtype=torch.bfloat16), torch.randn(300, 8).bfloat16()
    with Shapes() as shapes:
        chunked_cross_entropy(hidden, weight, torch.zeros(40, dtype=torch.long), 16).backward()

    assert max(rows for rows, dtype in shapes.rows_and_dtypes(300) if dtype == torch.float32) == ROWS_AT_ONCE


def test_a_frozen_head_gets_no_gradient_and_none_is_formed():
    hidden, weight = torch.randn(40, 8, requires_grad=True), torch.randn(300, 8)
    with Shapes() as shapes:
        chunked_cross_entropy(hidden, weight, torch.zeros(40, dtype=torch.long), 16).backward()

    made = [name for shape, name in zip(shapes.seen, shapes.operations, strict=True) if shape == (300, 8)]
    assert set(made) <= {"t", "transpose", "permute"}  # views of the weight


def test_without_gradients_the_loss_alone_is_formed():
    hidden, weight = torch.randn(4, 8), torch.randn(30, 8)
    with Shapes() as shapes:
        loss = chunked_cross_entropy(hidden, weight, torch.zeros(4, dtype=torch.long))

    assert not loss.requires_grad
    assert shapes.operations.count("mm") == 1
    assert "exp_" not in shapes.operations


def test_the_loss_is_the_one_over_all_positions_with_the_mask(batch):
    model = TinyModel()
    logits = model.lm_head(model.model(batch.tokens))[:, :-1]
    everywhere = F.cross_entropy(logits.transpose(1, 2), batch.labels[:, 1:], ignore_index=IGNORED)

    torch.testing.assert_close(loss_of(model, batch), everywhere, rtol=1e-6, atol=0)


def test_the_loss_is_float32_over_a_bfloat16_model(batch):
    assert loss_of(TinyModel().bfloat16(), batch).dtype == torch.float32


def test_what_carries_no_loss_gets_no_logits(batch):
    model = TinyModel(vocab=50)
    with Shapes() as shapes:
        loss_of(model, batch)

    n_labelled = int((batch.labels[:, 1:] != IGNORED).sum())
    products = [shape for shape, name in zip(shapes.seen, shapes.operations, strict=True) if name == "mm"]
    assert products[0] == (n_labelled, 50)
    assert max(rows for rows, columns in products if columns == 50) == n_labelled


@pytest.mark.parametrize("head", [nn.Linear(16, 12), LoRALinear(nn.Linear(16, 12, bias=False), r=2, alpha=4)])
def test_a_head_with_a_bias_or_an_adapter_is_called(batch, head):
    model, called = TinyModel(), []
    model.lm_head = head
    head.register_forward_hook(lambda *_: called.append(True))
    loss_of(model, batch).backward()

    assert called == [True]
    assert all(p.grad is not None for p in head.parameters() if p.requires_grad)


@pytest.mark.parametrize("target", [-1, -100, 11])
def test_a_target_outside_the_vocabulary_is_refused(target):
    with pytest.raises(RuntimeError, match="out of bounds"):
        chunked_cross_entropy(torch.randn(3, 5), torch.randn(11, 5), torch.tensor([1, target, 2]))


def test_a_trainable_head_pays_for_no_gradient_under_no_grad():
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    with torch.no_grad(), Shapes() as shapes:
        chunked_cross_entropy(hidden, weight, torch.zeros(4, dtype=torch.long))

    assert shapes.operations.count("mm") == 1


def test_the_gradient_of_a_trainable_head_is_summed_in_float32():
    """Over 64 chunks; summed in bfloat16 the later ones would be rounded away."""
    torch.manual_seed(0)
    hidden, weight = torch.ones(512, 4).bfloat16(), torch.zeros(16, 4).bfloat16()
    targets = torch.zeros(512, dtype=torch.long)
    _, _, dweight = value_and_gradients(chunked_cross_entropy, hidden, weight, targets, 8)
    _, _, exact = value_and_gradients(plain, hidden.double(), weight.double(), targets)

    torch.testing.assert_close(dweight.double(), exact, rtol=2**-8, atol=0)


def test_gradients_of_gradients_are_refused():
    hidden = torch.randn(4, 8, requires_grad=True)
    loss = chunked_cross_entropy(hidden, torch.randn(30, 8), torch.zeros(4, dtype=torch.long))
    (dhidden,) = torch.autograd.grad(loss, hidden, torch.ones((), requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dhidden.sum().backward()


def test_the_loss_over_an_adapted_bfloat16_head_is_float32(batch):
    model = TinyModel().bfloat16()
    model.lm_head = LoRALinear(model.lm_head, r=2, alpha=4)
    assert loss_of(model, batch).dtype == torch.float32


@pytest.mark.parametrize(
    ("hidden", "targets", "chunk_tokens", "message"),
    [
        ((9, 4), (8,), 4, r"hidden is \(9, 4\) and targets \(8,\): give"),
        ((1, 9, 4), (9,), 4, r"hidden is \(1, 9, 4\)"),
        ((9, 4), (9,), 0, "chunk_tokens is 0: choose 1 or more"),
        ((9, 4), (9,), -1, "chunk_tokens is -1"),
    ],
)
def test_what_cannot_be_cut_into_chunks_is_refused(hidden, targets, chunk_tokens, message):
    with pytest.raises(ValueError, match=message):
        unchecked = inspect.unwrap(chunked_cross_entropy)  # without the tests' own check of shapes
        unchecked(torch.ones(hidden), torch.ones(7, 4), torch.zeros(targets, dtype=torch.long), chunk_tokens)
