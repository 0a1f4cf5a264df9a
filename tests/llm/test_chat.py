"""Chat templates: what they can do, and what they cannot."""

import json
import subprocess
import sys

import pytest

from minilora.llm.chat import MAX_SOURCE, ChatTemplate

MESSAGES = [{"role": "user", "content": "Hello"}]

# Each grows without end, in its own way.
DOUBLING = "{% set ns = namespace(v='aaaaaaaaaa', w=[1]) %}{% for i in range(99) %}"
NESTED = (
    "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}"
    "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}"
)

BOMBS = {
    "two deep lists compared by a test": NESTED + "{{ ns.a is eq ns.b }}",
    "two deep lists compared by index": NESTED + "{{ [ns.a].index(ns.b) }}",
    "two deep lists compared by max": NESTED + "{{ [ns.a, ns.b] | max | length }}",
    "two deep lists compared by select": NESTED + "{{ [ns.a] | select('eq', ns.b) | list | length }}",
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "text doubled by ~": DOUBLING + "{% set ns.v = ns.v ~ ns.v %}{% endfor %}",
    "text doubled by +": DOUBLING + "{% set ns.v = ns.v + ns.v %}{% endfor %}",
    "text doubled by a list": DOUBLING + "{% set ns.v = [ns.v, ns.v] | join %}{% endfor %}",
    "a list doubled by +": DOUBLING + "{% set ns.w = ns.w + ns.w %}{% endfor %}",
    "a list in itself, printed": DOUBLING + "{% set ns.w = [ns.w, ns.w] %}{% endfor %}{{ ns.w }}",
    "a list in itself, as json": DOUBLING + "{% set ns.w = [ns.w, ns.w] %}{% endfor %}{{ ns.w | tojson }}",
    "a list in itself, compared": DOUBLING + "{% set ns.w = [ns.w, ns.w] %}{% endfor %}{{ ns.w == [1] }}",
    "every letter replaced by the text": DOUBLING + "{% set ns.v = ns.v.replace('a', ns.v) %}{% endfor %}",
    "every letter replaced, as a filter": DOUBLING + "{% set ns.v = ns.v | replace('a', ns.v) %}{% endfor %}",
    "letters joined by the text": DOUBLING + "{% set ns.v = ns.v.join(ns.v) %}{% endfor %}",
    "letters joined, as a filter": DOUBLING + "{% set ns.v = ns.v | list | join(ns.v) %}{% endfor %}",
    "macros that call themselves twice": (
        "{% macro m(n) %}{% if n > 0 %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(50) }}"
    ),
    "a long text printed often": "{% for i in range(90000) %}" + "a" * 60000 + "{% endfor %}",
    "a long text printed often, and caught": (
        "{% for i in range(90000) %}{% set v %}{% for j in range(9999) %}"
        + "a" * 60000
        + "{% endfor %}{% endset %}{% endfor %}"
    ),
}

FORBIDDEN = {
    "{{ (1).to_bytes(9999999999, 'big') }}": "attribute 'to_bytes' of 'int' object is unsafe",
    "{{ 'a' * 9999999999 }}": r"str \* int is not offered",
    "{{ [[1]] * 3 }}": r"list \* int is not offered",
    "{{ 9 ** 9 ** 9 }}": r"int \*\* int is not offered",
    "{{ '%9999999999d' % 1 }}": "str % int is not offered",
    "{{ '{:>9999999999}'.format(1) }}": "attribute 'format' of 'str' object is unsafe",
    "{{ 'a'.ljust(9999999999) }}": "attribute 'ljust' of 'str' object is unsafe",
    "{{ 'a' | center(9999999999) }}": "No filter named 'center'",
    "{{ '%9999999999d' | format(1) }}": "No filter named 'format'",
    "{{ messages | tojson(indent=9999999999) }}": r"tojson\(indent=9999999999\) is not offered: use 0 to 8",
    "{{ lipsum(n=99999) }}": "'lipsum' is undefined",
    "{{ range(999999999) }}": "Range too big",
    "{% set ns = namespace(i=3) %}{% for i in range(9) %}{% set ns.i = ns.i * ns.i %}{% endfor %}": "numbers above 2⁶³",
    "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}": "a namespace is for keeping values",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "recursion",
    "{{ " + "9" * 60000 + " }}": "cannot be read: Exceeds the limit",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "cannot be read: .*recursion",
    "{% for a in [1] %}" * 30 + "{% endfor %}" * 30: "cannot be read: too many statically nested blocks",
    "{{ ''.__class__.__mro__ }}": "attribute '__class__' of 'str' object is unsafe",
    "{{ messages.append(1) }}": "attribute 'append' of 'list' object is unsafe",
    "{{ messages[0].update(role='x') }}": "attribute 'update' of 'dict' object is unsafe",
    "{% import 'os' as os %}": "no loader",
    "{% include '/etc/passwd' %}": "no loader",
    "{{ raise_exception('only two roles') }}": "the chat template failed: only two roles",
    "{{ messages[0].name + '!' }}": "has no attribute 'name'",
    "{% for m in messages %}": "cannot be read: Unexpected end of template",
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_grows_without_end_is_stopped(name):
    with pytest.raises(ValueError, match="it does more than a conversation needs"):
        ChatTemplate(BOMBS[name]).render(MESSAGES)


RENDER_ALL = """
import json, sys
from minilora.llm.chat import ChatTemplate
def peak_mib():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
before = peak_mib()
for source in json.load(sys.stdin):
    try:
        ChatTemplate(source).render([])
    except ValueError:
        pass
print(peak_mib() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_stopping_them_takes_little_memory():
    bombs = json.dumps(list(BOMBS.values()))

    run = subprocess.run([sys.executable, "-c", RENDER_ALL], input=bombs, capture_output=True, text=True, check=True)

    assert float(run.stdout) < 4 * 10  # the budget is 10 million characters, of at most 4 bytes


@pytest.mark.parametrize("source", FORBIDDEN)
def test_what_is_not_offered_says_so(source):
    with pytest.raises(ValueError, match=FORBIDDEN[source]):
        ChatTemplate(source).render(MESSAGES)


def test_a_template_as_long_as_a_book_is_not_read():
    with pytest.raises(
        ValueError, match=f"the chat template has {MAX_SOURCE + 1} characters; at most {MAX_SOURCE} are read"
    ):
        ChatTemplate("x" * (MAX_SOURCE + 1))


def test_filters_that_choose_work_beside_a_namespace():
    chosen = "{% for m in messages | selectattr('role', 'eq', 'user') %}{{ m.role }}{% endfor %}"
    source = "{% set ns = namespace(n=0) %}" + chosen
    assert ChatTemplate(source).render([{"role": "user"}, {"role": "system"}]) == "user"


def test_a_long_conversation_fits_the_budget():
    template = ChatTemplate("{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}")
    messages = [{"role": "user", "content": "word " * 1000}] * 300  # 1.5 million characters

    assert len(template.render(messages)) == 300 * 5006


def test_the_budget_is_for_one_conversation_not_for_all():
    template = ChatTemplate("{% for i in range(15000) %}{% endfor %}done")

    assert [template.render(MESSAGES) for _ in range(3)] == ["done"] * 3


def test_nothing_that_was_passed_in_is_changed():
    messages = [{"role": "user", "content": "Hello"}]

    ChatTemplate("{% for m in messages %}{% set m = {'role': 'x'} %}{{ m.role }}{% endfor %}").render(messages)

    assert messages == [{"role": "user", "content": "Hello"}]
