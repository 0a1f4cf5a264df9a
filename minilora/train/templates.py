"""How a conversation is written down for a model that was not told yet: templates, as data.

    model     the model's own chat template; a base model has none
    chatml    <|im_start|>user … <|im_end|>, as most chat models since 2023
    alpaca    "### Instruction: … ### Response:", with its opening sentence; one question, one answer
    plain     nothing but the texts themselves, one after the other: to continue a text

Each is a program in Jinja's language, as Hugging Face's chat templates are, and runs in the same sandbox: llm/chat. A
message may have an `input` beside its content, which Alpaca's rows have; the templates that do not know it find it in
the content.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from minilora.llm.tokenizer import TEMPLATE_FILE, Tokenizer

CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}"""

# https://github.com/tatsu-lab/stanford_alpaca: the wording that its descendants were trained on
ALPACA = """\
{% if messages | length > 2 or messages[0].role != 'user' %}
{{ raise_exception('Alpaca knows one question and one answer: give no system message, and a row for each') }}
{% endif %}
{% set question = messages[0] %}
{{ 'Below is an instruction that describes a task' }}
{%- if question.input %}
{{ ', paired with an input that provides further context' }}
{%- endif %}
{{ '. Write a response that appropriately completes the request.\\n\\n### Instruction:\\n' + question.content }}
{%- if question.input %}
{{ '\\n\\n### Input:\\n' + question.input }}
{%- endif %}
{{ '\\n\\n### Response:' }}
{%- for answer in messages[1:] %}
{{ answer.content }}
{%- endfor %}"""

PLAIN = """\
{% for message in messages %}
{{ message.content }}
{%- endfor %}"""

MODEL = "model"
WITH_BOS = "{{ bos_token }}"  # before the first message, for a model that began its texts so when it was trained
TEMPLATES: Mapping[str, str] = MappingProxyType({"chatml": CHATML, "alpaca": ALPACA, "plain": PLAIN})


def with_template(tokenizer: Tokenizer, name: str) -> Tokenizer:
    """A tokenizer that writes conversations down as the template of this name says.

    Raises:
        ValueError: if there is no such template.
    """
    if name == MODEL:
        return tokenizer
    if name not in TEMPLATES:
        raise ValueError(f"no template is named {name!r}: choose {', '.join([MODEL, *TEMPLATES])}")
    return tokenizer.with_template((WITH_BOS if tokenizer.puts_bos_first else "") + TEMPLATES[name])


def trained_template(adapter: str | Path) -> str | None:
    """The template beside an adapter, which it was trained with; None where that was the model's own."""
    path = Path(adapter) / TEMPLATE_FILE
    return path.read_text(encoding="utf-8") if path.is_file() else None


def with_trained_template(tokenizer: Tokenizer, adapter: str | Path) -> Tokenizer:
    """The tokenizer with the template that an adapter was trained with."""
    template = trained_template(adapter)
    return tokenizer if template is None else tokenizer.with_template(template)


def for_template(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> list[dict[str, str]]:
    """The messages as the tokenizer's template takes them: a question's input below it, unless it knows of inputs."""
    if knows_inputs(tokenizer):
        return [dict(message) for message in messages]
    return [
        {"role": message["role"], "content": "\n\n".join(filter(None, (message["content"], message.get("input"))))}
        for message in messages
    ]


def knows_inputs(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer's template writes the input of a question, which Alpaca's does: asked by trying."""
    trial = {"role": "user", "content": "question", "input": "context of the question"}
    return trial["input"] in tokenizer.apply_chat_template([trial])
