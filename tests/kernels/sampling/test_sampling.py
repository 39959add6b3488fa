"""sampling: compiled forms take exactly the reference's tokens; the distribution is right."""

from __future__ import annotations

import itertools

import pytest
import torch

from edgeformer.compiler.errors import EdgeFormerError, UnsupportedError
from edgeformer.compiler.target import Target, detect
from edgeformer.kernels.sampling import OPERATOR, tvm_cpu
from edgeformer.kernels.sampling.reference import keep, philox4x32, sample, weights
from edgeformer.kernels.sampling.spec import SamplingOptions, SamplingSpec
from edgeformer.runtime import launch

ISAS = sorted({"portable", detect().isa})
OPTIONS = [
    SamplingOptions(),
    SamplingOptions(temperature=1.0),
    SamplingOptions(temperature=0.7, top_k=3),
    SamplingOptions(temperature=1.3, top_k=40),
    SamplingOptions(temperature=2.5, top_p=0.95),
    SamplingOptions(temperature=1.0, top_p=1e-12),
    SamplingOptions(temperature=0.8, top_k=50, top_p=0.9, min_p=0.05),
    SamplingOptions(temperature=1.0, min_p=0.1),
    SamplingOptions(temperature=100.0, top_k=700, top_p=0.999),
    SamplingOptions(temperature=1e-6, top_p=0.5),
    SamplingOptions(temperature=1.5, repetition_penalty=1.3, top_p=0.9),
    SamplingOptions(repetition_penalty=5.0),
]
SMALL = SamplingSpec(1003)


def bound(spec: SamplingSpec, isa: str):
    return launch.bind(OPERATOR, tvm_cpu.FORM, spec, {}, detect().with_isa(isa))


def logits(rows: int, vocab: int, spread: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed + rows + vocab)) * spread


@pytest.mark.parametrize(
    ("isa", "vocab"), [*((isa, v) for isa in ISAS for v in (1, 31, 257, 1003)), ("portable16", 1003)]
)
def test_tokens_equal_the_reference(isa: str, vocab: int) -> None:
    spec = SamplingSpec(vocab)
    call = bound(spec, isa)
    for options, rows in zip([*OPTIONS, OPTIONS[3]], itertools.cycle((1, 2, 3, 5, 17)), strict=False):
        x = logits(rows, vocab)
        previous = torch.randint(-1, vocab, (rows, 9))
        for step in (0, 1, 1 << 33):
            got = call(x, options, previous, 7, step)
            assert torch.equal(got, sample(spec, x, options, previous, 7, step)), options
    assert call(torch.empty(0, vocab), OPTIONS[1]).shape == (0,)


def test_a_real_vocabulary() -> None:
    spec = SamplingSpec(49152)
    call = bound(spec, detect().isa)
    x = logits(1, 49152)
    for options in OPTIONS:
        for seed in (1 << 63,):
            want = sample(spec, x, options, x.argmax(1, True), seed, 3)
            assert torch.equal(call(x, options, x.argmax(1, True), seed, 3), want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("options", OPTIONS)
def test_ties_nan_and_infinities(isa: str, options: SamplingOptions) -> None:
    nan, inf = torch.nan, torch.inf
    rows = torch.full((9, 1003), -inf)
    rows[1] = nan  # rows 0 and 1: nothing to choose, token 0
    rows[2, 5:1000:7], rows[2, 3] = nan, 1.0  # one finite logit
    rows[3, 700], rows[3, 4] = inf, 3.0  # +inf wins
    rows[3, 900] = inf
    rows[4] = 0.0  # all equal
    rows[5] = torch.randint(-3, 3, (1003,)).float()  # many ties, of both signs of zero
    rows[5, ::2] *= -1
    rows[6] = logits(1, 1003, 1e-3)[0]  # all in one bin
    rows[7] = logits(1, 1003, 1e38)[0]  # differences overflow
    rows[8] = logits(1, 1003)[0]
    rows[8, ::3] = nan
    for step in range(4):
        got = bound(SMALL, isa)(rows, options, None, 5, step)
        assert torch.equal(got, sample(SMALL, rows, options, None, 5, step))
        assert got[:4].tolist() == [0, 0, 3, 700]


def test_seeds_steps_and_rows_are_independent() -> None:
    call, options = bound(SMALL, detect().isa), SamplingOptions(temperature=100.0)
    x = logits(1, 1003).expand(17, -1)
    first = call(x, options, None, 1, 0)
    assert torch.equal(first, call(x, options, None, 1, 0)) and len(first.unique()) > 8
    assert torch.equal(first[:1], call(x[:1], options, None, 1, 0))
    assert not torch.equal(first, call(x, options, None, 2, 0))
    assert not torch.equal(first, call(x, options, None, 1, 1))


def test_the_logits_are_not_written() -> None:
    x = logits(3, 1003)
    before = x.clone()
    bound(SMALL, detect().isa)(x, OPTIONS[-2], torch.arange(30).view(3, 10), 0, 0)
    assert torch.equal(x, before)


def test_repetition_penalty_counts_each_token_once() -> None:
    x = torch.tensor([[4.0, 3.0, -1.0, -2.0]])
    spec, options = SamplingSpec(4), SamplingOptions(repetition_penalty=1.5)
    call = bound(spec, detect().isa)
    assert call(x, options, torch.tensor([[0, 0, 0, -1]])).tolist() == [1]  # 4 / 1.5 = 2.67, not 4 / 1.5^3
    assert call(-x, options, torch.tensor([[3, -1, -1, 3]])).tolist() == [3]  # 2 / 1.5 = 1.33 still leads
    with pytest.raises(EdgeFormerError, match="previous holds id 4"):
        call(x, options, torch.tensor([[4]]))
    with pytest.raises(EdgeFormerError, match=r"float32 \[B, 4\]"):
        call(x[:, :3], options)


@pytest.mark.parametrize("options", OPTIONS[1:9])
def test_kept_probabilities_against_transformers(options: SamplingOptions) -> None:
    """The order and the rules of transformers' warpers, written out in fp64."""
    x = logits(1, 1003)[0]
    got = keep(x, weights(x, options.scale), options).double()
    scores = x.double() / options.temperature
    if options.top_k:
        scores = torch.where(scores < scores.topk(options.top_k).values[-1], -torch.inf, scores)
    if options.top_p < 1:
        ordered, index = scores.sort()
        drop = ordered.softmax(0).cumsum(0) <= 1 - options.top_p
        drop[-1] = False
        scores[index[drop]] = -torch.inf
    if options.min_p:
        p = scores.softmax(0)
        scores = torch.where(p < options.min_p * p.max(), -torch.inf, scores)
    torch.testing.assert_close(got / got.sum(), scores.softmax(0), rtol=2e-4, atol=1e-8)


def test_frequencies_follow_the_weights() -> None:
    x, count = torch.tensor([0.0, 1.0, 2.0, -1.0, 1.5]), 20000
    call = bound(SamplingSpec(5), detect().isa)
    tokens = call(x.expand(count, -1), SamplingOptions(temperature=1.0), None, 11, 0)
    expected = x.softmax(0) * count
    chi2 = ((torch.bincount(tokens, minlength=5) - expected) ** 2 / expected).sum()
    assert chi2 < 18.5  # 4 degrees of freedom: 0.1%


def test_philox_known_answers() -> None:
    """The vectors of Random123's kat_vectors."""
    assert philox4x32((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = 0xFFFFFFFF
    assert philox4x32((ones, ones, ones, ones), (ones, ones)) == (
        0x408F276D,
        0x41C83B0E,
        0xA20BC7C6,
        0x6D5451FD,
    )


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": torch.nan},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 2},
        {"repetition_penalty": 0},
    ],
)
def test_bad_options_are_refused(bad: dict) -> None:
    with pytest.raises(UnsupportedError, match=next(iter(bad))):
        SamplingOptions(**bad)


def test_compiles_for_avx512() -> None:
    from edgeformer.compiler.backends import tvm_llvm

    target = Target.parse("znver5")
    assert "%zmm" in tvm_llvm.inspect(tvm_cpu.lower(SMALL, {}, target), target).assembly
