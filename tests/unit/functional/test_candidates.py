import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from openrlhf_bd.functional.candidates import CHUNK, TIERS, CandidateSets, restrict_top_p, top_p_candidates
from openrlhf_bd.records import RecordedSets

INF = float("inf")


def ids_of(sets: CandidateSets, state: int) -> list[int]:
    return sets.ids_M[sets.offsets_S1[state] : sets.offsets_S1[state + 1]].tolist()


def brute_force(z_V: np.ndarray, top_p: float, always: tuple[int, ...] = ()) -> list[int]:
    """Def. 1 by the letter: walk down the sorted vocabulary in float64 while the mass before a token is < p."""
    z_V = z_V.astype(np.float64)
    weight_V = np.exp(z_V - z_V.max())
    order = sorted(range(len(z_V)), key=lambda token: (-z_V[token], token))
    chosen, before = [], 0.0
    for token in order:
        if before >= top_p * weight_V.sum() and top_p < 1:
            break
        chosen.append(token)
        before += weight_V[token]
    return chosen + [token for token in order if token in always and token not in chosen]


def test_set_includes_the_token_that_crosses_p() -> None:
    """Probabilities .5 .3 .2: p .4 takes one token, p .6 two (.5 < .6), p .9 three (.8 < .9)."""
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]]))
    assert ids_of(top_p_candidates(logits, top_p=0.4), 0) == [1]
    assert ids_of(top_p_candidates(logits, top_p=0.6), 0) == [1, 2]
    assert ids_of(top_p_candidates(logits, top_p=0.9), 0) == [1, 2, 0]


def test_masses_and_logprobs_of_known_probabilities() -> None:
    """neg_log_mass is -log .8 for the set {.5, .3}; log-probabilities are log .5 and log .3, at temperature 1."""
    sets = top_p_candidates(torch.log(torch.tensor([[0.2, 0.5, 0.3]])) + 7.0, top_p=0.6)
    torch.testing.assert_close(sets.neg_log_mass_S, torch.tensor([-math.log(0.8)]))
    torch.testing.assert_close(sets.logprobs_M, torch.log(torch.tensor([0.5, 0.3])))
    assert sets.ids_M.dtype == sets.offsets_S1.dtype == torch.int64
    assert sets.neg_log_mass_S.dtype == torch.float32


def test_ties_go_to_lower_ids() -> None:
    """Of equal tokens the lower ids enter first, also where the tie straddles what a tier looks at."""
    # Four equal tokens of 1/4: mass before the third is .5 < .6.
    assert ids_of(top_p_candidates(torch.zeros(1, 4), top_p=0.6), 0) == [0, 1, 2]
    # 100 distinct tokens on top, then 3,900 equal ones.
    logits = torch.zeros(1, 4000)
    logits[0, 50:150] = torch.linspace(3, 1, 100)
    expected = brute_force(logits[0].numpy(), 0.5)
    assert 128 < len(expected) < 4000
    assert ids_of(top_p_candidates(logits, top_p=0.5), 0) == expected


@pytest.mark.parametrize("vocab_size", [100, 128, 129, 2048, 2049, 5000])
def test_flat_distribution(vocab_size: int) -> None:
    """A flat teacher needs ceil(p V) tokens, at any size of vocabulary around the tiers."""
    sets = top_p_candidates(torch.full((2, vocab_size), -3.0), top_p=0.75)
    assert ids_of(sets, 1) == list(range(math.ceil(0.75 * vocab_size)))


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.8, 0.95, 0.999])
def test_sets_agree_with_brute_force(top_p: float) -> None:
    """2,500 random rows a p, peaked to flat, half of them full of ties: every set as by float64 brute force."""
    rng = np.random.default_rng(int(1000 * top_p))
    for vocab_size, num_rows in ((3, 500), (40, 1500), (300, 450), (2500, 50)):
        scale = rng.choice([0.01, 0.5, 2.0, 8.0], size=(num_rows, 1))
        z_SV = (rng.normal(size=(num_rows, vocab_size)) * scale).astype(np.float32)
        z_SV[::2] = np.round(z_SV[::2])
        z_SV[rng.random(z_SV.shape) < 0.02] = -INF
        z_SV[np.isneginf(z_SV).all(axis=1), 0] = 0.0
        always = tuple(rng.choice(vocab_size, size=2, replace=False).tolist())
        sets = top_p_candidates(torch.from_numpy(z_SV), top_p=top_p, always_include=always)
        for row in range(num_rows):
            assert ids_of(sets, row) == brute_force(z_SV[row], top_p, always)


@pytest.mark.parametrize(("vocab_size", "num_rows"), [(9_001, 40), (40_003, 10)])
def test_sets_of_large_vocabularies_agree_with_brute_force(vocab_size: int, num_rows: int) -> None:
    """Where only some chunks of the vocabulary are looked at, the last one short: sets, order and ties are exact."""
    rng = np.random.default_rng(vocab_size)
    scale = rng.choice([1.5, 2.5, 4.0, 8.0], size=(num_rows, 1))
    z_SV = (rng.normal(size=(num_rows, vocab_size)) * scale).astype(np.float32)
    z_SV[::2] = np.round(z_SV[::2], 1)
    # The most likely tokens side by side, and at both ends of the short chunk.
    z_SV[3::5, 130:150] = z_SV[3::5].max(axis=1, keepdims=True)
    z_SV[4::5, vocab_size // CHUNK * CHUNK] = z_SV[4::5, -1] = z_SV[4::5].max(axis=1) + 1
    z_SV[rng.random(z_SV.shape) < 0.02] = -INF
    always = (0, vocab_size - 1)
    sizes = []
    for top_p in (0.3, 0.8, 0.95):
        sets = top_p_candidates(torch.from_numpy(z_SV), top_p=top_p, always_include=always)
        sizes += sets.sizes_S.tolist()
        for row in range(num_rows):
            assert ids_of(sets, row) == brute_force(z_SV[row], top_p, always)
    # Every tier was needed.
    assert min(sizes) < TIERS[0] < TIERS[1] < TIERS[2] < max(sizes)
    assert any(TIERS[0] < size < TIERS[1] for size in sizes)
    assert any(TIERS[1] < size < TIERS[2] for size in sizes)


def test_logits_far_below_the_largest_count_as_nothing() -> None:
    """A row that spans 10,000 nats has the same sets and masses as its two likely tokens alone."""
    logits = torch.full((1, 5000), -1e4)
    logits[0, [7, 4999]] = torch.tensor([0.0, math.log(3.0)])
    sets = top_p_candidates(logits, top_p=0.8)
    assert ids_of(sets, 0) == [4999, 7]
    torch.testing.assert_close(sets.logprobs_M, torch.log(torch.tensor([0.75, 0.25])))
    assert float(sets.neg_log_mass_S) == 0.0


def test_boundary_within_float32_rounding_is_decided_in_float64() -> None:
    """p a billionth above the mass before a token includes it, a billionth below does not."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        z_V = (rng.normal(size=3000) * 4).astype(np.float32)
        probs = np.sort(np.exp(z_V.astype(np.float64)) / np.exp(z_V.astype(np.float64)).sum())[::-1]
        num_tokens = int(rng.integers(1, 60))
        mass = float(probs[:num_tokens].sum())
        z_SV = torch.from_numpy(z_V)[None]
        assert int(top_p_candidates(z_SV, top_p=mass * (1 + 1e-9)).sizes_S) == num_tokens + 1
        assert int(top_p_candidates(z_SV, top_p=mass * (1 - 1e-9)).sizes_S) == num_tokens


def test_always_included_ids_follow_by_descending_probability() -> None:
    """Ids outside the set are appended in order, ids inside are not repeated, and the mass counts them."""
    # p .4 -> {1}; 0 (.05) and 3 (.15) are added as 3, 0; mass .5 + .15 + .05.
    logits = torch.log(torch.tensor([[0.05, 0.5, 0.3, 0.15]]))
    sets = top_p_candidates(logits, top_p=0.4, always_include=(0, 1, 3, 3))
    assert ids_of(sets, 0) == [1, 3, 0]
    torch.testing.assert_close(sets.neg_log_mass_S, torch.tensor([-math.log(0.7)]))


def test_p_of_one_is_a_flag() -> None:
    """p = 1 is no mask: every set is the whole vocabulary with mass 1, and no id is listed."""
    sets = top_p_candidates(torch.tensor([[0.0, -INF, 2.0], [0.0, 0.0, 0.0]]), top_p=1.0, always_include=[1])
    assert sets.is_whole
    assert (sets.num_states, sets.num_candidates) == (2, 0)
    assert sets.sizes_S.tolist() == [0, 0]
    assert sets.neg_log_mass_S.tolist() == [0.0, 0.0]
    assert sets.logprobs_M is None
    assert sets.to("cpu").is_whole
    assert restrict_top_p(sets, top_p=1.0) is sets
    with pytest.raises(ValueError, match=r"cannot be cut to top_p 0\.5"):
        restrict_top_p(sets, top_p=0.5)
    assert not top_p_candidates(torch.zeros(2, 3), top_p=0.999).is_whole


def test_p_of_one_refuses_bad_logits_too() -> None:
    """A row of NaN or of -inf alone is an error at every p."""
    with pytest.raises(ValueError, match="row 1"):
        top_p_candidates(torch.tensor([[0.0, 1.0], [-INF, -INF]]), top_p=1.0)


def test_recorded_sets_of_p_of_one() -> None:
    """Rows whose sets are whole become whole sets of all their states; a mixture is an error."""
    whole = [RecordedSets.whole(2), RecordedSets.whole(3)]
    sets = CandidateSets.from_recorded(whole)
    assert sets.is_whole
    assert sets.num_states == 5
    one = RecordedSets(np.array([4], np.int32), np.array([0, 1]), np.zeros(1, np.float32), None)
    with pytest.raises(ValueError, match="1 of 2 rows have sets of p = 1"):
        CandidateSets.from_recorded([whole[0], one])


def test_half_precision_and_float64_logits() -> None:
    """bfloat16 logits are taken at their exact values; float64 logits stay float64."""
    logits = torch.randn(50, 400, generator=torch.Generator().manual_seed(1)) * 3
    half = logits.bfloat16()
    assert torch.equal(top_p_candidates(half, top_p=0.8).ids_M, top_p_candidates(half.double(), top_p=0.8).ids_M)


class FullSorts(TorchDispatchMode):
    """Rows that are sorted at the width of the vocabulary."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size, self.rows = vocab_size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "sort" in str(func) and isinstance(args[0], Tensor) and args[0].shape[-1] == self.vocab_size:
            self.rows += args[0].shape[0]
        return func(*args, **(kwargs or {}))


def test_only_overflowing_rows_are_sorted() -> None:
    """Of 200 rows with 2 flat ones, 2 are sorted over the whole vocabulary."""
    logits = torch.randn(200, 4000, generator=torch.Generator().manual_seed(2)) * 4
    logits[[3, 77]] = 0.0
    with FullSorts(4000) as sorts:
        sets = top_p_candidates(logits, top_p=0.8)
    assert sorts.rows == 2
    assert sets.sizes_S[[3, 77]].tolist() == [3200, 3200]


@pytest.mark.parametrize("bad", [float("nan"), INF])
def test_bad_logits_are_refused(bad: float) -> None:
    """NaN, +inf or a row without a finite logit is an error that names the row."""
    logits = torch.zeros(3, 4)
    logits[1, 2] = bad
    with pytest.raises(ValueError, match="row 1"):
        top_p_candidates(logits, top_p=0.8)
    with pytest.raises(ValueError, match="row 0"):
        top_p_candidates(torch.full((1, 4), -INF), top_p=0.8)


def test_bad_arguments_are_refused() -> None:
    """p outside (0, 1] and ids outside the vocabulary are errors."""
    with pytest.raises(ValueError, match="top_p is 0"):
        top_p_candidates(torch.zeros(1, 4), top_p=0)
    with pytest.raises(ValueError, match=r"always_include has \[4\]"):
        top_p_candidates(torch.zeros(1, 4), top_p=0.5, always_include=[4])


def test_restriction_equals_recording_at_the_smaller_p() -> None:
    """Sets recorded at p .98 and cut to .7 are those of p .7, with their mass."""
    logits = torch.randn(400, 60, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 3
    wide = top_p_candidates(logits, top_p=0.98, always_include=[5, 9])
    narrow, direct = restrict_top_p(wide, top_p=0.7), top_p_candidates(logits, top_p=0.7)
    assert torch.equal(narrow.ids_M, direct.ids_M)
    assert torch.equal(narrow.offsets_S1, direct.offsets_S1)
    torch.testing.assert_close(narrow.neg_log_mass_S, direct.neg_log_mass_S, rtol=0, atol=1e-6)
    kept, direct = (
        restrict_top_p(wide, top_p=0.7, always_include=[9]),
        top_p_candidates(logits, top_p=0.7, always_include=[9]),
    )
    assert torch.equal(kept.ids_M, direct.ids_M)
    torch.testing.assert_close(kept.logprobs_M, direct.logprobs_M)


def test_restriction_of_known_sets() -> None:
    """{.5 .25 .125}: p .5 keeps one (mass before the second is .5), p .6 two; the mass is recomputed."""
    logprobs = torch.log(torch.tensor([0.5, 0.25, 0.125, 1.0], dtype=torch.float64))
    sets = CandidateSets(torch.tensor([4, 7, 1, 3]), torch.tensor([0, 3, 4]), torch.zeros(2), logprobs)
    assert restrict_top_p(sets, top_p=0.5).ids_M.tolist() == [4, 3]
    cut = restrict_top_p(sets, top_p=0.6)
    assert cut.ids_M.tolist() == [4, 7, 3]
    torch.testing.assert_close(cut.neg_log_mass_S, torch.tensor([-math.log(0.75), 0.0]))
    assert restrict_top_p(sets, top_p=1.0).ids_M.tolist() == [4, 7, 1, 3]


def test_restriction_refuses_what_it_cannot_do() -> None:
    """No log-probabilities, or an id that some set was recorded without, is an error."""
    sets = CandidateSets(torch.tensor([4, 7, 3]), torch.tensor([0, 2, 3]), torch.zeros(2), None)
    with pytest.raises(ValueError, match="without log-probabilities"):
        restrict_top_p(sets, top_p=0.5)
    sets = CandidateSets(sets.ids_M, sets.offsets_S1, sets.neg_log_mass_S, torch.zeros(3))
    with pytest.raises(ValueError, match="id 7 is in 1 of 2"):
        restrict_top_p(sets, top_p=0.5, always_include=[7])


def test_restriction_keeps_an_id_where_it_is() -> None:
    """Of sets that may lack an always-included id, it stays in those that have it: {.6 .3 .05} and {.9}."""
    logprobs = torch.log(torch.tensor([0.6, 0.3, 0.05, 0.9], dtype=torch.float64))
    sets = CandidateSets(torch.tensor([4, 3, 7, 4]), torch.tensor([0, 3, 4]), torch.zeros(2), logprobs)
    cut = restrict_top_p(sets, top_p=0.5, always_include=[7], require_always=False)
    assert cut.ids_M.tolist() == [4, 7, 4]
    torch.testing.assert_close(cut.neg_log_mass_S, torch.tensor([-math.log(0.65), -math.log(0.9)]))


def recorded(sizes: list[int], *, logprobs: bool = True) -> RecordedSets:
    total = sum(sizes)
    return RecordedSets(
        np.arange(total, dtype=np.int32),
        np.cumsum([0, *sizes]),
        np.full(len(sizes), 0.1, np.float32),
        np.full(total, -1.0, np.float32) if logprobs else None,
    )


def test_recorded_rows_are_concatenated() -> None:
    """States keep their order over rows: sizes 2 1, then 3."""
    sets = CandidateSets.from_recorded([recorded([2, 1]), recorded([3])])
    assert sets.num_states == 3
    assert sets.offsets_S1.tolist() == [0, 2, 3, 6]
    assert sets.ids_M.tolist() == [0, 1, 2, 0, 1, 2]
    assert sets.state_M.tolist() == [0, 0, 1, 2, 2, 2]
    assert sets.sizes_S.tolist() == [2, 1, 3]
    assert sets.to("cpu").state_M.tolist() == sets.state_M.tolist()
    assert CandidateSets.from_recorded([recorded([1], logprobs=False)]).logprobs_M is None


def test_recorded_rows_must_agree_on_logprobs() -> None:
    """Rows with and without log-probabilities don't mix; no row at all is an error."""
    with pytest.raises(ValueError, match="1 of 2 rows"):
        CandidateSets.from_recorded([recorded([1]), recorded([1], logprobs=False)])
    with pytest.raises(ValueError, match="no row"):
        CandidateSets.from_recorded([])
