"""Chat templates render as transformers renders them, and cannot leave the sandbox."""

from __future__ import annotations

import pytest

from edgeformer.compiler.errors import FormatError, UnsupportedError
from edgeformer.model.load.chat import render_chat
from edgeformer.model.load.container import Container

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi {{ 1 + 1 }} <b>&</b>"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye\n"},
]


@pytest.mark.parametrize("messages", [TALK, TALK[1:2]])
def test_real_template_as_transformers_renders_it(smollm2, messages):
    chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")
    template = Container(smollm2).metadata["tokenizer.chat_template"]
    rendered, _ = chat_template_utils.render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=True
    )
    assert render_chat(template, messages) == rendered[0]


def test_what_templates_use():
    assert render_chat("{{ bos_token }}{{ messages | tojson }}", [], bos_token="<s>") == "<s>[]"
    assert (
        render_chat("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}x{% endfor %}", TALK)
        == "x"
    )
    assert len(render_chat("{{ strftime_now('%Y') }}", [])) == 4
    assert render_chat("{{ tools | tojson }}", [], tools=[{"a": "é<"}]) == '[{"a": "é<"}]'
    assert render_chat("{%- if add_generation_prompt %}\nyes\n{%- endif %}", []) == "yes"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% set _ = messages[0].update(role='x') %}",
        "{{ strftime_now.__globals__.keys() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ 'a' * 10**12 }}",
        "{{ range(10**9) | list }}",
        "{{ 9 ** 99999999 }}",
        "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include '/etc/passwd' %}",
        "{{ messages[",
        "{{ 1 / 0 }}",
        "{{ missing.field }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set a = ['x'] %}" + "{% set a = [a, a] %}" * 60 + "{{ a }}",
        "{% set a = ['x'] %}" + "{% set a = [a, a] %}" * 60 + "{{ a == a | list }}",
        "{{ 'a'.center(10 ** 9) }}",
        "{{ 'a' | center(1000000000) }}",
        "{{ 'a' | indent(1000000000, true) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 1000000000) }}",
        "{{ ('a' * 9999) | replace('a', 'b' * 9999) }}",
        "{{ (['a' * 999] * 999) | join('b' * 99999) }}",
        "{{ lipsum(n=100000) }}",
        "{{ messages | map('replace', 'a', 'b' * 99999999) | list }}",
        "{% set x %}{% for a in range(99999) %}" + "y" * 1000 + "{% endfor %}{% endset %}",
        "{{ messages | tojson(indent=100000000) }}",
        "x" * (1 << 19),
    ],
)
def test_hostile_and_broken_templates_are_format_errors(template):
    with pytest.raises(FormatError):
        render_chat(template, TALK)


def test_refusals():
    with pytest.raises(UnsupportedError, match="roles must alternate"):
        render_chat("{{ raise_exception('roles must alternate') }}", TALK)
    with pytest.raises(UnsupportedError, match="'role' and 'content'"):
        render_chat("x", [{"role": "user"}])


def test_a_hostile_template_ends_soon():
    import time

    start = time.process_time()
    with pytest.raises(FormatError, match="takes too long|more than"):
        render_chat(
            "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}", TALK
        )
    assert time.process_time() - start < 10  # the bound is 0.8 s; this is no measurement


def test_long_talks_pass_the_bounds():
    template = (
        "{% for m in messages %}{% set text = m.content | trim | replace('a', 'bb') %}"
        "{{ '<|' ~ m.role ~ '|>' + text.split('</think>')[-1] + '\n' }}{% endfor %}"
    )
    talk = [{"role": "user", "content": "a word " * 300}] * 400
    assert len(render_chat(template, talk)) > 400 * 300 * 7
