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
