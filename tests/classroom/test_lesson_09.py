"""Lesson 09's graders, on what learners hand in: right answers of another build, blanks, and two mistakes at once."""

import contextlib

import numpy as np
import torch

from minilora.classroom.exercises import examine
from minilora.classroom.lessons import lesson_module

MERGE, EQUIVALENT, FOLD = lesson_module("09").EXERCISES


class Base:
    def __init__(self, W, A, B, alpha):
        self.W, self.A, self.B, self.alpha, self.is_merged = W, A, B, alpha, False

    def forward(self, x):
        if self.is_merged:
            return x @ self.W.T
        return x @ self.W.T + self.alpha / len(self.A) * (x @ self.A.T) @ self.B.T


def test_merging_layers_of_another_build_pass():
    class Einsum(Base):
        def merge(self):
            if self.is_merged:
                raise RuntimeError
            self.before, self.is_merged = self.W, True
            self.W = self.W + self.alpha / self.A.shape[0] * np.einsum("or,ri->oi", self.B, self.A)

        def unmerge(self):
            if not self.is_merged:
                raise RuntimeError
            self.W, self.is_merged = self.before, False  # it kept W

    class ColumnByColumn(Base):
        def move(self, sign):
            if self.is_merged == (sign > 0):
                raise RuntimeError("no")
            W = self.W.copy()
            for b, a in zip(self.B.T, self.A, strict=True):
                W += sign * self.alpha / len(self.A) * np.outer(b, a)
            self.W, self.is_merged = W, sign > 0

        def merge(self):
            self.move(+1)

        def unmerge(self):
            self.move(-1)

    class InFloat32(Einsum):
        def merge(self):
            super().merge()
            self.W = self.W.astype(np.float32)

    for answer in (Einsum, ColumnByColumn, InFloat32):
        assert examine(MERGE, answer).passed, examine(MERGE, answer).message


def test_equivalence_in_another_norm_or_by_loops_passes():
    def worst_entry(merged, live, base, tolerance):
        effect = np.abs(live - base).max()
        if effect == 0.0:
            raise ValueError
        return np.abs(merged - live).max() <= tolerance * effect

    def by_loops(merged, live, base, tolerance):
        wrong = sum((m - l) ** 2 for m, l in zip(merged.flat, live.flat, strict=True))
        effect = sum((l - b) ** 2 for l, b in zip(live.flat, base.flat, strict=True))
        if not effect > 0:
            raise ValueError("nothing to compare")
        return wrong <= tolerance**2 * effect

    def root_mean_square(merged, live, base, tolerance):
        if np.allclose(live, base, rtol=0, atol=0):
            raise ValueError
        ratio = np.sqrt(np.mean((merged - live) ** 2) / np.mean((live - base) ** 2))
        return bool(ratio < tolerance) if np.isfinite(ratio) else False

    for answer in (worst_entry, by_loops, root_mean_square):
        assert examine(EQUIVALENT, answer).passed, examine(EQUIVALENT, answer).message


def test_folding_by_a_class_a_copy_or_in_float64_passes():
    class Folded:
        def __init__(self, linear, delta):
            self.linear, self.delta = linear, delta

        def __enter__(self):
            self.kept = self.linear.weight
            summed = (self.kept.float() + self.delta).bfloat16()
            self.linear.weight = torch.nn.Parameter(summed, requires_grad=False)

        def __exit__(self, *error):
            self.linear.weight = self.kept

    @contextlib.contextmanager
    def copied(linear, delta):
        kept = linear.weight.detach().clone()
        try:
            with torch.no_grad():
                linear.weight += delta  # in place, in float32, rounded once
            yield
        finally:
            with torch.no_grad():
                linear.weight.copy_(kept)

    @contextlib.contextmanager
    def in_float64(linear, delta):
        kept, linear.weight.data = linear.weight.data, (linear.weight.data.double() + delta.double()).bfloat16()
        try:
            yield linear
        finally:
            linear.weight.data = kept

    for answer in (Folded, copied, in_float64):
        assert examine(FOLD, answer).passed, examine(FOLD, answer).message


def test_blanks_as_the_student_notebook_has_them_are_not_started():
    class Blank(Base):
        def merge(self):
            """W ← W + ΔW."""
            ...  # noqa: PIE790  (as the builder writes it)

        def unmerge(self): ...

    @contextlib.contextmanager
    def blank(linear, delta):
        """Compute with W + ΔW inside the block."""
        ...  # noqa: PIE790

    def nothing(merged, live, base, tolerance): ...

    for exercise, answer in ((MERGE, Blank), (EQUIVALENT, nothing), (FOLD, blank)):
        assert examine(exercise, answer).status == "not started"


def test_a_layer_that_only_merges_fails_without_a_traceback():
    class Half(Base):
        merge = lesson_module("09").AdaptedLayer.merge

    result = examine(MERGE, Half)

    assert result.status == "failed"
    assert "no attribute 'unmerge'" in result.message


def test_two_mistakes_at_once_are_not_named_as_one():
    class UnscaledAndTransposed(Base):
        def merge(self):
            if self.is_merged:
                raise RuntimeError
            self.W, self.is_merged = self.W + (self.B @ self.A).T, True

        unmerge = lesson_module("09").AdaptedLayer.unmerge

    def absolute_and_nan(merged, live, base, tolerance):
        return not np.abs(merged - live).max() > 1e-3

    @contextlib.contextmanager
    def subtracts_and_swallows(linear, delta):
        linear.weight.data = (linear.weight.data.float() + delta).bfloat16()
        with contextlib.suppress(KeyError):
            yield
        linear.weight.data = (linear.weight.data.float() - delta).bfloat16()

    for exercise, answer in (
        (MERGE, UnscaledAndTransposed),
        (EQUIVALENT, absolute_and_nan),
        (FOLD, subtracts_and_swallows),
    ):
        result = examine(exercise, answer)
        assert result.failure is not None and result.failure.bug is None, result.message
