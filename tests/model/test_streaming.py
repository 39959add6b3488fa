"""Text comes in whole characters, and stop strings never show."""

from __future__ import annotations

import pytest

from edgeformer.model.streaming import TextStream

TEXT = "héllo 日本 👩‍👩‍👧 end"


def stream_of(tokens: list[bytes], stop=()) -> tuple[list[str], str, bool]:
    pieces: list[str] = []
    stream = TextStream(lambda i: tokens[i], stop, pieces.append)
    stopped = [stream.push(i) for i in range(len(tokens))]
    return pieces, stream.close(), stopped[-1]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_characters_over_several_tokens(size):
    data = TEXT.encode()
    pieces, text, _ = stream_of([data[i : i + size] for i in range(0, len(data), size)])
    assert text == TEXT == "".join(pieces)
    assert not any("\ufffd" in piece for piece in pieces)


def test_text_is_not_held_back_without_reason():
    pieces, _, _ = stream_of([b"ab", b"cd", b"ef"], stop=["xyz"])
    assert pieces == ["ab", "cd", "ef"]


def test_unfinished_character_at_the_end():
    pieces, text, _ = stream_of([b"a", "é".encode()[:1]])
    assert text == "a\ufffd"
    assert pieces == ["a", "\ufffd"]


@pytest.mark.parametrize("size", [1, 2, 7])
def test_stop_strings_are_cut_wherever_tokens_break(size):
    data = b"one <en <end> two"
    pieces, text, stopped = stream_of(
        [data[i : i + size] for i in range(0, len(data), size)], stop=["<end>", "never"]
    )
    assert text == "one <en " == "".join(pieces)
    assert stopped


def test_held_text_comes_out_when_no_stop_follows():
    pieces, text, stopped = stream_of([b"one <e", b"nd"], stop=["<end>"])
    assert text == "one <end" == "".join(pieces)
    assert pieces[0] == "one "
    assert not stopped


def test_the_earliest_stop_wins():
    assert stream_of([b"a, b; c"], stop=["; ", ", "])[1] == "a"
