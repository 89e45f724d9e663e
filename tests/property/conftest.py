"""Random MDPs of all kinds, solved once for the whole folder."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from openrlhf_bd.theory.mdp import Mask, TabularMDP, top_p_mdp
from openrlhf_bd.theory.random_mdps import random_mdps
from openrlhf_bd.theory.sets import project, top_p_sets
from openrlhf_bd.theory.solve import FixedPoint, evaluate_policy, solve_optimal

GAMMAS = (0.4, 0.9, 0.99)
TOP_PS = (0.5, 0.8, 0.95)
NUM_MDPS = 240


@dataclass(frozen=True)
class Case:
    """One MDP and p: Q*, its top-p sets, the projected teacher's Q and the optimum on the sets."""

    mdp: TabularMDP
    top_p: float
    optimum: FixedPoint
    sets_SA: Mask
    projected: FixedPoint
    restricted: FixedPoint

    @property
    def error(self) -> float:
        """Numerical error of a gap, nats: residuals over 1 - gamma."""
        residuals = self.optimum.residual + self.projected.residual + self.restricted.residual
        return residuals / max(1 - self.mdp.gamma, 0.01) + 1e-9


def solve_case(mdp: TabularMDP, top_p: float, optimum: FixedPoint | None = None, sets_SA: Mask | None = None) -> Case:
    """Solve everything; the sets are the teacher's top-p sets where none are given."""
    optimum = optimum or solve_optimal(mdp)
    if sets_SA is None:
        sets_SA = top_p_sets(optimum.policy_SA, top_p)
    inside = top_p_mdp(mdp, sets_SA)
    projected = evaluate_policy(inside, project(optimum.policy_SA, sets_SA))
    return Case(mdp, top_p, optimum, sets_SA, projected, solve_optimal(inside))


@pytest.fixture(scope="session")
def cases() -> list[Case]:
    """Each of 240 MDPs at three gammas and three p."""
    found = []
    for gamma in GAMMAS:
        for mdp in random_mdps(NUM_MDPS, seed=11, gamma=gamma):
            optimum = solve_optimal(mdp)
            found += [solve_case(mdp, top_p, optimum) for top_p in TOP_PS]
    return found


@pytest.fixture(scope="session")
def solve() -> Callable[..., Case]:
    return solve_case
