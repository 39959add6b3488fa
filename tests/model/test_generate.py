"""What edgeformer.load returns: text in, text out, batches, chat, limits, reports."""

from __future__ import annotations

import pytest
import torch

import edgeformer
from edgeformer.compiler.errors import CapacityError, FormatError, UnsupportedError
from edgeformer.runtime.dispatch import use_target


@pytest.fixture(scope="module")
def tiny(make_gguf):
    return make_gguf("Q8_0", heads=4, kv_heads=2)


@pytest.fixture
def model(tiny, plain):
    yield edgeformer.load(tiny.path, target=plain, activation="float", kv="fp32", threads=1)
    use_target(None)


def test_greedy_ids_equal_transformers(model, tiny):
    reference = tiny.hugging_face()
    for prompt in ([5, 9, 200, 31], [7], list(range(3, 40))):
        expected = reference.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :]
        assert model.generate(prompt, max_tokens=20, ignore_eos=True) == expected.tolist()


def test_text_streams_and_returns(model):
    pieces: list[str] = []
    text = model.generate("hello world", max_tokens=12, stream=pieces.append, ignore_eos=True)
    assert text == "".join(pieces)
    run = model.last_run
    assert (run.prompt_tokens, run.new_tokens, run.stop_reasons) == (2, 12, ("length",))
    assert run.prefill_speed > 0 and run.decode_speed > 0


@pytest.mark.parametrize("count", [2, 5])
def test_ragged_batch_equals_single_prompts(model, count):
    prompts = [list(range(10, 10 + n)) for n in (7, 3, 11, 1, 7)[:count]]
    batch = model.generate(prompts, max_tokens=10, ignore_eos=True)
    assert batch == [model.generate(prompt, max_tokens=10, ignore_eos=True) for prompt in prompts]


def test_texts_in_a_batch(model):
    both = model.generate(["hello", "world hello"], max_tokens=6)
    assert both == [model.generate(text, max_tokens=6) for text in ("hello", "world hello")]
    with pytest.raises(UnsupportedError, match="single prompt"):
        model.generate(["a", "b"], stream=print)


def test_chunked_prefill_equals_one_chunk(model):
    whole = model.prefill(list(range(3, 60)))
    model.reset()
    model.chunk = 16
    assert torch.allclose(model.prefill(list(range(3, 60))), whole, atol=1e-4)
    model.prefill([5, 6])
    assert model.position == 59


def test_prefill_and_decode_by_hand(model):
    greedy = model.generate([5, 6, 7], max_tokens=4, ignore_eos=True)
    model.reset()
    logits, got = model.prefill([5, 6, 7]), []
    for _ in range(4):
        got.append(int(logits.argmax()))
        logits = model.decode(got[-1])
    assert got == greedy
    model.reset()
    assert model.prefill(torch.tensor([[5, 6, 7]] * 3)).shape == (3, model.config.vocab_size)
    assert model.decode(torch.tensor([1, 2, 3])).shape == (3, model.config.vocab_size)
    with pytest.raises(UnsupportedError, match="3 rows"):
        model.decode(1)


def test_stop_tokens_and_stop_strings(model):
    ids = model.generate([5, 6, 7], max_tokens=8, ignore_eos=True)
    text = model.generate("hello", max_tokens=8, ignore_eos=True)
    model.tokenizer.stop_ids = frozenset({ids[3]})
    first = ids.index(ids[3])
    assert model.generate([5, 6, 7], max_tokens=8) == ids[:first]
    assert model.last_run.stop_reasons == ("eos",)
    del model.tokenizer
    middle = text[len(text) // 2]
    assert model.generate("hello", max_tokens=8, ignore_eos=True, stop=middle) == text[: text.index(middle)]
    assert model.last_run.stop_reasons == ("stop",)


def test_seeds_repeat_and_differ(model):
    draw = lambda seed: model.generate([5], max_tokens=12, temperature=2.0, seed=seed, ignore_eos=True)  # noqa: E731
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    free = model.generate([5], max_tokens=12, temperature=2.0, ignore_eos=True)
    assert free == draw(model.last_run.seed)
    assert model.generate([5], max_tokens=5, temperature=1.0, top_k=1, ignore_eos=True) == model.generate(
        [5], max_tokens=5, ignore_eos=True
    )
    assert len(model.generate([[5], [6, 7]], max_tokens=4, repetition_penalty=1.3, ignore_eos=True)) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"min_p": 2.0},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"max_tokens": 0},
    ],
)
def test_bad_options(model, options):
    with pytest.raises(UnsupportedError):
        model.generate([5], **options)


def test_the_context_is_a_limit(model, tiny):
    assert len(model.generate([5] * (tiny.context - 3), max_tokens=50, ignore_eos=True)) == 4
    assert model.last_run.stop_reasons == ("context",)
    for call in (model.generate, model.prefill):
        model.reset()
        with pytest.raises(CapacityError, match=f"{tiny.context + 1} tokens"):
            call([5] * (tiny.context + 1))
    for bad in ([], [-1], [tiny.vocab]):
        with pytest.raises(UnsupportedError):
            model.generate(bad)


def test_chat_reuses_what_the_cache_holds(model):
    talk = [{"role": "user", "content": "hello"}]
    answer = model.chat(talk, max_tokens=6)
    talk += [{"role": "assistant", "content": answer}, {"role": "user", "content": "world"}]
    again = model.chat(talk, max_tokens=6)
    assert model.last_run.reused_tokens > 5
    model.reset()
    assert model.chat(talk, max_tokens=6) == again
    assert model.last_run.reused_tokens == 0


def test_report_names_every_layer(model):
    model.generate([5], max_tokens=2)
    rows = model.report()
    layers = [row["layer"] for row in rows]
    assert {"layers.0.qkv", "layers.0.o", "layers.1.gate_up", "layers.1.down", "head"} <= set(layers)
    assert all(row["form"] for row in rows)
    assert edgeformer.report(model) == rows


def test_without_tokenizer_or_template(make_gguf, plain):
    model = edgeformer.load(make_gguf("F32", tokenizer=False).path, target=plain)
    assert len(model.generate([5, 6], max_tokens=3)) == 3
    assert model.chat_template is None
    with pytest.raises(FormatError, match="tokenizer"):
        model.generate("hello")
    with pytest.raises(UnsupportedError, match="chat template"):
        model.chat([{"role": "user", "content": "x"}])
    use_target(None)


def test_load_refuses_bad_options(tiny, tmp_path):
    for options in ({"kv": "int3"}, {"quantize": "int1"}, {"activation": "fp4"}):
        with pytest.raises(UnsupportedError):
            edgeformer.load(tiny.path, **options)  # type: ignore[arg-type]
    with pytest.raises(CapacityError):
        edgeformer.load(tiny.path, context=tiny.context + 1)
    with pytest.raises(edgeformer.TargetError):
        edgeformer.load(tiny.path, target="no-such-device")
    with pytest.raises(FormatError):
        edgeformer.load(tmp_path / "none.gguf")
