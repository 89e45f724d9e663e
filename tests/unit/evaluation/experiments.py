"""Synthetic output folders of experiments for the tests of the comparison."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openrlhf_bd.evaluation.results import Evaluation, Exposure, SavedResponse, labelled_paths, write_responses
from openrlhf_bd.evaluation.win_rates import Usage, WinRates, pair_rates
from tests.unit.evaluation.runs import make_evaluation, make_run

METHODS = ("SFT", "KD", "SeqKD", "MiniLLM", "BD")
ALGORITHMS = {"SFT": "sft", "KD": "kd", "SeqKD": "seqkd", "MiniLLM": "minillm", "BD": "bd", "BD robust": "bd"}
GROUPS = ("GPT-2 120M", "GPT-2 340M", "GPT-2 760M", "OPT 125M", "OPT 350M", "OPT 1.3B", "Qwen-2.5 0.5B")
START = 1_800_000_000.0


def make_exposure(quality: float, *, num_positions: int = 40, num_seeds: int = 5) -> Exposure:
    """Measures that worsen with length, and curves that fewer and fewer responses reach."""
    positions = list(range(1, num_positions + 1))
    reach = [max(0.02, 1 - position / num_positions) for position in positions]
    return Exposure(
        top_p=0.8,
        forward_kl=[0.9 - 0.5 * quality] * num_seeds,
        reverse_kl=[0.8 - 0.4 * quality] * num_seeds,
        teacher_nll=[1.4 - quality] * num_seeds,
        out_of_set_rate=[0.3 - 0.2 * quality] * num_seeds,
        positions=positions,
        forward_kl_student_T=[0.5 + 0.01 * (2 - quality) * t for t in positions],
        forward_kl_teacher_T=[0.5] * num_positions,
        reach_student_T=reach,
        reach_teacher_T=reach,
        excess_error_T=[(2 - quality) * t for t in positions],
    )


def make_scored(label: str, quality: float, test_sets: Sequence[str], *, num_prompts: int = 20) -> Any:
    """(evaluation, responses) on several test sets, each with two samplers."""
    base = make_evaluation(label, quality)
    only = base.datasets["demo"]
    rng = random.Random(label)
    datasets, responses, samples = {}, [], []
    for test_set in test_sets:
        for top_p in (1.0, 0.8):
            name = test_set if top_p == 1.0 else f"{test_set}, top-p {top_p:g}"
            shift = {"dolly": 0.0, "self_inst": -10.0, "vicuna": -8.0}.get(test_set, 0.0) + (1.2 if top_p < 1 else 0.0)
            rouge = [value - 40 + shift for value in only.rouge_l or []]
            exposure = make_exposure(quality) if top_p == 1.0 else None
            datasets[name] = only.model_copy(
                update={"rouge_l": rouge, "test_set": test_set, "top_p": top_p, "exposure": exposure, "accuracy": None}
            )
            samples += [sample.model_copy(update={"dataset": name}) for sample in base.samples[:1]]
            responses += [
                SavedResponse(
                    test_set=test_set, prompt_id=f"{number:08d}", seed=10, top_p=top_p, instruction="i", input="",
                    references=["r"], response="s", num_tokens=9, finish_reason="stop",
                    rouge_l=20 + 10 * quality + number % 7 + rng.random(), correct=None,
                )
                for number in range(num_prompts)
            ]  # fmt: skip
    return Evaluation(label=label, model=f"ckpt/{label}", datasets=datasets, samples=samples), responses


def make_experiment(
    output_dir: Path,
    *,
    groups: Sequence[str] = GROUPS[:2],
    methods: Sequence[str] = METHODS,
    published: Sequence[str] = ("table1", "table3"),
    num_steps: int = 12,
    scale: str = "toy",
    test_sets: Sequence[str] = ("dolly", "self_inst", "vicuna"),
) -> dict[str, Any]:
    """An output folder as a pipeline leaves it, and the experiment's view of its record."""
    output_dir.mkdir(parents=True, exist_ok=True)
    stages: list[dict[str, Any]] = []
    started = START

    def add(name: str, kind: str, seconds: float, **more: Any) -> Path:
        nonlocal started
        folder = output_dir / f"{name}-0123abcd"
        record = {"name": name, "kind": kind, "folder": str(folder), "state": "finished", "started": started}
        stages.append(record | {"seconds": seconds, "gpus": 2, "label": None, "group": None} | more)
        started += seconds + 3
        return folder

    for group in groups:
        slug = group.lower().replace(" ", "-")
        models: dict[str, str] = {}
        for number, label in enumerate(methods):
            folder = add(
                f"{slug}-{label.lower().replace(' ', '-')}", "train", 300.0 + 7 * number, label=label, group=group
            )
            preset = "robust" if "robust" in label else "paper"
            make_run(folder, label, 0.3 + 0.1 * number, algorithm=ALGORITHMS[label], preset=preset,
                     num_steps=num_steps, with_evaluation=False)  # fmt: skip
            models[label] = str(folder)
        models = {"Teacher": "models/teacher", **models}
        folder = add(f"{slug}-evaluation", "evaluate", 60.0, group=group, models=models, reference=["Teacher"])
        for number, label in enumerate(models):
            evaluation, responses = make_scored(label, 0.9 if label == "Teacher" else 0.2 + 0.1 * number, test_sets)
            path = labelled_paths(folder, [label])[label]
            evaluation.write(path)
            write_responses(path, responses)
    name = "table1" if "table1" in published else published[0]
    view = {"name": name, "title": f"An experiment <of> {len(groups)} groups", "scale": scale, "mode": "offline"}
    view |= {"published": list(published), "stages": stages}
    (output_dir / "pipeline.json").write_text(json.dumps(view), encoding="utf-8")
    return view


def add_judge(view: dict[str, Any], output_dir: Path) -> None:
    """A judge stage at the end of an experiment: one pair decided, one open, one not judged."""
    folder = output_dir / "judge-0123abcd"
    folder.mkdir()
    rates = WinRates(
        model="a-judge", prompt_version=1, constrained=True, test_set="dolly", seed=10, top_p=1.0,
        pairs=[
            pair_rates("BD", "KD", [(1.0, 1.0)] * 30 + [(0.0, 1.0)] * 10, not_judged={}),
            pair_rates("BD", "SeqKD", [(1.0, 0.5)] * 20 + [(0.0, 0.5)] * 20, not_judged={"not asked yet": 3}),
            pair_rates("BD", "MiniLLM", [], not_judged={"the server did not answer": 40}),
        ],
        usage=Usage(num_requests=163, prompt_tokens=1000, completion_tokens=163),
    )  # fmt: skip
    rates.write(folder)
    view["stages"].append(
        {"name": "judge", "kind": "judge", "folder": str(folder), "state": "finished", "started": START + 9000,
         "seconds": 44.0, "gpus": 0, "label": None, "group": None}
    )  # fmt: skip
