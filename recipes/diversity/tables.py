"""The texts that ``recipes.diversity`` prints (line for each ensemble, table), and the numbers of ``results.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recipes.common import report
from recipes.diversity.attack_settings import AttackSettings, size_name
from recipes.diversity.methods import METHODS


def line(seed: int, method: str, record: Mapping[str, Any]) -> str:
    """The accuracies of one ensemble in one line: mean of the members / joint ensemble."""
    transfer = ", ".join(
        f"{eps}: {v['mean']:.1f} / {v['joint']:.1f}" for eps, v in record["transfer"].items()
    )
    clean = record["clean"]
    return (
        f"seed {seed}, {METHODS[method].title}: clean {clean['mean']:.2f} / {clean['joint']:.2f} "
        f"(least {min(clean['members']):.2f}), transfer {transfer}, {record['seconds']:.0f} s"
    )


def _scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one ensemble that are averaged over seeds."""
    found = {
        "clean_joint": record["clean"]["joint"],
        "clean_mean": record["clean"]["mean"],
        "clean_least": min(record["clean"]["members"]),
        "white_box_mean": sum(record["white_box_members"]) / len(record["white_box_members"]),
        "white_box_joint": record["white_box_joint"],
        "disagreement": record["disagreement"],
        "coherence": record["coherence"],
        "diversity": sum(record["diversity_by_layer"]) / len(record["diversity_by_layer"]),
        "distance": sum(record["distances"]) / len(record["distances"]),
        "seconds": record["seconds"],
    }
    for key in ("trusted_joint", "trusted_mean"):
        found |= {f"{name}_{key[8:]}": value for name, value in record[key].items()}
    for name, values in record["changed"].items():
        found[f"{name}_joint"], found[f"{name}_mean"] = values["joint"], values["mean"]
    if record["auto_attack_joint"] is not None:
        found["auto_attack_joint"] = record["auto_attack_joint"]
    for eps, values in record["transfer"].items():
        found[f"transfer_mean_{eps}"] = values["mean"]
        found[f"transfer_joint_{eps}"] = values["joint"]
    return found


def metrics(
    records: Mapping[str, Sequence[Mapping[str, Any]]], starts: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The metrics of ``results.json``: means over seeds; of several also standard deviations and 95 % intervals.

    Args:
        records: The records of each method's ensembles, one a seed.
        starts: The records of the start networks.
    """
    ensembles: dict[str, Any] = {}
    for method, runs in records.items():
        scalars = [_scalars(run) for run in runs]
        ensembles[method] = {
            **report.means(scalars),
            "diversity_by_layer": [
                sum(v) / len(v) for v in zip(*(r["diversity_by_layer"] for r in runs), strict=True)
            ],
        }
        if len(runs) > 1:
            ensembles[method]["deviations"] = report.deviations(scalars)
            ensembles[method]["intervals_95"] = report.intervals(scalars)
    start = {
        "accuracy": sum(s["accuracy"] for s in starts) / len(starts),
        "transfer": {
            eps: sum(s["transfer"][eps] for s in starts) / len(starts)
            for eps in starts[0]["transfer"]
        },
    }
    return {"start": start, "ensembles": ensembles}


def table(
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    starts: Sequence[Mapping[str, Any]],
    attacks: AttackSettings,
) -> str:
    """The ensembles side by side, one column each; several seeds as mean ± standard deviation.

    Args:
        records: The records of each method's ensembles, one a seed.
        starts: The records of the start networks.
        attacks: The settings of the attacks.
    """
    table_eps = size_name(attacks.table_eps)
    rows = [
        ("clean_joint", "clean, joint (%)", ".2f"),
        ("clean_mean", "clean, members (%)", ".2f"),
        ("clean_least", "clean, least member (%)", ".2f"),
    ]
    for eps in starts[0]["transfer"]:
        rows.append((f"transfer_mean_{eps}", f"transfer at {float(eps):.3g}, members (%)", ".1f"))
        rows.append((f"transfer_joint_{eps}", f"transfer at {float(eps):.3g}, joint (%)", ".1f"))
    first = next(iter(records.values()))[0]
    for name in first["changed"]:
        rows.append((f"{name}_mean", f"{name}, members (%)", ".1f"))
        rows.append((f"{name}_joint", f"{name}, joint (%)", ".1f"))
    for which in ("mean", "joint"):
        who = {"mean": "members", "joint": "joint"}[which]
        rows += [
            (f"calibration_error_{which}", f"calibration error, {who} (%)", ".2f"),
            (f"log_loss_{which}", f"log loss, {who} (nats)", ".4f"),
            (f"told_apart_{which}", f"told from {first['outside']}, {who} (% AUROC)", ".1f"),
        ]
    rows += [
        ("white_box_mean", f"attacked itself at {float(table_eps):.3g}, members (%)", ".1f"),
        ("white_box_joint", f"attacked itself at {float(table_eps):.3g}, joint (%)", ".1f"),
        ("auto_attack_joint", f"AutoAttack at {float(table_eps):.3g}, joint (%)", ".1f"),
        ("disagreement", "disagreement (%)", ".2f"),
        ("coherence", "coherence with the start", ".3f"),
        ("diversity", "diversity score, mean of layers", ".3g"),
        ("distance", "distance from the start", ".3g"),
        ("seconds", "seconds", ".1f"),
    ]
    body = []
    for key, label, form in rows:
        cells = []
        for runs in records.values():
            values = [s[key] for s in map(_scalars, runs) if key in s]
            cells.append(report.mean_and_deviation(values, form) if values else "–")
        body.append([label, *cells])
    transfer = ", ".join(
        f"{float(eps):.3g}: {sum(s['transfer'][eps] for s in starts) / len(starts):.1f}"
        for eps in starts[0]["transfer"]
    )
    clean = report.mean_and_deviation([s["accuracy"] for s in starts], ".2f")
    return f"start network: clean {clean} %, attacked at {transfer} %\n" + report.aligned(
        [["", *(METHODS[method].title for method in records)], *body]
    )
