"""The figures of one run, or of several side by side, as tables on the terminal."""

import os
import statistics
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from qat.report.summary import (
    duration,
    millinats,
    number,
    ratio,
    shrinkage,
    size,
    sizes,
    title,
    verdict,
)

# Runs that agree in all of these and differ in their seed are repetitions of one experiment.
_EXPERIMENT = ("config_digest", "recipe", "corpus_digest")
# Of summaries that were written without a digest of the config; not tokens, which vary with the seed in conversations.
_EXPERIMENT_BEFORE = (
    "recipe", "scheme", "model", "data", "corpus_digest", "calibration", "objective", "start", "steps",
)  # fmt: skip

# What `compare` shows of a run, by the names of the summary.
_FIGURES = (
    "float_loss", "ptq_loss", "qat_loss", "control_loss", "control_ptq_loss", "packed_loss",
    "qat_minus_control_ptq", "recovery_over_control", "bytes_ratio", "seconds",
)  # fmt: skip

_SETTINGS = ("recipe", "scheme", "steps")
# Told apart by what they were told, or else by their folders.
_NAMES = ("overrides", "run")
_TEXTS = ("recipe", "scheme", *_NAMES)
_COLUMNS = {
    "recipe": "recipe", "scheme": "scheme", "overrides": "overrides", "run": "run", "seed": "seed", "steps": "steps",
    "float_loss": "float", "ptq_loss": "PTQ", "qat_loss": "QAT", "control_loss": "control",
    "control_ptq_loss": "PTQ\n(control)", "packed_loss": "packed",
    "qat_minus_control_ptq": "QAT -\nPTQ(control)", "recovery_over_control": "recovery\nover control",
    "bytes_ratio": "times\nsmaller", "seconds": "time",
}  # fmt: skip
# Left out in this order where a terminal is too narrow.
_DISPENSABLE = ("packed_loss", "ptq_loss", "float_loss", "seconds", "bytes_ratio", "control_loss", "steps")
# Factor, decimals, whether signed; losses are (1, 4, False).
_FORMATS = {
    "steps": (1, 0, False),
    "qat_minus_control_ptq": (1e3, 1, True),
    "recovery_over_control": (1, 2, False),
    "bytes_ratio": (1, 2, False),
}


def run_table(summary: dict[str, Any]) -> Group:
    """What a run ends with on the terminal: its models, then the figures that compare them.

    Args:
        summary: as `read_summary` returns it.
    """
    table = Table(
        title=heading(summary),
        caption=(
            f"loss: nats/{summary['unit']} · Δ float: millinats/{summary['unit']}, with its 95 % interval · "
            f"accuracy: {'next token' if summary['unit'] == 'token' else 'class of the ' + summary['unit']}"
        ),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("model", no_wrap=True)
    for name in ("loss", "Δ float", "perplexity", "accuracy"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in summary["models"]:
        table.add_row(
            title(summary, row["name"]),
            number(row["loss"]),
            millinats(row["difference_to_float"], row["difference_interval"]),
            number(row["perplexity"], 3),
            "—" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f} %",
            style="bold" if row["name"] == "qat" else None,
        )
    lines = Table.grid(padding=(0, 2))
    lines.add_column(no_wrap=True)
    lines.add_column(overflow="fold")
    for label, value in figures(summary):
        lines.add_row(label, Text(value))
    return Group(table, Text(verdict(summary), style="bold"), lines)


def heading(summary: dict[str, Any]) -> str:
    """What a run was: `llama_int4_qat · w4a16-g128 · 300 steps · seed 0`."""
    steps, seed = summary["steps"], summary["seed"]
    parts = [summary["recipe"], summary["scheme"], None if steps is None else f"{number(steps, 0)} steps"]
    parts.append("from the control" if summary["start"] == "control" else None)
    return " · ".join(str(part) for part in [*parts, None if seed is None else f"seed {seed}"] if part is not None)


def figures(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures of a run that stand beside the losses: (label, text), with a reason where there is no value."""
    delta = summary["qat_minus_control_ptq"]
    against = millinats(delta, summary["qat_minus_control_ptq_interval"]) + " millinats"
    why = summary["qat_minus_control_ptq_reason"] or (None if delta is not None else "no control was run")
    return [
        ("QAT - PTQ(control)", ("—" if delta is None else against) + (f" ({why})" if why else "")),
        ("recovery over control", ratio(summary, "recovery_over_control")),
        ("recovery", ratio(summary, "recovery")),
        ("size", sizes(summary)),
        ("export", summary["export_dir"] or "— (none)"),
        ("time", duration(summary["seconds"])),
    ]


def compare_rows(summaries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One flat row a run, and one more after the runs of an experiment that was repeated with other seeds.

    Returns:
        Plain values for tables and JSON: `run` (the folder), `overrides` (of its command line), `recipe`,
        `scheme`, `seed`, `steps`, the losses in nats per token, `qat_minus_control_ptq` with its interval,
        `recovery_over_control`, `bytes_ratio` (the whole model in 16 bits over the packed one) and `seconds`.
        A mean row has `seed: "mean of n"` and, for each figure, `<name>_sd`: the standard deviation over the
        seeds.  A mean is None where any of its runs has no value.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for summary in summaries:
        agree = _EXPERIMENT if summary["config_digest"] else _EXPERIMENT_BEFORE
        groups.setdefault(tuple(summary[name] for name in agree), []).append(_flat(summary))
    rows = []
    for group in groups.values():
        rows += group
        # Equal seeds in one group: a run done twice, or, without a digest, runs that differ in what nothing names.
        if len(group) > 1 and len({row["seed"] for row in group}) == len(group):
            rows.append(_mean(group))
    return rows


def _flat(summary: dict[str, Any]) -> dict[str, Any]:
    row = {name: summary[name] for name in ("recipe", "scheme", "seed", "steps")}
    row = {"run": summary.get("path"), "overrides": summary["overrides"], **row}
    for name in _FIGURES:
        row[name] = shrinkage(summary) if name == "bytes_ratio" else summary[name]
        if f"{name}_interval" in summary:
            row[f"{name}_interval"] = summary[f"{name}_interval"]
    row["recovery_over_control_reason"] = summary["recovery_over_control_reason"]
    return row


def _mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
    mean = {name: rows[0][name] for name in ("recipe", "scheme", "steps")}
    mean = {"run": None, "overrides": rows[0]["overrides"], **mean, "seed": f"mean of {len(rows)}"}
    for name in _FIGURES:
        values = [row[name] for row in rows]
        known = None not in values
        mean[name] = statistics.fmean(values) if known else None
        mean[f"{name}_sd"] = statistics.stdev(values) if known else None
    return mean


def compare_table(summaries: list[dict[str, Any]], width: int | None = None) -> Group:
    """Runs side by side, a row each, with a mean row (± standard deviation over seeds) after repetitions.

    Rows are told apart by the overrides that not all of them have, and by their folders where these do not suffice.

    Args:
        summaries: as `read_summary` returns them.
        width: of the terminal, in characters; columns that matter less are left out, by name, until the
            table fits.  None shows all of them.
    """
    rows = _told_apart(compare_rows(summaries))
    columns = {name: [_text(row, name) for row in rows] for name in _COLUMNS}
    # What all runs share is said once, above; what no run has is left out.
    shared = {n: cells for n, cells in columns.items() if n in _SETTINGS and len(rows) > 1 and len(set(cells)) == 1}
    shown = {n: cells for n, cells in columns.items() if n not in shared and set(cells) != {"—"}}
    left_out = []
    for name in _DISPENSABLE:
        if width is not None and name in shown and _width(shown) > width:
            del shown[name]
            left_out.append(_COLUMNS[name].replace("\n", " "))
    table = Table(
        title=" · ".join(f"{name} {cells[0]}" for name, cells in shared.items()) or None,
        caption="losses: nats · QAT - PTQ(control): millinats · [95 % interval] · ± standard deviation",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in shown:
        is_text = name in _TEXTS
        table.add_column(_COLUMNS[name], justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    for i, row in enumerate(rows):
        is_mean = "seconds_sd" in row
        cells = [column[i] for column in shown.values()]
        table.add_row(*cells, style="bold" if is_mean else None, end_section=is_mean)
    reasons = sorted({r for s in summaries if (r := s["recovery_over_control_reason"])})
    notes = [f"recovery over control —: {reason}" for reason in reasons]
    notes += ["times smaller: the whole model, than in 16 bits"] if "bytes_ratio" in shown else []
    notes += [f"left out at this width: {', '.join(left_out)} (--json has them)"] if left_out else []
    return Group(table, *(Text(note, style="dim") for note in notes))


def _told_apart(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with overrides that all of them have left out, and with folders, from the one they share, if needed."""
    common = set(rows[0]["overrides"]).intersection(*(row["overrides"] for row in rows)) if len(rows) > 1 else set()
    rows = [{**row, "overrides": "\n".join(word for word in row["overrides"] if word not in common)} for row in rows]
    folders = [Path(row["run"]).absolute() for row in rows if row["run"]]
    told = {tuple(row[name] for name in ("overrides", *_SETTINGS, "seed")) for row in rows}
    if not folders or len(told) == len(rows):
        return [{**row, "run": None} for row in rows]
    shared = os.path.commonpath(folders)
    return [{**row, "run": row["run"] and os.path.relpath(row["run"], shared)} for row in rows]


def _width(columns: dict[str, list[str]]) -> int:
    """Characters that a table of these columns needs; columns of text may fold to 12."""
    lines = {n: [_COLUMNS[n], *cells] for n, cells in columns.items()}
    widest = {n: max(len(line) for cell in cells for line in cell.split("\n")) for n, cells in lines.items()}
    return sum((min(w, 12) if n in _TEXTS else w) + 2 for n, w in widest.items())


def _text(row: dict[str, Any], name: str) -> str:
    """One cell of `compare_table`; an interval or a deviation goes to a second line."""
    value = row[name]
    if name in (*_TEXTS, "seed"):
        return "—" if value in (None, "") else str(value)
    if name == "seconds":
        return duration(value)
    factor, digits, sign = _FORMATS.get(name, (1, 4, False))
    spread, interval = row.get(f"{name}_sd"), row.get(f"{name}_interval")
    if value is not None and spread is not None and name != "steps":
        return f"{number(factor * value, digits, sign)}\n± {number(factor * spread, digits)}"
    if value is not None and interval is not None and None not in interval:
        low, high = (number(factor * v, digits, sign) for v in interval)
        return f"{number(factor * value, digits, sign)}\n[{low}, {high}]"
    return number(None if value is None else factor * value, digits, sign)


def layers_table(rows: list[dict[str, Any]], float_bytes: int, cache: str | None = None) -> Table:
    """The layers of a packed model, with totals.

    Args:
        rows: name, scheme, shape, bytes, float_bytes (at 16 bits), scale_range, and error (None: no column).
        float_bytes: of the parameters that are not packed.
        cache: how keys and values are quantized, as `qat.scheme.cache_spec` names it; None for float.
    """
    packed, whole = sum(row["bytes"] for row in rows), sum(row["float_bytes"] for row in rows)
    smaller = f", 1/{number(whole / packed, 2)} of their 16-bit size" if packed else ""
    kept = f", keys and values {cache}" if cache else ""
    table = Table(
        title=f"{len(rows)} packed layers{smaller}{kept}", title_justify="left",
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_footer=True,
    )  # fmt: skip
    table.add_column("layer", "packed\nleft in float\ntotal", overflow="fold")
    table.add_column("scheme", no_wrap=True)
    table.add_column("out x in", justify="right", no_wrap=True)
    totals = f"{size(packed)}\n{size(float_bytes)}\n{size(packed + float_bytes)}"
    table.add_column("bytes", totals, justify="right", no_wrap=True)
    table.add_column("scales", justify="right", no_wrap=True)
    if any(row["error"] is not None for row in rows):
        table.add_column("error", justify="right")
    for row in rows:
        low, high = row["scale_range"]
        error = [] if row["error"] is None else [number(row["error"])]
        shape = " x ".join(map(str, row["shape"]))
        table.add_row(row["name"], row["scheme"], shape, size(row["bytes"]), f"{low:.1e} to {high:.1e}", *error)
    return table
