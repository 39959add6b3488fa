"""Chat templates: a program from the model's file, run in Jinja's immutable sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2

from ...compiler.errors import FormatError, UnsupportedError
from .sandbox import MAX_CHARACTERS, Sandbox


class TemplateRefusal(jinja2.TemplateError):
    """The template itself refuses the messages (``raise_exception``)."""


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str = "",
    eos_token: str = "",
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The prompt for a conversation, by the model's own template.

    ``messages`` are mappings with ``role`` and ``content``; ``variables`` reach the template as they are.

    Raises:
        FormatError: the template is damaged, or does what the sandbox forbids.
        UnsupportedError: a message without role or content, or one that the template refuses.
    """
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise UnsupportedError(f"a message needs 'role' and 'content'; got {message!r}")
    try:
        program = _environment().from_string(template)
        pieces, length = [], 0
        for piece in program.generate(
            messages=[dict(m) for m in messages],
            bos_token=bos_token,
            eos_token=eos_token,
            add_generation_prompt=add_generation_prompt,
            **variables,
        ):
            length += len(piece)
            if length > MAX_CHARACTERS:
                raise FormatError(f"the chat template writes more than {MAX_CHARACTERS} characters")
            pieces.append(piece)
        return "".join(pieces)
    except TemplateRefusal as error:
        raise UnsupportedError(f"the chat template refuses these messages: {error.message}") from error
    except FormatError:
        raise
    except Exception as error:  # a foreign program: whatever it does wrong is its own
        raise FormatError(
            f"the chat template fails: {type(error).__name__}: {error}; complete a raw prompt instead"
        ) from error


def _environment() -> Sandbox:
    env = Sandbox()
    env.add_filter("tojson", _to_json)
    env.globals["raise_exception"] = _refuse
    env.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return env


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _refuse(message: str) -> None:
    raise TemplateRefusal(message)
