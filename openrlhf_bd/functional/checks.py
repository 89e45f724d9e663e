"""What every loss over candidate sets refuses."""

from __future__ import annotations

from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.head import StudentHead
from openrlhf_bd.functional.trajectories import Trajectories


def check_states(head: StudentHead, sets: CandidateSets, trajectories: Trajectories, denominator: float) -> None:
    """Refuse parts of a micro-batch that do not belong together, and a count that nothing can be divided by.

    Raises:
        ValueError: head, sets and trajectories differ in their number of states, or the count is not positive.
    """
    counts = {"logits": head.num_states, "candidate sets": sets.num_states, "trajectories": trajectories.num_states}
    if len(set(counts.values())) > 1:
        raise ValueError(f"numbers of states differ: {counts}; all three describe the states of one micro-batch")
    if denominator <= 0:
        raise ValueError(f"the count of the global batch is {denominator}; it must be positive")
