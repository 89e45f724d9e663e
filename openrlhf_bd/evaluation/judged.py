"""Win rates as a table."""

from __future__ import annotations

from openrlhf_bd.evaluation.sheets import NOTHING, Heading, Sheet, SheetCell, SheetRow
from openrlhf_bd.evaluation.win_rates import PairRates, WinRates


def win_rates_sheet(rates: WinRates, *, name: str) -> Sheet:
    """Win rate of each pair with its interval, and what was judged; prompts without a verdict are counted apart."""
    asked = f"{rates.usage.num_requests:,} answers of {rates.model} asked for"
    stopped = f" The last call ended before its time: {rates.stopped}." if rates.stopped else ""
    return Sheet(
        name,
        f"Win rates on {rates.test_set}",
        "Pair",
        (
            (
                Heading("win rate", "ties count half"),
                Heading("wins / ties / losses", "first method shown first"),
                Heading("wins / ties / losses", "shown second"),
                Heading("same in both orders"),
                Heading("p", "sign test"),
                Heading("judged"),
                Heading("not judged"),
            ),
        ),
        tuple(SheetRow(f"{pair.a} against {pair.b}", _cells(pair)) for pair in rates.pairs),
        f"Judge: {rates.model}. Responses sampled with seed {rates.seed} at top-p {rates.top_p:g}; {asked}. Bold: the "
        f"95 % interval leaves one half out. A judge has tastes of its own, such as for length.{stopped}",
        ("method", "against", "win_rate", "ci95_low", "ci95_high", "p_value", "num_judged", "num_not_judged"),
        tuple(
            (
                pair.a,
                pair.b,
                pair.win_rate,
                *(pair.interval or ("", "")),
                pair.p_value,
                pair.num_judged,
                pair.num_not_judged,
            )
            for pair in rates.pairs
        ),
    )


def _cells(pair: PairRates) -> tuple[SheetCell, ...]:
    if pair.win_rate is None or pair.interval is None:
        rate = SheetCell("not judged", style="muted")
    else:
        low, high = pair.interval
        beyond = not low <= 0.5 <= high
        rate = SheetCell(f"{pair.win_rate:.1%}", f"{low:.1%} to {high:.1%}", "best" if beyond else "")
    reasons = ", ".join(f"{count} {reason}" for reason, count in pair.not_judged.items() if count)
    orders = [SheetCell(f"{c.wins} / {c.ties} / {c.losses}") for c in (pair.a_first, pair.b_first)]
    return (
        rate,
        *orders,
        SheetCell(f"{pair.num_consistent} of {pair.num_judged}"),
        SheetCell(_p_value(pair.p_value)),
        SheetCell(f"{pair.num_judged} of {pair.num_prompts}"),
        SheetCell(str(pair.num_not_judged), reasons),
    )


def _p_value(value: float | None) -> str:
    if value is None:
        return NOTHING
    return "<0.001" if value < 0.001 else f"{value:.3f}"
