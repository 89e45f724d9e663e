"""Top-p candidate sets of many states, ragged: from logits (Def. 1), from a store, or cut to a smaller p."""

# S states, S1 = S + 1, V vocabulary, M candidates of all states, K tokens looked at in a tier, R rows of a tier,
# C chunks of the vocabulary, L ids of a chunk, A ids that are always included

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from openrlhf_bd.functional.segments import segment_cumsum_before, segment_logsumexp, segment_sum
from openrlhf_bd.records import RecordedSets

TIERS = (16, 128, 2048)  # most sets fit the first; the few rows of a flat distribution go on
AMBIGUOUS = 2e-6  # bound on the relative error of a float32 partition function
SORT_ELEMENTS = 1 << 24  # largest [rows, V] block that is sorted at once
CHUNK = 64  # ids of which only the largest logit is looked at first
SPARSE = 4  # chunks are chosen where at most one in so many is
CPU_BLOCK_ELEMENTS = 1 << 18  # exponentials held at once on CPU: they stay in its cache
LEAST_EXPONENT = -80.0  # nats: weights below are as good as 0, and slow as denormal numbers


@dataclass(frozen=True)
class CandidateSets:
    """Candidate sets of S states, flattened (CSR). Candidates are in descending order of teacher probability.

    At p = 1 every set is the whole vocabulary: a flag says so, and there are no ids (see `whole`).

    Attributes:
        ids_M: candidate token ids, int64.
        offsets_S1: state s owns ids_M[offsets_S1[s]:offsets_S1[s + 1]], int64.
        neg_log_mass_S: -log of the teacher's mass on each set, nats, >= 0.
        logprobs_M: the teacher's log-probability of each candidate, nats, or None if not recorded.
        is_whole: every set is the whole vocabulary; ids_M is empty and every mass is 1.
    """

    ids_M: Tensor
    offsets_S1: Tensor
    neg_log_mass_S: Tensor
    logprobs_M: Tensor | None
    is_whole: bool = False

    @staticmethod
    def whole(num_states: int, device: torch.device | str = "cpu") -> CandidateSets:
        """The sets of p = 1, no mask: of each state the whole vocabulary."""
        return CandidateSets(
            ids_M=torch.empty(0, dtype=torch.int64, device=device),
            offsets_S1=torch.zeros(num_states + 1, dtype=torch.int64, device=device),
            neg_log_mass_S=torch.zeros(num_states, device=device),
            logprobs_M=None,
            is_whole=True,
        )

    @property
    def num_states(self) -> int:
        return len(self.offsets_S1) - 1

    @property
    def num_candidates(self) -> int:
        return len(self.ids_M)

    @cached_property
    def sizes_S(self) -> Tensor:
        """Number of candidates of each state."""
        return self.offsets_S1.diff()

    @cached_property
    def state_M(self) -> Tensor:
        """State of each candidate, non-decreasing."""
        states_S = torch.arange(self.num_states, device=self.ids_M.device)
        return torch.repeat_interleave(states_S, self.sizes_S, output_size=self.num_candidates)

    def to(self, device: torch.device | str) -> CandidateSets:
        """The same sets with tensors on `device`."""
        logprobs_M = None if self.logprobs_M is None else self.logprobs_M.to(device)
        return CandidateSets(
            self.ids_M.to(device), self.offsets_S1.to(device), self.neg_log_mass_S.to(device), logprobs_M, self.is_whole
        )

    @staticmethod
    def from_recorded(recorded: Sequence[RecordedSets]) -> CandidateSets:
        """Concatenate the sets of rows in the order given.

        Args:
            recorded: sets of each row of a micro-batch; log-probabilities in all of them or in none, the whole
                vocabulary in all of them or in none.

        Returns:
            CPU tensors; S is the sum of the rows' states.

        Raises:
            ValueError: no row, or only some rows have log-probabilities or are whole.
        """
        if not recorded:
            raise ValueError("no row: a micro-batch needs at least one")
        num_whole = sum(row.is_whole for row in recorded)
        if num_whole:
            if num_whole != len(recorded):
                raise ValueError(f"{num_whole} of {len(recorded)} rows have sets of p = 1; all or none must")
            return CandidateSets.whole(sum(row.num_states for row in recorded))
        logprobs = [row.logprobs_M for row in recorded if row.logprobs_M is not None]
        if logprobs and len(logprobs) != len(recorded):
            raise ValueError(
                f"{len(logprobs)} of {len(recorded)} rows have the candidates' log-probabilities; all or none must"
            )
        offsets_S1 = np.concatenate([[0], np.cumsum(np.concatenate([row.sizes_S for row in recorded]))])
        return CandidateSets(
            ids_M=torch.from_numpy(np.concatenate([row.ids_M for row in recorded]).astype(np.int64)),
            offsets_S1=torch.from_numpy(offsets_S1.astype(np.int64)),
            neg_log_mass_S=torch.from_numpy(
                np.concatenate([row.neg_log_mass_S for row in recorded]).astype(np.float32)
            ),
            logprobs_M=torch.from_numpy(np.concatenate(logprobs).astype(np.float32)) if logprobs else None,
        )


@torch.no_grad()
def top_p_candidates(
    logits_SV: Tensor,
    *,
    top_p: float,
    always_include: Sequence[int] = (),
    device: torch.device | str | None = None,
) -> CandidateSets:
    """Top-p candidate sets of a teacher, inclusive of the token that crosses p (Def. 1).

    A_p(s) = { k-th token : mass strictly before it < p },  tokens by descending probability, ties by lower id

    Masses are float64. The partition function is first taken in float32, and in float64 for the rows where that
    could change a set. The largest tokens are looked for in the chunks of the vocabulary with the largest maxima. Only
    rows whose set does not end within the first 16 tokens are searched further, and only rows beyond 2,048 are sorted.

    Args:
        logits_SV: teacher's logits, [S, V], any float type, finite or -inf.
        top_p: p in (0, 1]; 1 means no mask and gives CandidateSets.whole, which lists no ids.
        always_include: ids that belong to every set; where outside the top-p set they follow it, by descending
            probability.
        device: where the sets are put together, in many small steps for which a GPU would have to be waited; None:
            where the logits are.

    Returns:
        Sets on `device`; log-probabilities and masses at temperature 1, float32.

    Raises:
        ValueError: top_p or an id is out of range, or a row has NaN, +inf or no finite logit.
    """
    num_states, vocab_size = logits_SV.shape
    device = logits_SV.device if device is None else torch.device(device)
    _check_top_p_arguments(top_p, always_include, vocab_size)
    z_SV = logits_SV if logits_SV.dtype == torch.float64 else logits_SV.float()
    chunk_max_SC = _over_chunks(torch.amax, z_SV)
    max_S = chunk_max_SC.amax(dim=-1).double()
    total_S = _partition_function(z_SV, max_S)
    if not bool(torch.isfinite(total_S).all()):
        row = int(torch.nonzero(~torch.isfinite(total_S))[0])
        raise ValueError(f"row {row} of the logits has NaN, +inf or no finite value; every row needs finite logits")
    if top_p == 1:
        return CandidateSets.whole(num_states, device)
    always_A = torch.tensor(sorted(set(always_include)), dtype=torch.int64)
    z_SA = z_SV[:, always_A.to(z_SV.device)].to(device)
    tops = [top.to(device) for top in _top_p_tiers(z_SV, chunk_max_SC, max_S, total_S, top_p)]
    return _put_together(tops, max_S.to(device), total_S.to(device), always_A.to(device), z_SA)


def restrict_top_p(
    sets: CandidateSets, *, top_p: float, always_include: Sequence[int] = (), require_always: bool = True
) -> CandidateSets:
    """Cut recorded sets to a smaller p, from their log-probabilities.

    A candidate stays if the mass strictly before it is < p, or if it is always included; sets never grow, so `top_p`
    is at most the p that they were recorded with. Rounded log-probabilities (float16 in a store) move a boundary
    that lies within their error of p.

    Args:
        sets: recorded sets, in descending order, with log-probabilities.
        top_p: new p in (0, 1]; 1 keeps every candidate, and sets that are the whole vocabulary as they are.
        always_include: ids that stay in every set.
        require_always: each of these must be in every recorded set; False: it stays where it is there.

    Returns:
        Smaller sets in the same order; masses are recomputed from the log-probabilities.

    Raises:
        ValueError: no log-probabilities, top_p out of range, an id that some set lacks, or sets that are the whole
            vocabulary and list no ids to choose from.
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be in (0, 1]")
    if sets.is_whole:
        if top_p == 1:
            return sets
        raise ValueError(f"sets of p = 1 list no ids, so they cannot be cut to top_p {top_p}; record them at that p")
    if sets.logprobs_M is None:
        raise ValueError("these sets were recorded without log-probabilities, so they cannot be cut to a smaller top_p")
    mass_M = torch.exp(sets.logprobs_M.double())
    before_M = segment_cumsum_before(mass_M, sets.offsets_S1, sets.state_M)
    keep_M = (before_M < top_p) if top_p < 1 else torch.ones_like(before_M, dtype=torch.bool)
    # A difference of sums can leave the first candidate a rounding error above 0, never above p; it stays all the same.
    keep_M |= sets.state_M.diff(prepend=sets.state_M.new_full((1,), -1)) > 0
    for token_id in sorted(set(always_include)):
        found_M = sets.ids_M == token_id
        num_found = int(found_M.sum())
        if require_always and num_found != sets.num_states:
            raise ValueError(
                f"id {token_id} is in {num_found} of {sets.num_states} recorded sets; an id that is always included "
                "must have been recorded in all of them"
            )
        keep_M |= found_M
    state_M, logprobs_M = sets.state_M[keep_M], sets.logprobs_M[keep_M]
    sizes_S = torch.bincount(state_M, minlength=sets.num_states)
    mass_S = segment_logsumexp(logprobs_M.double(), state_M, sets.num_states)
    return CandidateSets(
        ids_M=sets.ids_M[keep_M],
        offsets_S1=torch.cat([sizes_S.new_zeros(1), torch.cumsum(sizes_S, 0)]),
        neg_log_mass_S=(-mass_S).clamp(min=0.0).to(sets.neg_log_mass_S.dtype),
        logprobs_M=logprobs_M,
    )


def _check_top_p_arguments(top_p: float, always_include: Sequence[int], vocab_size: int) -> None:
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be in (0, 1]")
    outside = [token_id for token_id in always_include if not 0 <= token_id < vocab_size]
    if outside:
        raise ValueError(f"always_include has {outside}; ids must be in [0, {vocab_size})")


@dataclass(frozen=True)
class _TopTokens:
    """The sets of some states, each among its K largest logits: ids_RK[i, :size_R[i]] is that of state rows_R[i]."""

    rows_R: Tensor
    ids_RK: Tensor
    z_RK: Tensor
    size_R: Tensor

    def to(self, device: torch.device) -> _TopTokens:
        return _TopTokens(*(part.to(device) for part in (self.rows_R, self.ids_RK, self.z_RK, self.size_R)))


def _over_chunks(reduce: Callable[..., Tensor], x_SV: Tensor) -> Tensor:
    """Reduce each chunk of CHUNK columns, the last one being what is left: [S, C]."""
    whole = x_SV.shape[1] // CHUNK * CHUNK
    parts = [reduce(x_SV[:, :whole].unflatten(1, (-1, CHUNK)), dim=-1)] if whole else []
    if whole < x_SV.shape[1]:
        parts.append(reduce(x_SV[:, whole:], dim=-1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _partition_function(z_SV: Tensor, max_S: Tensor) -> Tensor:
    """sum_a exp(z(a) - max): chunks in the type of the logits, which keeps within AMBIGUOUS, their sum in float64."""
    num_states, vocab_size = z_SV.shape
    on_cpu = z_SV.device.type == "cpu"
    num_rows = max(1, CPU_BLOCK_ELEMENTS // vocab_size) if on_cpu else max(1, num_states)
    scratch_RV = z_SV.new_empty(min(num_rows, num_states), vocab_size)
    totals = [torch.zeros(0, dtype=torch.float64, device=z_SV.device)]
    for z_RV, max_R in zip(z_SV.split(num_rows), max_S.to(z_SV.dtype).split(num_rows), strict=True):
        weights_RV = torch.sub(z_RV, max_R[:, None], out=scratch_RV[: len(z_RV)]).clamp_(min=LEAST_EXPONENT).exp_()
        totals.append(_over_chunks(torch.sum, weights_RV).sum(dim=-1, dtype=torch.float64))
    return torch.cat(totals)


def _top_p_tiers(
    z_SV: Tensor, chunk_max_SC: Tensor, max_S: Tensor, total_S: Tensor, top_p: float
) -> Iterator[_TopTokens]:
    """The sets of all states, those that end early first. Refines total_S in place.

    Which states a tier leaves to the next is the one thing for which the device is waited.
    """
    vocab_size, device = z_SV.shape[1], z_SV.device
    rows_R = torch.arange(len(z_SV), device=device)
    for num_tokens in (k for k in TIERS if k < vocab_size):
        if not len(rows_R):
            return
        z_RK, ids_RK = _largest(z_SV, chunk_max_SC, rows_R, num_tokens)
        size_R = _set_sizes(z_RK, z_SV, max_S, total_S, rows_R, top_p)
        # A set that ends among tokens equal to the last one seen may owe its place to ids that were not seen.
        inside_R = z_RK.gather(1, (size_R[:, None] - 1).clamp(max=num_tokens - 1))[:, 0] > z_RK[:, -1]
        inside_here_R = inside_R.cpu()
        if bool(inside_here_R.all()):
            yield _TopTokens(rows_R, ids_RK, z_RK, size_R)
            return
        done, left = (torch.nonzero(mask)[:, 0].to(device) for mask in (inside_here_R, ~inside_here_R))
        yield _TopTokens(rows_R[done], ids_RK[done], z_RK[done], size_R[done])
        rows_R = rows_R[left]
    for block_R in rows_R.split(max(1, SORT_ELEMENTS // vocab_size)):
        z_RK, ids_RK = z_SV[block_R].sort(dim=1, descending=True, stable=True)
        size_R = _set_sizes(z_RK, z_SV, max_S, total_S, block_R, top_p).clamp(max=vocab_size)
        yield _TopTokens(block_R, ids_RK, z_RK, size_R)


def _largest(z_SV: Tensor, chunk_max_SC: Tensor, rows_R: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """The num_tokens largest logits of these rows and their ids, descending, ties by lower id.

    Every logit above the K-th largest lies in one of the K chunks with the largest maxima: were it in another chunk,
    K + 1 chunks would each have a logit as large. Of logits equal to the K-th largest any may be among the K.
    """
    vocab_size = z_SV.shape[1]
    if num_tokens * SPARSE < chunk_max_SC.shape[1]:
        chunks_RK = chunk_max_SC[rows_R].topk(num_tokens, dim=1, sorted=False).indices
        ids_RL = (chunks_RK[:, :, None] * CHUNK + torch.arange(CHUNK, device=z_SV.device)).flatten(1)
        # The last chunk may be short: what it lacks counts as -inf.
        z_RL = z_SV[rows_R[:, None], ids_RL.clamp(max=vocab_size - 1)].masked_fill(ids_RL >= vocab_size, -torch.inf)
        z_RK, place_RK = z_RL.topk(num_tokens, dim=1)
        ids_RK = ids_RL.gather(1, place_RK)
    else:
        z_RV = z_SV if len(rows_R) == len(z_SV) else z_SV[rows_R]
        z_RK, ids_RK = z_RV.topk(num_tokens, dim=1)
    ids_RK, order_RK = ids_RK.sort(dim=1)
    z_RK, order_RK = z_RK.gather(1, order_RK).sort(dim=1, descending=True, stable=True)
    return z_RK, ids_RK.gather(1, order_RK)


def _set_sizes(z_RK: Tensor, z_SV: Tensor, max_S: Tensor, total_S: Tensor, rows_R: Tensor, top_p: float) -> Tensor:
    """Number of tokens with mass < p before them, K + 1 where the K tokens hold less than p."""
    mass_RK = torch.exp(z_RK.double() - max_S[rows_R, None]).cumsum(dim=1)
    threshold_R1 = top_p * total_S[rows_R, None]
    unsure_R = ((mass_RK - threshold_R1).abs() < AMBIGUOUS * threshold_R1).any(dim=1)
    if z_SV.dtype != torch.float64 and bool(unsure_R.any()):
        for block in rows_R[unsure_R].split(max(1, SORT_ELEMENTS // z_SV.shape[1])):
            total_S[block] = torch.exp(z_SV[block].double() - max_S[block, None]).sum(dim=1)
        threshold_R1 = top_p * total_S[rows_R, None]
    return 1 + (mass_RK < threshold_R1).sum(dim=1)


def _put_together(
    tops: Sequence[_TopTokens], max_S: Tensor, total_S: Tensor, always_A: Tensor, z_SA: Tensor
) -> CandidateSets:
    """Flat sets from those of each tier, with the ids that are always included behind them."""
    num_states = len(max_S)
    size_S = torch.zeros(num_states, dtype=torch.int64, device=max_S.device)
    last_id_S, last_z_S = torch.zeros_like(size_S), z_SA.new_zeros(num_states)
    for top in tops:
        last_R1 = top.size_R[:, None] - 1
        size_S[top.rows_R] = top.size_R
        last_id_S[top.rows_R] = top.ids_RK.gather(1, last_R1)[:, 0]
        last_z_S[top.rows_R] = top.z_RK.gather(1, last_R1)[:, 0]

    always_z_SA, order_SA = z_SA.sort(dim=1, descending=True, stable=True)
    always_ids_SA = always_A[order_SA]
    last_z_S1, last_id_S1 = last_z_S[:, None], last_id_S[:, None]
    missing_SA = (always_z_SA < last_z_S1) | ((always_z_SA == last_z_S1) & (always_ids_SA > last_id_S1))
    offsets_S1 = torch.cat([size_S.new_zeros(1), torch.cumsum(size_S + missing_SA.sum(dim=1), 0)])
    ids_M = torch.empty(int(offsets_S1[-1]), dtype=torch.int64, device=max_S.device)
    z_M = torch.empty(len(ids_M), dtype=z_SA.dtype, device=max_S.device)
    for top in tops:
        in_set_RK = torch.arange(top.ids_RK.shape[1], device=max_S.device) < top.size_R[:, None]
        _write_rows(ids_M, z_M, offsets_S1[top.rows_R], top.ids_RK, top.z_RK, in_set_RK)
    _write_rows(ids_M, z_M, offsets_S1[:-1] + size_S, always_ids_SA, always_z_SA, missing_SA)

    state_M = CandidateSets(ids_M, offsets_S1, max_S, None).state_M
    logits_M = z_M.double() - max_S[state_M]
    mass_S = segment_sum(torch.exp(logits_M), state_M, num_states)
    neg_log_mass_S = (torch.log(total_S) - torch.log(mass_S)).clamp(min=0.0)
    logprobs_M = logits_M - torch.log(total_S)[state_M]
    return CandidateSets(ids_M, offsets_S1, neg_log_mass_S.float(), logprobs_M.float())


def _write_rows(ids_M: Tensor, z_M: Tensor, start_R: Tensor, ids_RK: Tensor, z_RK: Tensor, mask_RK: Tensor) -> None:
    """Put the masked ids and logits of each row one after another from start_R on."""
    position = (start_R[:, None] + mask_RK.cumsum(dim=1) - 1)[mask_RK]
    ids_M[position], z_M[position] = ids_RK[mask_RK], z_RK[mask_RK]
