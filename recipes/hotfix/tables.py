"""The texts that ``recipes.hotfix`` prints: a line for each run, and the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recipes.common import report
from recipes.hotfix.settings import HotfixSettings

Records = Mapping[str, Sequence[Mapping[str, Any]]]

COLUMNS = {
    "fixed": ".3g",
    "flips_check": ".3g",
    "flips_unseen": ".3g",
    "drift_unseen": ".3f",
    "steps": ".3g",
    "seconds": ".1f",
}


def line(seed: int, record: Mapping[str, Any], settings: HotfixSettings) -> str:
    """What one run came to, in one line; two if it did not reach every wrong input."""
    text = (
        f"seed {seed}, {record['title']}: {record['fixed']} of {settings.wrong} fixed, "
        f"{record['flips_check']} of {settings.check} check inputs flipped, {record['steps']} steps"
    )
    settled = record["account"].get("settled")
    if settled:
        text += ", settled " + "; ".join(
            f"after {s['after_steps']}: {s['right_before']} -> {s['right_after']} right, flips "
            f"{s['flips_before']:.2%} -> {s['flips_after']:.2%}"
            for s in settled
        )
    if record["fixed"] < settings.wrong:
        text += (
            f"\n  NOT FIXED: {settings.wrong - record['fixed']} of {settings.wrong} wrong inputs are still wrong; "
            f"raise --max-steps ({settings.max_steps})"
        )
        if settled:
            text += f" or the budget, --max-flips ({settings.max_flips:g})"
    return text


def table(records: Records, settings: HotfixSettings) -> str:
    """One row a method, means ± standard deviations over seeds; and the range of what each method tried.

    Args:
        records: The records of each method's runs, one a seed.
        settings: The settings.
    """
    heading = [
        "",
        f"fixed of {settings.wrong}",
        f"flips on {settings.check} check",
        f"flips on {settings.unseen} unseen",
        "drift unseen",
        "steps",
        "seconds",
    ]
    rows = [heading]
    for runs in records.values():
        cells = [
            report.mean_and_deviation([float(run[key]) for run in runs], form)
            for key, form in COLUMNS.items()
        ]
        rows.append([runs[0]["title"], *cells])
    return "\n".join([report.aligned(rows), *tried(records, settings)])


def tried(records: Records, settings: HotfixSettings) -> list[str]:
    """A line for each method with several settings: the flips on unseen inputs of those that fixed everything."""
    lines = []
    for runs in records.values():
        trials = [trial for run in runs for trial in run["trials"]]
        if len(trials) > len(runs):
            flips = [t["flips_unseen"] for t in trials if t["fixed"] == settings.wrong]
            said = f"{min(flips)} to {max(flips)} flips on unseen inputs" if flips else "none"
            chosen = "; ".join(
                " ".join(f"{name} {value:g}" for name, value in run["choice"].items())
                for run in runs
            )
            seconds = sum(t["seconds"] for t in trials) / len(runs)
            lines.append(
                f"{runs[0]['title']}: {len(flips)} of {len(trials)} trials fixed all, {said}; chosen on the check "
                f"inputs: {chosen}; {seconds:.1f} seconds for all trials"
            )
    return lines


def metrics(records: Records) -> dict[str, Any]:
    """The metrics of ``results.json``: means and deviations of each column, and every run."""
    found = {}
    for method, runs in records.items():
        columns = [{key: float(run[key]) for key in COLUMNS} for run in runs]
        found[method] = {
            "title": runs[0]["title"],
            **report.means(columns),
            **({"deviations": report.deviations(columns)} if len(runs) > 1 else {}),
            "runs": [
                {
                    **{key: run[key] for key in (*COLUMNS, "negative_flips_unseen", "drift_check")},
                    "choice": run["choice"],
                    "account": run["account"],
                    "trials": run["trials"] if len(run["trials"]) > 1 else [],
                }
                for run in runs
            ],
        }
    return found
