"""`make demo`: teacher, student, distillation and evaluation on the embedded corpus, with the real components.

Every stage is the main job with a configuration of its own (kept in its run folder as config.yaml), all in one Ray
session. A finished stage is reused.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from openrlhf_bd.cli.flags import main_guard, resolved_yaml
from openrlhf_bd.config import Config
from openrlhf_bd.demo.models import TEACHER_FOLDER
from openrlhf_bd.demo.settings import (
    CONTINUED_SFT,
    SFT,
    TINY,
    Layout,
    Method,
    Scale,
    continued_sft_options,
    evaluation_options,
    method_options,
    parse_methods,
    sft_options,
    with_online,
)
from openrlhf_bd.driver.run_folder import RunFolder

DEFAULT_METHODS = "bd:robust seqkd"
TEACHER = "teacher"
TEST = "test"


@dataclass(frozen=True, slots=True)
class Demo:
    """One demo: where it is kept, how large it is, and what it compares."""

    layout: Layout
    scale: Scale
    seed: int
    methods: list[Method]

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a later demo to reuse this one's stages. Methods may come and go."""
        return {"scale": asdict(self.scale), "seed": self.seed}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `openrlhf-bd demo` and `make demo`."""
    return main_guard(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="openrlhf-bd demo", description=__doc__)
    parser.add_argument("--methods", default=DEFAULT_METHODS, help='such as "bd:robust bd:paper seqkd"')
    parser.add_argument(
        "--mode",
        choices=["offline", "online"],
        default="offline",
        help="online: methods that can also learn from the student's own responses while it trains, beside offline",
    )
    parser.add_argument("--output_dir", default="runs/demo", help="folder of the demo; finished stages are reused")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--tiny", action="store_true", help="a few steps of everything, to see that it works")
    arguments = parser.parse_args(argv)
    scale = TINY if arguments.tiny else Scale()
    methods = parse_methods(arguments.methods)
    if arguments.mode == "online":
        methods = with_online(methods)
    demo = Demo(Layout(Path(arguments.output_dir)), scale, arguments.seed, methods)
    run_demo(demo)
    return 0


def run_demo(demo: Demo) -> None:
    """All stages in order, each unless it is finished."""
    from openrlhf_bd.driver.cluster import ray_session
    from openrlhf_bd.driver.progress import console

    with RunFolder.open(demo.layout.root, demo.identity) as folder, ray_session(num_gpus=4):
        stages = _stages(demo)
        for number, (title, stage) in enumerate(stages, start=1):
            console.rule(f"[bold]{number}/{len(stages)} {title}", align="left")
            started = time.monotonic()
            stage(folder)
            console.print(f"[dim]{title}: {time.monotonic() - started:.0f} s[/dim]", highlight=False)


def _stages(demo: Demo) -> list[tuple[str, Callable[[RunFolder], None]]]:
    layout, scale, seed = demo.layout, demo.scale, demo.seed

    def job(options: dict[str, Any]) -> Callable[[RunFolder], None]:
        return lambda _: _run_job(options)

    return [
        ("corpus, and a student with random weights", lambda folder: _write_inputs(demo, folder)),
        ("SFT of the student", job(sft_options(layout, scale, seed))),
        *((f"distil by {method.label}", job(method_options(layout, scale, seed, method))) for method in demo.methods),
        ("control: as many further steps of SFT", job(continued_sft_options(layout, scale, seed))),
        ("evaluation of all models", lambda _: _evaluate(demo)),
        ("report", lambda _: _report(demo)),
    ]


def _run_job(options: dict[str, Any]) -> None:
    from openrlhf_bd.driver import job

    config = Config.model_validate(options)
    plan = job.check(config)
    job.run(config, resolved_config=resolved_yaml(config), plan=plan)


def _write_inputs(demo: Demo, folder: RunFolder) -> None:
    from openrlhf_bd.demo.corpus import write_corpus
    from openrlhf_bd.demo.models import init_student
    from openrlhf_bd.driver.job import say_reused

    if folder.finished("inputs"):
        say_reused("corpus", str(demo.layout.corpus))
        return
    scale = demo.scale
    write_corpus(
        demo.layout.corpus,
        num_train=scale.num_train,
        num_validation=scale.num_validation,
        num_test=scale.num_test,
        seed=demo.seed,
    )
    init_student(demo.layout.student_init, demo.seed)
    folder.finish("inputs")


def _models(demo: Demo) -> dict[str, Path]:
    """Folder of each model that the demo evaluates, by label."""
    layout = demo.layout
    return {
        TEACHER: TEACHER_FOLDER,
        SFT: layout.sft,
        CONTINUED_SFT: layout.continued_sft,
        **{method.label: layout.method(method) for method in demo.methods},
    }


def _evaluation_file(demo: Demo, label: str) -> Path:
    return demo.layout.evaluation / f"{label.replace(':', '-')}.json"


def _evaluate(demo: Demo) -> None:
    """Every model that has no evaluation yet, in the same engines."""
    from openrlhf_bd.driver.evaluation import evaluate_models

    models = _models(demo)
    config = Config.model_validate(evaluation_options(demo.layout, demo.scale, demo.seed))
    evaluate_models(config, models, files={label: _evaluation_file(demo, label) for label in models})


def _report(demo: Demo) -> None:
    """The table on the terminal, and the HTML file."""
    from openrlhf_bd.driver.progress import console
    from openrlhf_bd.evaluation.report import write_report
    from openrlhf_bd.evaluation.results import Evaluation
    from openrlhf_bd.evaluation.run_data import RunData
    from openrlhf_bd.evaluation.tables import main_table, terminal_table
    from openrlhf_bd.store import StoreReader, summary

    runs = []
    for label, path in _models(demo).items():
        evaluation = Evaluation.read(_evaluation_file(demo, label))
        run = RunData(label) if label == TEACHER else RunData.load(path, label=label)
        runs.append(replace(run, evaluation=evaluation, missing=()))
    evaluations = [(run.label, run.evaluation) for run in runs if run.evaluation is not None]
    console.print(terminal_table(main_table(evaluations, TEST, reference_labels=[TEACHER])))
    write_report(
        runs,
        demo.layout.report,
        title="Bellman Distill: the demo",
        store_summary=summary(StoreReader(demo.layout.store)),
        reference_labels=[TEACHER],
        figures_dir=demo.layout.root / "figures",
    )
    console.print(f"report: {demo.layout.report}")


if __name__ == "__main__":
    raise SystemExit(main())
