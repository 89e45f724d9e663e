"""Places one actor with one GPU on every node; fails where two of them share one. Argument: the number of nodes."""

from __future__ import annotations

import sys

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

TIMEOUT_S = 60.0


@ray.remote(num_cpus=1, num_gpus=1)
class Where:
    def node_id(self) -> str:
        return ray.get_runtime_context().get_node_id()


def main() -> None:
    expected = int(sys.argv[1])
    ray.init()
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    if len(alive) != expected:
        sys.exit(f"{len(alive)} nodes are alive, {expected} expected")
    group = placement_group([{"CPU": 1, "GPU": 1}] * expected, strategy="STRICT_SPREAD")
    ray.get(group.ready(), timeout=TIMEOUT_S)
    strategies = [PlacementGroupSchedulingStrategy(group, bundle) for bundle in range(expected)]
    actors = [Where.options(scheduling_strategy=strategy).remote() for strategy in strategies]
    used = set(ray.get([actor.node_id.remote() for actor in actors], timeout=TIMEOUT_S))
    if used != alive:
        sys.exit(f"actors on {sorted(used)}, nodes {sorted(alive)}")
    print(f"one actor on each of {len(used)} nodes")


if __name__ == "__main__":
    main()
