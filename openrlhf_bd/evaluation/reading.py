"""The report's paragraph "how to read these numbers": what they show, and what they do not."""

from __future__ import annotations

import math
from collections.abc import Sequence

from openrlhf_bd.config import PRESETS, BellmanOptions
from openrlhf_bd.evaluation.experiment_data import ExperimentData
from openrlhf_bd.evaluation.run_data import RunData
from openrlhf_bd.evaluation.tables import MainTable

_PRESETS = {
    "paper": (
        "The published method to the letter (the sampled action, p 0.8, temporal-difference weight "
        "1/(4 alpha) at alpha 0.1, no term for the mass outside the sets). Its figures say how the published objective "
        "does on this data at this size; they are no reproduction of the paper's tables."
    ),
    "released": (
        "What the authors' published code computes in the place of the published objective: no term depends on the "
        "tokens of the responses, and chi-squared acts on the next state's value alone. It is here for comparison."
    ),
    "robust": (
        "Not the published method. It keeps the teacher's candidate sets and changes the objective: "
        "the expectation over the projected teacher in the place of the sampled action, a term for the mass outside "
        "the sets, end of sequence in every set, p 0.95 and a temporal-difference weight about 830 times smaller. What "
        "it gains cannot be credited to the temporal-difference term without runs that differ in nothing else."
    ),
}

_FAIR = "Fair comparison"
_SAME = (
    "Selection uses validation prompts, the table uses test prompts. A method that was tuned more than the others has "
    "an advantage that no table shows."
)
_ONE_TRAINING_SEED = (
    "Each method was trained once. ± and the intervals over seeds say what other samples of the same student would "
    "change, those prompt by prompt what other prompts would; another training seed may well change more than either, "
    "and the order of close methods with it."
)
_PUBLISHED = (
    "They stand beside ours for orientation. Data splits, models, the sampler and training differ, so a difference to "
    "them is no finding; what can be compared is the order of methods within one column of ours."
)
_ROBUST = (
    "Rows with preset robust change the objective; a published figure never stands beside them. What they gain over "
    "preset paper is no evidence for the published method."
)


def how_to_read(runs: Sequence[RunData], tables: Sequence[MainTable]) -> list[tuple[str, str]]:
    """(heading, text) of each remark that applies to these runs.

    Args:
        runs: all runs of the report.
        tables: main table of each test set.
    """
    measured = {score.name for table in tables for score in table.scores}
    remarks = []
    if tables:
        remarks.append(("Spread", _spread(tables)))
    if "rouge_l" in measured:
        remarks.append(("Rouge-L", _rouge_l(runs)))
    if "accuracy" in measured:
        remarks.append(("Accuracy", _accuracy(tables)))
    if "teacher_nll" in measured:
        remarks.append(
            (
                "Teacher NLL",
                "How likely the teacher finds the student's own samples; lower is closer to what the teacher would "
                "say. Short or repetitive text can be likely too: read it beside length, stop rate and distinct-2.",
            )
        )
    remarks += [(f"Preset {name}", _preset(name, users)) for name, users in _runs_by_preset(runs).items()]
    if len(runs) > 1:
        remarks.append((_FAIR, _differences(runs) or _SAME))
    return remarks


def comparison_remarks(data: ExperimentData, tables: Sequence[MainTable]) -> list[tuple[str, str]]:
    """(heading, text) of each remark that applies to an experiment.

    Args:
        data: the experiment.
        tables: main table of each group, test set and sampler.
    """
    remarks = [item for item in how_to_read(data.methods, tables) if item[0] != _FAIR]
    if tables:
        remarks.insert(0, ("One training seed", _ONE_TRAINING_SEED))
    if any(table.groups for table in data.published):
        notes = " ".join(note for table in data.published for note in table.notes if table.groups)
        remarks.append(("The published columns", f"{_PUBLISHED} {notes}"))
    if any(run.is_robust for run in data.methods):
        remarks.append(("Robust is not the paper", _ROBUST))
    remarks += [
        (f"Fair comparison, {group.name}", text)
        for group in data.groups
        if (text := _differences([run for run in group.methods if run.label not in group.reference_labels]))
    ]
    return remarks


def preset_changes(run: RunData) -> list[str]:
    """Options of the objective in which a bd run differs from its preset: "alpha 5 (preset: 0.1)"."""
    chosen = run.option("algo.distill")
    preset = BellmanOptions(**PRESETS[chosen["preset"]]).model_dump()
    return [
        f"{name} {chosen[name]} (preset: {expected})"
        for name, expected in preset.items()
        if name in chosen and chosen[name] != expected
    ]


def _runs_by_preset(runs: Sequence[RunData]) -> dict[str, list[RunData]]:
    """The runs of algorithm bd by their preset; runs whose options are not known are left out."""
    by_preset: dict[str, list[RunData]] = {}
    for run in runs:
        name = str(run.option("algo.distill.preset"))
        if run.option("algo.distill.name") == "bd" and name in _PRESETS:
            by_preset.setdefault(name, []).append(run)
    return by_preset


def _preset(name: str, runs: Sequence[RunData]) -> str:
    changed = [f"{run.label} has {', '.join(changes)}" for run in runs if (changes := preset_changes(run))]
    return f"{_PRESETS[name]} But: {'; '.join(changed)}." if changed else _PRESETS[name]


def _spread(tables: Sequence[MainTable]) -> str:
    seeds = sorted({count for table in tables for count in table.num_seeds})
    if seeds == [1]:
        return "One sampling seed: there is no spread, and small differences mean nothing."
    text = (
        "± is the standard deviation over sampling seeds of one trained student; the interval is Student's t over "
        f"{' or '.join(str(n) for n in seeds)} seeds. Both leave out how much another training seed or other prompts "
        "would change."
    )
    if all(len(table.rows) < 2 for table in tables):
        return text
    return (
        f"{text} Bold is the best mean; ≈ marks a method whose interval overlaps with the best one's, so the order of "
        "the two is open."
    )


def _rouge_l(runs: Sequence[RunData]) -> str:
    text = (
        "Overlap of stemmed words with the reference (F-measure of the longest common subsequence, best of the "
        "references, times 100). It rewards the reference's wording, not truth, and rises when a student is merely "
        "sharpened by a lower temperature or a nucleus."
    )
    sampling = {
        (item.temperature, item.top_p)
        for run in runs
        if run.evaluation is not None
        for item in run.evaluation.datasets.values()
        if item.temperature is not None and item.top_p is not None
    }
    if len(sampling) == 1:
        temperature, top_p = next(iter(sampling))
        return f"{text} All responses here: temperature {temperature:g}, nucleus {top_p:g}."
    if sampling:
        return f"{text} The responses here were sampled in {len(sampling)} different ways: compare like with like."
    return text


def _accuracy(tables: Sequence[MainTable]) -> str:
    prompts = min(count for table in tables for count in table.num_prompts)
    return (
        "Share of responses that the checker accepts. Which prompts were drawn matters as well: with "
        f"{prompts} prompts, that alone moves an accuracy near one half by up to ± {98 / math.sqrt(prompts):.1f} "
        "points (95 %), which the interval over seeds does not show. Methods that answer the same prompts share most "
        "of that error."
    )


def _differences(runs: Sequence[RunData]) -> str:
    """In what else than the method the runs differ; empty: in nothing of this."""
    differing = [
        title
        for title, option in (
            ("starting student", "actor.model_name_or_path"),
            ("prompts", "data.prompt_dataset"),
            ("batch size", "train.batch_size"),
            ("epochs", "train.max_epochs"),
            ("steps", "train.max_steps"),
            ("learning rate", "actor.adam.lr"),
        )
        if len({str(run.option(option)) for run in runs if run.config}) > 1
    ]
    if not differing:
        return ""
    return (
        f"The runs differ in more than the method: {', '.join(differing)}. See their settings before comparing their "
        "scores."
    )
