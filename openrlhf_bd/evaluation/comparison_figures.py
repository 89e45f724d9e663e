"""Figures of the comparison: the paper's Fig. 1 and 2 from our own data, exposure over length, stages over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from openrlhf_bd.evaluation.experiment_data import StageRecord
from openrlhf_bd.evaluation.figures import INK, MUTED, SERIES, Drawing, LegendEntry, curves, slug
from openrlhf_bd.evaluation.published import published
from openrlhf_bd.evaluation.results import Exposure
from openrlhf_bd.evaluation.run_data import Curve, RunData
from openrlhf_bd.evaluation.sorted_probabilities import NUM_RANKS, SortedProbabilities
from openrlhf_bd.evaluation.win_rates import WinRates

_WIDE = (5.0, 2.9)
_LOW_RANK, _HIGH_RANK = 7, 50
_KINDS = {"train": SERIES[2], "generate": SERIES[0], "evaluate": SERIES[3], "judge": SERIES[4]}
# Beyond, fewer than this share of the responses are left, and the mean is one of few.
_ENOUGH = 0.1


def figure_1(found: SortedProbabilities, name: str) -> list[Drawing]:
    """The teacher's sorted probabilities, and their sums: what the sets do not hold is drawn as a bracket.

    Args:
        found: of one store.
        name: whose; in titles and file names.
    """
    ranks = range(1, NUM_RANKS + 1)
    block = published("figure1").rows_of("Qwen-2.5 3B")
    paper = {rank: block[f"top {rank}"][0] for rank in (_LOW_RANK, _HIGH_RANK)}

    def draw_probability(axes: Axes) -> None:
        axes.bar(ranks, found.probability_low, color=SERIES[0], width=0.8, label="recorded")
        axes.bar(
            ranks,
            [high - low for low, high in zip(found.probability_low, found.probability_high, strict=True)],
            bottom=found.probability_low,
            color=SERIES[0],
            alpha=0.3,
            width=0.8,
            label="at most",
        )
        axes.set_yscale("log")
        axes.set_ylim(max(1e-5, min(found.probability_high) / 2), 1.2)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("rank of the token")
        axes.set_ylabel("mean probability")
        axes.grid(axis="x", visible=False)
        axes.legend(loc="upper right")

    def draw_mass(axes: Axes) -> None:
        axes.fill_between(ranks, found.mass_low, found.mass_high, color=SERIES[0], alpha=0.25, linewidth=0)
        axes.plot(ranks, found.mass_low, color=SERIES[0], linewidth=1.6)
        axes.plot(ranks, found.mass_high, color=SERIES[0], linewidth=0.8, linestyle="--")
        for rank, mass in paper.items():
            axes.plot([rank], [mass], "D", color=SERIES[1], markersize=5)
            text = f"paper: {'≥ ' if rank == _LOW_RANK else ''}{mass:.0%}"
            axes.annotate(text, (rank, mass), (5, -12), textcoords="offset points", color=MUTED)
        axes.set_xlabel("k, most probable tokens")
        axes.set_ylabel("mean probability mass")
        axes.set_xlim(0.5, NUM_RANKS + 0.5)
        axes.set_ylim(min(0.85, max(0.0, found.mass_low[0] - 0.05)), 1.01)

    read_off = ", ".join(f"top {rank}: {_bracket(*found.mass(rank))}" for rank in (_LOW_RANK, _HIGH_RANK))
    states = f"Mean over {found.num_states:,} states of {found.num_rows:,} responses, sets of p = {found.top_p:g}."
    rows = tuple(
        zip(ranks, found.probability_low, found.probability_high, found.mass_low, found.mass_high, strict=True)
    )
    columns = ("rank", "probability_low", "probability_high", "mass_low", "mass_high")
    return [
        Drawing(
            f"figure1_{slug(name)}_probability",
            f"{name}: sorted probabilities",
            f"{states} Pale: what a token outside its set could have at most.",
            _WIDE, draw_probability, (), columns, rows,
        ),
        Drawing(
            f"figure1_{slug(name)}_mass",
            f"{name}: mass of the k most probable tokens",
            f"{read_off}. Line: what the sets hold; band: up to what they can leave out. {states}",
            _WIDE, draw_mass, (), columns, rows,
        ),
    ]  # fmt: skip


def win_rate_drawing(rates: WinRates, name: str) -> Drawing | None:
    """Wins, ties and losses of each pair as shares of both orders, and the win rate with its interval (Fig. 2).

    None where nothing was judged.
    """
    judged = [
        (pair, 100 * pair.win_rate, [100 * bound for bound in pair.interval])
        for pair in rates.pairs
        if pair.num_judged and pair.win_rate is not None and pair.interval is not None
    ]
    if not judged:
        return None
    shares = []
    for pair, _, _ in judged:
        both = [(getattr(pair.a_first, what) + getattr(pair.b_first, what)) for what in ("wins", "ties", "losses")]
        shares.append([100 * count / sum(both) for count in both])

    def draw(axes: Axes) -> None:
        for index, (what, colour) in enumerate((("wins", SERIES[0]), ("ties", "#6f7c89"), ("losses", SERIES[1]))):
            left, widths = [sum(row[:index]) for row in shares], [row[index] for row in shares]
            bars = axes.barh(range(len(judged)), widths, left=left, color=colour, height=0.5, label=what)
            texts = [f"{width:.0f}" if width >= 6 else "" for width in widths]
            axes.bar_label(bars, texts, label_type="center", color="#ffffff", fontsize=7.5)
        for place, (_, rate, interval) in enumerate(judged):
            axes.plot(interval, [place + 0.38] * 2, color=INK, linewidth=1.4)
            axes.plot([rate], [place + 0.38], "D", color=INK, markersize=4)
        axes.axvline(50, color=MUTED, linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(judged)), [f"{pair.a} against {pair.b}" for pair, _, _ in judged])
        axes.set_ylim(len(judged) - 0.35, -0.5)
        axes.set_xlim(0, 100)
        axes.tick_params(axis="y", labelcolor=INK, length=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("share of the verdicts, %")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, handlelength=1)

    return Drawing(
        f"figure2_{slug(name)}",
        f"Win rates on {rates.test_set}, judged by {rates.model}",
        "Bars: wins, ties and losses of the first method, both orders together. Diamond and line below: its win rate, "
        "ties counting half, with the 95 % interval of a bootstrap over prompts.",
        (5.6, 1.0 + 0.5 * len(judged)),
        draw,
        (),
        (
            "method", "against", "wins_percent", "ties_percent", "losses_percent", "win_rate_percent", "ci95_low",
            "ci95_high", "num_judged", "num_prompts",
        ),
        tuple(
            (pair.a, pair.b, *row, rate, *interval, pair.num_judged, pair.num_prompts)
            for (pair, rate, interval), row in zip(judged, shares, strict=True)
        ),
    )  # fmt: skip


def exposure_drawings(
    methods: Sequence[RunData], dataset: str, legend: dict[str, LegendEntry], *, prefix: str = ""
) -> list[Drawing]:
    """Excess accumulated error over length, and forward KL at the student's and at the teacher's own prefixes.

    Args:
        methods: runs, some of them with exposure measures.
        dataset: test set, as in `Evaluation.datasets`.
        legend: entries of all methods of the report.
        prefix: of the figures' names.
    """
    found: dict[str, Exposure] = {}
    for run in methods:
        scores = run.evaluation.datasets.get(dataset) if run.evaluation is not None else None
        if scores is not None and scores.exposure is not None and scores.exposure.positions:
            found[run.label] = scores.exposure
    if not found:
        return []
    end = max(_last_position(item) for item in found.values())
    note = f" Up to position {end}, beyond which fewer than {_ENOUGH:.0%} of the responses are left."
    kinds: Mapping[str, tuple[str, str, str, str]] = {
        "excess_error_T": (
            "excess_error",
            "Excess accumulated error",
            "ExAccErr, %",
            "How much more error gathers along the student's own responses than along the teacher's.",
        ),
        "forward_kl_student_T": (
            "kl_student", "Forward KL at the student's own prefixes", "nats", "Teacher to student, by position.",
        ),
        "forward_kl_teacher_T": (
            "kl_teacher", "Forward KL at the teacher's prefixes", "nats",
            "The same where the student made no error before.",
        ),
    }  # fmt: skip
    drawings = []
    for field, (name, title, unit, caption) in kinds.items():
        by_label = {
            label: Curve(tuple(item.positions[: _last_index(item)]), tuple(getattr(item, field)[: _last_index(item)]))
            for label, item in found.items()
        }
        drawings.append(
            curves(
                f"{prefix}{name}_{slug(dataset)}", f"{title}, {dataset}", caption + note, unit, by_label, legend,
                smooth=False, x_label="position in the response",
            )
        )  # fmt: skip
    return drawings


def stage_timeline(stages: Sequence[StageRecord]) -> Drawing | None:
    """When each stage of an experiment ran; None where no times are known."""
    timed = [(stage, stage.started, stage.seconds) for stage in stages if stage.started and stage.seconds]
    if not timed:
        return None
    timed.sort(key=lambda item: item[1])
    start = timed[0][1]
    longest = max(begun + seconds for _, begun, seconds in timed) - start
    scale, unit = (3600.0, "hours") if longest > 7200 else (60.0, "minutes")
    kinds = [kind for kind in _KINDS if any(stage.kind == kind for stage, _, _ in timed)]

    def draw(axes: Axes) -> None:
        for place, (stage, begun, seconds) in enumerate(timed):
            axes.barh(
                place, seconds / scale, left=(begun - start) / scale, color=_KINDS.get(stage.kind, MUTED), height=0.7
            )
        axes.set_yticks(range(len(timed)), [stage.name for stage, _, _ in timed], fontsize=7)
        axes.set_ylim(len(timed) - 0.4, -0.6)
        axes.tick_params(axis="y", labelcolor=INK, length=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"{unit} since the first stage began")
        handles = [Patch(facecolor=_KINDS[kind], label=kind) for kind in kinds]
        axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(handles), handlelength=1)

    return Drawing(
        "stages",
        "When each stage ran",
        "An interrupted stage stands at its first start, as long as all its starts took. Empty time: nothing ran.",
        (8.2, 0.9 + 0.19 * len(timed)),
        draw,
        (),
        ("stage", "kind", "start_s", "seconds"),
        tuple((stage.name, stage.kind, round(begun - start, 3), seconds) for stage, begun, seconds in timed),
    )  # fmt: skip


def _bracket(low: float, high: float) -> str:
    """A mass that is known up to an interval: "91.2 %" or "91.2 to 97.0 %"."""
    return f"{100 * low:.1f} %" if high - low < 5e-4 else f"{100 * low:.1f} to {100 * high:.1f} %"


def _last_index(item: Exposure) -> int:
    """Number of positions that enough responses of both reach; at least one."""
    enough = [min(pair) >= _ENOUGH for pair in zip(item.reach_student_T, item.reach_teacher_T, strict=True)]
    return max(1, enough.index(False) if False in enough else len(enough))


def _last_position(item: Exposure) -> int:
    return item.positions[_last_index(item) - 1]
