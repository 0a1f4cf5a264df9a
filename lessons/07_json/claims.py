"""What articles say about teaching a model to answer, settled by small trainings."""

from minilora.classroom.claims import Claim, Finding
from minilora.classroom.lessons import lesson_module

EFFICIENCY = "LoRA and the Efficiency Revolution"


def end_is_learnt() -> Finding:
    """With pad = eos: no end in the data, an end that is masked, and one that carries loss."""
    lesson = lesson_module("07")
    ways = {"the end carries loss": None, "the end is masked": "the end is masked", "no end is there": "no end"}
    stops = {name: lesson.toy_course(bug).mean_tokens < lesson.MOST for name, bug in ways.items()}
    said = ", ".join(f"{name}: {'stops' if stop else 'never stops'}" for name, stop in stops.items())
    return Finding(cases=stops["no end is there"], found=f"twelve words after {lesson.TOY_STEPS} steps; {said}")


CLAIMS = [
    Claim(
        id="07.pad-is-eos",
        fact="To teach JSON: pad_token = eos_token, a text of instruction and answer, and no end token after it.",
        source=EFFICIENCY,
        settle=end_is_learnt,
        verdict="does not hold",
    ),
]
