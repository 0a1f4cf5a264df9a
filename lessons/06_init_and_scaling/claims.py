"""What articles say about alpha, rsLoRA and LoRA+, settled by this lesson's small experiments and by the papers."""

import statistics

from minilora.classroom.claims import FAMILY, MATHEMATICS, Claim, Finding
from minilora.classroom.comparison import best_rate, by_seed
from minilora.classroom.lessons import lesson_module
from minilora.classroom.pictures import two_rates as race
from minilora.classroom.pictures import update_size as size
from minilora.methods.loraplus import RATIO

STEPS = 30
NAMES: dict[size.Optimizer, str] = {"sgd": "SGD", "adam": "Adam"}


def spread(use_rslora: bool, optimizer: size.Optimizer) -> float:
    """How far the best rate moves over the ranks 1 to 64: the largest over the smallest."""
    best = [size.best_rate(r, use_rslora, optimizer, STEPS) for r in size.RANKS]
    return max(best) / min(best)


def rate_is_kept() -> Finding:
    """The best rate at every rank, with alpha / r."""
    found = {"SGD": spread(False, "sgd"), "Adam": spread(False, "adam")}
    told = ", ".join(f"{times:.0f}-fold with {name}" for name, times in found.items())
    cases = {f"the optimizer is {name}": times <= 4 for name, times in found.items()}
    return Finding(
        cases=cases,
        found=f"from r = 1 to 64 the best rate after {STEPS} steps moves {told}; up to 4-fold counts as kept",
    )


def rank_is_less_sensitive() -> Finding:
    """The best rate at every rank, with either scaling."""
    both = {name: (spread(False, name), spread(True, name)) for name in NAMES}
    told = "; ".join(f"{NAMES[name]} {plain:.0f} and {root:.0f}" for name, (plain, root) in both.items())
    cases = {f"the optimizer is {NAMES[name]}": root < plain for name, (plain, root) in both.items()}
    of = f"of the best rates after {STEPS} steps, r = 1 to 64"
    return Finding(cases=cases, found=f"largest over smallest {of}, alpha / r and alpha / √r: {told}")


def effective_rate_falls() -> Finding:
    """The first step at every rank, with alpha / r."""
    slopes = {name: size.slope(size.by_rank(8.0, name, 1)[False]) for name in NAMES}
    cases = {f"the optimizer is {NAMES[name]}": power < -0.5 for name, power in slopes.items()}
    told = ", ".join(f"r^{power:.2f} with {NAMES[name]}" for name, power in slopes.items())
    return Finding(cases=cases, found=f"the first step goes as {told}")


def alpha_is_a_rate() -> Finding:
    """One step with twice alpha beside one with twice the rate."""
    lesson, cases = lesson_module("06"), {}
    for name in NAMES:
        louder, faster = (name, 0.01, 16.0, 4, "lora"), (name, 0.02, 8.0, 4, "lora")
        cases[f"the optimizer is {NAMES[name]}, at the first step"] = lesson.by_running([louder, faster]) == [0, 0]
    return Finding(cases=cases, found="twice alpha makes SGD's first step 4 times as long and Adam's twice")


def as_trained_directly() -> Finding:
    """The first step of SGD with alpha = r, beside that of W itself, which learns lr of the change."""
    shares = {}
    for r in (1, 8, 64):
        lr = 0.01
        run = size.train(size.start(r), 1.0, lr_A=lr, lr_B=lr, steps=1, optimizer="sgd")
        shares[r] = float(run.learned[1]) / lr
    cases = {f"r = {r}": 0.9 < share < 1.1 for r, share in shares.items()}
    told = ", ".join(f"{share:.2g} at r = {r}" for r, share in shares.items())
    return Finding(cases=cases, found=f"SGD's first step is r / (3 in) of W's, here with in = {size.IN}: {told}")


def ratio_2_to_8() -> Finding:
    """The paper's ratio."""
    return Finding(cases=2 <= RATIO <= 8, found="by LoRA+ (arXiv 2402.12354), section 5: 2⁴ = 16")


def ratio_4_to_16() -> Finding:
    """The paper's ratio."""
    return Finding(cases=4 <= RATIO <= 16, found="by LoRA+ (arXiv 2402.12354), section 5: 2⁴ = 16")


def always_sooner() -> Finding:
    """The two races."""
    took = {
        title: {ratio: race.steps_to_goal(curve) for ratio, curve in curves.items()}
        for title, curves in race.races().items()
    }
    told = "; ".join(f"{title}: {took[title][1]:.0f} steps, {took[title][16]:.0f} with ratio 16" for title in took)
    cases = {f"compared at {title}": steps[16] < steps[1] for title, steps in took.items()}
    return Finding(cases=cases, found=f"on a small planted problem, {told}")


def twice_as_fast() -> Finding:
    """Steps to a tenth of the first loss on a real task, each at its best rate, from benchmarks/methods.json."""
    took = {
        case: [steps_to(cell["train_losses"], 0.1) for cell in by_seed(case, best_rate(case))]
        for case in ("lora", "lora+")
    }
    steps = {case: statistics.mean(each) for case, each in took.items()}
    told = " and ".join(f"{', '.join(map(str, each))} with {case}" for case, each in took.items())
    return Finding(
        cases=1.5 <= steps["lora"] / steps["lora+"],
        found=f"SmolLM2-135M on orders, each at its best rate, three seeds: a tenth of the first loss after {told} "
        "(benchmarks/methods.py)",
    )


def steps_to(losses: list[float], share: float) -> int:
    """How many steps until four in a row have a mean loss of at most this share of the first."""
    means = (statistics.mean(losses[end - 4 : end]) for end in range(4, len(losses) + 1))
    return next(end for end, mean in enumerate(means, start=4) if mean <= share * losses[0])


CLAIMS = [
    Claim(
        id="06.rate-is-kept",
        fact="With alpha / r the learning rate need not be tuned again when r changes.",
        source=f"{MATHEMATICS}, on the scaling factor",
        settle=rate_is_kept,
        verdict="holds when",
    ),
    Claim(
        id="06.rslora-falls",
        fact="With alpha / r the effective learning rate falls as the rank grows.",
        source=f"{MATHEMATICS}, “rsLoRA - Rank-Stabilized Scaling”",
        settle=effective_rate_falls,
        verdict="holds when",
    ),
    Claim(
        id="06.rslora-sensitive",
        fact="With alpha / √r the choice of rank is less sensitive to the learning rate.",
        source=f"{FAMILY}, on rsLoRA",
        settle=rank_is_less_sensitive,
        verdict="holds",
    ),
    Claim(
        id="06.alpha-is-a-rate",
        fact="alpha is a multiplier of the learning rate for LoRA's path.",
        source=f"{MATHEMATICS}, in its interview questions",
        settle=alpha_is_a_rate,
        verdict="holds when",
    ),
    Claim(
        id="06.alpha-equals-r",
        fact="With alpha = r the update is as large as if the model were trained directly.",
        source=f"{FAMILY}, on the scaling factor",
        settle=as_trained_directly,
        verdict="does not hold",
    ),
    Claim(
        id="06.ratio-2-to-8",
        fact="LoRA+ gives B typically 2 to 8 times A's rate.",
        source=f"{FAMILY}, on LoRA+",
        settle=ratio_2_to_8,
        verdict="does not hold",
    ),
    Claim(
        id="06.ratio-4-to-16",
        fact="LoRA+ gives B roughly 4 to 16 times A's rate.",
        source=f"{MATHEMATICS}, “LoRA+ - Better Learning Rate Scheduling”",
        settle=ratio_4_to_16,
        verdict="holds",
    ),
    Claim(
        id="06.loraplus-always",
        fact="A higher rate for B consistently speeds convergence up.",
        source=f"{MATHEMATICS}, “LoRA+ - Better Learning Rate Scheduling”",
        settle=always_sooner,
        verdict="holds when",
    ),
    Claim(
        id="06.loraplus-speed",
        fact="LoRA+ converges 1.5 to 2 times sooner.",
        source=f"{FAMILY}, on LoRA+; its paper (arXiv 2402.12354) says up to 2 times",
        settle=twice_as_fast,
        verdict="does not hold",
    ),
]
