"""What a run wrote about itself: read, checked, and put into words.

`summary.json` holds every figure of a run.  Whatever a run did not do (no export, no control, nothing
quantized) is absent there or null; after `read_summary` it is always present, as None or an empty list, so
that tables and reports need no guards against missing keys.  A figure that is null says why in
`<name>_reason`.
"""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

FILE = "summary.json"

# What a missing key means.  Tuples are read as "one of these types".
_TEXT = (
    "recipe", "scheme", "model", "data", "corpus_digest", "calibration", "objective", "start",
    "control_ptq_calibration", "export_dir", "sensitivity_metric", "unit", "config_digest",
)  # fmt: skip
_NUMBERS = (
    "seed", "steps", "tokens", "float_loss", "ptq_loss", "ptq_mse_loss", "calibrated_loss", "qat_loss", "control_loss",
    "control_ptq_loss", "packed_loss", "qat_minus_control_ptq", "recovery", "recovery_over_control",
    "float_bytes", "packed_bytes", "model_float_bytes", "model_packed_bytes", "seconds", "budget_bits",
)  # fmt: skip
_INTERVALS = ("qat_minus_control_ptq_interval", "recovery_interval", "recovery_over_control_interval")
_MAPPINGS = ("stages", "versions")
_ROWS = {
    "models": ("name", "loss", "interval", "perplexity", "accuracy", "difference_to_float", "difference_interval"),
    "history": ("step", "qat_loss", "recovery", "recovery_over_control"),
    "train_history": ("step", "loss"),
    "health": ("step", "oscillation", "changed", "clipped", "scale_drift", "gradient_ratio"),
    "layers": ("name", "scheme", "shape", "bytes", "float_bytes", "error", "tokens", "dead_inputs", "outlier_inputs"),
    "sensitivity": ("name", "bits", "bytes", "kl", "loss", "fisher", "chosen_bits"),
    "frontier": ("name", "bits", "predicted"),
}
_REQUIRED = ("recipe", "scheme", "models")

# How tables call the models of a run.
TITLES = {
    "float": "float",
    "ptq": "PTQ",
    "ptq_mse": "PTQ (MSE)",
    "calibrated": "PTQ (calibrated)",
    "qat": "QAT",
    "control": "control",
    "control_ptq": "PTQ(control)",
    "packed": "packed",
    "sliced": "PTQ, sliced",
}


def title(summary: dict[str, Any], name: str) -> str:
    """What tables call the model `name` of a run: `PTQ (gptq)` for the calibrated one, where the run says by what.

    At a nested width, `qat_int4`: `QAT, INT4`.
    """
    name, at, bits = name.partition("_int")
    if at:
        return f"{title(summary, name)}, INT{bits}"
    if name == "calibrated" and summary.get("calibration"):
        return f"PTQ ({summary['calibration']})"
    return TITLES.get(name, name)


def read_summary(path: Path) -> dict[str, Any]:
    """The summary of one run, checked; parts that the run does not have are None or empty.

    Args:
        path: a run folder, or its summary.json.

    Returns:
        The summary, every documented key present.  NaN and infinities become None with a reason.

    Raises:
        ValueError: no summary there, an unfinished one, or one with a wrong field; says what to do.
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"{path}: {'no ' + FILE + ' in this folder' if path.is_dir() else 'no such run folder or file'}; a run "
            "writes it when it ends, so give the folder of a finished run (`qat train` prints it), or a folder above it"
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{file} is not complete JSON ({error}): the run was interrupted while it wrote; run it again"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}, not a summary: was it written by `qat train`?")
    return {**_checked(_finite(values), file), "path": str(file.parent)}


def find_runs(paths: Iterable[Path | str]) -> list[Path]:
    """The run folders in and under `paths`, in natural order (job 10 after job 2), each once.

    Raises:
        ValueError: a path holds no run at all.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        here = [path] if path.name == FILE and path.is_file() else list(path.rglob(FILE))
        if not here:
            what = "no finished run in or under this folder" if path.is_dir() else "no such folder"
            raise ValueError(f"{path}: {what}; a finished run is a folder that holds {FILE}")
        found.update(dict.fromkeys(sorted((file.parent for file in here), key=natural)))
    return list(found)


def natural(path: Path) -> list[tuple[int, int | str]]:
    """A sort key that takes digits in a path for numbers."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", str(path)) if part]


def _finite(values: Any) -> Any:
    """`values` with NaN and infinities as None, and a reason beside each."""
    if isinstance(values, list):
        return [_finite(v) for v in values]
    if not isinstance(values, dict):
        return None if isinstance(values, float) and not math.isfinite(values) else values
    read = {}
    for name, value in values.items():
        read[name] = _finite(value)
        if isinstance(value, float) and read[name] is None and not values.get(f"{name}_reason"):
            read[f"{name}_reason"] = "not finite: the run diverged"
    return read


def _checked(values: dict[str, Any], file: Path) -> dict[str, Any]:
    problems = [f"{name} is missing" for name in _REQUIRED if values.get(name) is None]
    full = {**values, **{name: values.get(name) for name in (*_TEXT, *_NUMBERS, *_INTERVALS)}}
    full["overrides"] = values.get("overrides") or []
    full["unit"] = full["unit"] or "token"  # what summaries were about before they said so
    full |= {name: values.get(name) or {} for name in _MAPPINGS} | {name: values.get(name) or [] for name in _ROWS}
    for name in _NUMBERS:
        full.setdefault(f"{name}_reason", None)
        if not _is_number(full[name]):
            problems.append(f"{name} must be a number or null, got {full[name]!r}")
    problems += [f"{n} must be [low, high] or null, got {full[n]!r}" for n in _INTERVALS if not _is_interval(full[n])]
    problems += [f"{n} must be a mapping, got {full[n]!r}" for n in _MAPPINGS if not isinstance(full[n], dict)]
    for name, columns in _ROWS.items():
        rows = full[name]
        if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
            problems.append(f"{name} must be a list of mappings")
            continue
        full[name] = [{**dict.fromkeys(columns), **row} for row in rows]
        problems += [f"{name}[{i}] has no {columns[0]}" for i, row in enumerate(rows) if row.get(columns[0]) is None]
        problems += [
            f"{name}[{i}].{column} must be {'[low, high]' if 'interval' in column else 'a number'} or null"
            for i, row in enumerate(full[name])
            for column in columns
            if not (_is_interval(row[column]) if "interval" in column else _is_cell(column, row[column]))
        ]
    if problems:
        more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
        raise ValueError(
            f"{file} is not a summary that this qat reads: {'; '.join(problems[:4])}{more}. "
            "Was it written by another version, or edited? Run again to replace it"
        )
    return full


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _is_interval(value: Any) -> bool:
    return value is None or (isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)))


def _is_cell(column: str, value: Any) -> bool:
    return column in ("name", "scheme", "shape") or _is_number(value)


def number(value: float | None, digits: int = 4, sign: bool = False) -> str:
    """`value` with so many decimals, or a dash; a value that rounds to zero has no sign."""
    if value is None:
        return "—"
    text = f"{value:{'+' if sign else ''},.{digits}f}"
    return text if any(c in "123456789" for c in text) else text.lstrip("+-")


def millinats(value: float | None, interval: list[float] | None = None) -> str:
    """A difference in nats as signed millinats, with its interval where there is one: `-8.0 [-10.0, -6.0]`."""
    text = number(None if value is None else 1e3 * value, 1, sign=True)
    return f"{text} {_brackets(interval, 1e3, 1, True)}".rstrip() if value is not None else text


def ratio(summary: dict[str, Any], name: str) -> str:
    """A recovery with its interval, `0.62 [0.50, 0.74]`, or the reason why there is none."""
    if summary[name] is None:
        return f"— ({summary[f'{name}_reason'] or 'not measured'})"
    return f"{number(summary[name], 2)} {_brackets(summary[f'{name}_interval'], 1, 2, False)}".rstrip()


def _brackets(interval: list[float] | None, factor: float, digits: int, sign: bool) -> str:
    if interval is None or None in interval or interval == [0, 0]:  # [0, 0]: a model against itself
        return ""
    return "[" + ", ".join(number(factor * v, digits, sign) for v in interval) + "]"


def size(count: float | None) -> str:
    """Bytes for people: `1.86 MB` (powers of 1000, as disks and downloads count)."""
    if count is None:
        return "—"
    power = min(max(len(str(int(count))) - 1, 0) // 3, 4)
    return f"{count / 1000**power:.{2 if power else 0}f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def duration(seconds: float | None) -> str:
    """Seconds for people: `48 s`, `5 min 1 s`, `2 h 3 min`."""
    if seconds is None:
        return "—"
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def shrinkage(summary: dict[str, Any], part: Literal["model", "layers"] = "model") -> float | None:
    """How many times smaller than in 16 bits the packed model is, or its quantized layers alone.

    None where the summary does not say: those written before the whole model was counted know the layers only.
    """
    prefix = "model_" if part == "model" else ""
    packed, whole = summary[f"{prefix}packed_bytes"], summary[f"{prefix}float_bytes"]
    return whole / packed if packed and whole else None


def sizes(summary: dict[str, Any]) -> str:
    """Bytes of the packed model and of the float one, in words; of the quantized layers where no more is known."""
    model, layers = shrinkage(summary), shrinkage(summary, "layers")
    if layers is None:
        return "— (nothing was exported)"
    if model is None:
        packed, whole = size(summary["packed_bytes"]), size(summary["float_bytes"])
        return f"quantized layers: {packed} packed, {whole} in 16 bits, {number(layers, 2)} times smaller"
    packed, whole = size(summary["model_packed_bytes"]), size(summary["model_float_bytes"])
    times = f"{number(model, 2)} times smaller (quantized layers {number(layers, 2)})"
    return f"{packed} packed, {whole} in 16 bits, {times}"


def _taught_nothing_new(summary: dict[str, Any]) -> str:
    """What to try where the control learned from the data and QAT, distilled from the float model, could not."""
    learned = next((m["difference_interval"] for m in summary["models"] if m["name"] == "control"), None)
    distilled = summary["objective"] == "distillation" and summary["start"] != "control"
    if not distilled or learned is None or None in learned or learned[1] >= 0:
        return ""
    return (
        " The control learned from this data what its float model does not know, and so cannot teach: start=control "
        "fine-tunes first and distills from that."
    )


def verdict(summary: dict[str, Any]) -> str:
    """One sentence: did training through the quantizer beat fine-tuning first and quantizing after, how surely?"""
    delta, interval = summary["qat_minus_control_ptq"], summary["qat_minus_control_ptq_interval"]
    qat, ptq, unit = summary["qat_loss"], summary["ptq_loss"], f"millinats per {summary['unit']}"
    if delta is not None:
        rival = "fine-tuning first and quantizing after"
        gap = f"{number(1e3 * abs(delta), 1)} {unit}"
        if interval is None or None in interval:
            better = "QAT ended below" if delta < 0 else "QAT ended above"
            return f"{better} {rival}, by {gap}; no interval was computed, so chance is not excluded."
        if interval[0] <= 0 <= interval[1]:
            return (
                f"QAT and {rival} cannot be told apart: the difference is {number(1e3 * delta, 1, sign=True)} "
                f"{unit}, and its 95 % interval {_brackets(interval, 1e3, 1, True)} includes 0."
            )
        low, high = sorted(1e3 * abs(v) for v in interval)
        word = "beat" if delta < 0 else "did worse than"
        found = f"QAT {word} {rival}, by {gap} (95 % interval {number(low, 1)} to {number(high, 1)})."
        return found if delta < 0 else found + _taught_nothing_new(summary)
    if qat is not None and summary["steps"]:
        if ptq is None:
            return "QAT was trained, but nothing it could be compared with was measured."
        word = "below" if qat < ptq else "above"
        return (
            f"QAT ended {number(1e3 * abs(qat - ptq), 1)} {unit} {word} quantizing the float model; "
            "without a control, how much of that is fine-tuning alone is not known."
        )
    calibrated = summary["calibrated_loss"] if summary["calibrated_loss"] is not None else ptq
    if calibrated is not None and summary["float_loss"] is not None:
        cost = number(1e3 * (calibrated - summary["float_loss"]), 1, sign=True)
        sentence = f"Quantized without training: {cost} {unit} against the float model"
        if ptq is None or calibrated == ptq:
            return f"{sentence}."
        return f"{sentence}; rounding to nearest costs {number(1e3 * (ptq - summary['float_loss']), 1, sign=True)}."
    return "A float run: nothing was quantized."
