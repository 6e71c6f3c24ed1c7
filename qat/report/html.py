"""report.html: one run in one file that needs nothing else, no script, no font, no network.

Plots are inline SVG drawn by matplotlib in fixed marker colours, which are then replaced by CSS variables, so
that they follow the page into dark mode.  Text stays text: it scales, and can be searched and read aloud.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

from qat.report.summary import TITLES, duration, millinats, number, shrinkage, size, title, verdict
from qat.report.table import figures, heading

# What matplotlib is told to draw with, and the CSS variable it becomes.  The line styles differ too, so
# that no line depends on its colour alone.
_COLORS = {
    "ink": "#010101", "muted": "#020202", "grid": "#030303",
    "float": "#040404", "ptq": "#050505", "qat": "#060606", "control": "#070707", "control_ptq": "#080808",
}  # fmt: skip
_DASHES = {"float": "-", "ptq": "--", "control": "-.", "control_ptq": ":"}
_SHADE = {
    "ptq_mse": "ptq",
    "calibrated": "ptq",
    "sliced": "ptq",
    "packed": "qat",
}  # variants take the colour of what they vary

# Not in the table of all.
_DRAWN = ("models", "history", "train_history", "health", "layers", "sensitivity", "frontier", "path")

WIDTH = 4.6  # inches of 72 units: labels stay legible when a phone shrinks a figure to 340 pixels
LAYERS_DRAWN = 48  # more bars than this are a wall; the table has all layers


def write_report(summary: dict[str, Any], path: Path) -> None:
    """Write the report of one run; a reader never sees half a file.

    Args:
        summary: as `read_summary` returns it.
        path: of the HTML file; its folder exists.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "millinats": millinats, "size": size, "duration": duration}
    page = environment.get_template("report.html.j2").render(
        run=summary,
        heading=heading(summary),
        verdict=verdict(summary),
        figures=figures(summary),
        titles={name: title(summary, name) for name in (*TITLES, *(row["name"] for row in summary["models"]))},
        plots=_plots(summary),
        scalars=_scalars(summary),
    )
    _write_atomically(page, Path(path))


def _write_atomically(text: str, path: Path) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would keep a web server from showing it
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _scalars(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Every figure of the summary as it is stored, for the table of everything."""
    rows = []
    for name, value in summary.items():
        if isinstance(value, dict) or name in _DRAWN:
            continue
        if value is None and name.endswith("_reason"):
            continue
        rows.append((name, value if isinstance(value, str) else json.dumps(value)))
    return rows


def _plots(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures that this run has data for: title, caption, and SVG."""
    plots: list[tuple[str, str, Callable[[Any, dict[str, Any]], str | None], float]] = []
    history, models, layers, unit = summary["history"], summary["models"], summary["layers"], summary["unit"]
    if any(row["qat_loss"] is not None for row in history):
        plots.append(("loss", f"Loss while training, nats per {unit}", _draw_loss, 3.1))
    if any(row[n] is not None for row in history for n in ("recovery", "recovery_over_control")):
        plots.append(("recovery", "Recovery while training", _draw_recovery, 3.1))
    if any(row["difference_to_float"] is not None and row["name"] != "float" for row in models):
        plots.append(("models", f"Loss against the float model, millinats per {unit}", _draw_models, 3.1))
    drawn = sum(row["error"] is not None for row in layers)
    if drawn:
        height = 0.6 + 0.19 * min(drawn, LAYERS_DRAWN)
        plots.append(("layers", "Relative error of the dequantized weights", _draw_layers, height))
    if groups := len({row["name"] for row in summary["sensitivity"]}):
        height = 0.8 + 0.22 * min(groups, LAYERS_DRAWN)
        title = "What a group of layers costs alone, by its width: KL, millinats per token"
        plots.append(("sensitivity", title, _draw_sensitivity, height))
    if summary["frontier"]:
        title = "Predicted cost of the whole model by its size, millinats per token"
        plots.append(("frontier", title, _draw_frontier, 3.1))
    if any(row["loss"] is not None for row in summary["train_history"]):
        plots.append(("train", f"What training minimised, nats per {unit}", _draw_train, 3.1))
    if summary["health"]:
        plots.append(("health", "Health of training, %", _draw_health, 3.1))
    if shrinkage(summary):
        plots.append(("bytes", "Size", _draw_bytes, 1.3))
    return [_plot(name, title, draw, height, summary) for name, title, draw, height in plots]


def _plot(name: str, title: str, draw: Callable, height: float, summary: dict[str, Any]) -> dict[str, Any]:
    import matplotlib  # slow to import, and only needed here
    from matplotlib.figure import Figure
    from matplotlib.rcsetup import cycler

    style: dict[Any, Any] = {
        # What no call colours, such as the caps of whiskers, must follow dark mode too.
        "axes.prop_cycle": cycler(color=[_COLORS["ink"]]),
        "svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10, "text.color": _COLORS["ink"],
        "axes.edgecolor": _COLORS["muted"], "axes.labelcolor": _COLORS["muted"], "axes.facecolor": "none",
        "axes.spines.top": False, "axes.spines.right": False, "axes.formatter.useoffset": False,
        "axes.unicode_minus": False, "xtick.color": _COLORS["muted"], "ytick.color": _COLORS["muted"],
        "grid.color": _COLORS["grid"], "grid.linewidth": 0.8, "axes.axisbelow": True, "lines.linewidth": 1.8,
        "legend.frameon": False, "legend.fontsize": 9,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        caption = draw(figure.add_subplot(), summary)
        buffer = StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    return {"name": name, "title": title, "caption": caption, "svg": _inline(buffer.getvalue(), name, title)}


def _inline(svg: str, name: str, title: str) -> Any:
    """An SVG file's text as an element of a page: no prologue, own ids, scalable, coloured by CSS variables."""
    from markupsafe import Markup

    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    opening, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', opening)
    assert box is not None
    rest = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', rest)
    rest = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', rest)
    rest = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", rest)
    rest = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", rest)
    for variable, color in _COLORS.items():
        rest = rest.replace(color, f"var(--{variable.replace('_', '-')})")
    # The title is one of ours and holds nothing to escape.
    return Markup(f'<svg {box.group()} role="img" aria-label="{title}">{rest}')


def _axes(axes: Any, xlabel: str | None = None, grid: str = "y") -> None:
    axes.grid(True, axis=grid)
    axes.tick_params(length=0)
    if xlabel:
        axes.set_xlabel(xlabel)


def _series(rows: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    known = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in known], [value for _, value in known]


def _draw_loss(axes: Any, summary: dict[str, Any]) -> str:
    history = summary["history"]
    axes.plot(*_series(history, "qat_loss"), color=_COLORS["qat"], marker="o", markersize=4, label="QAT")
    # A run may log the other models on the validation split too; then all lines are of one split.
    same_split = any(row.get("ptq_loss") is not None for row in history)
    for name, dashes in _DASHES.items():
        key, style = f"{name}_loss", {"color": _COLORS[name], "linestyle": dashes, "label": TITLES[name]}
        if same_split and _series(history, key)[0]:
            axes.plot(*_series(history, key), **style)
        elif not same_split and summary[key] is not None:
            axes.axhline(summary[key], **style)
    _axes(axes, "step")
    axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, handlelength=2.4)
    if same_split:
        return "All lines: validation split."
    return (
        "QAT is measured on the validation split, the horizontal lines on the test split after training: read the "
        "shape of the curve, and take differences from the table."
    )


def _draw_recovery(axes: Any, summary: dict[str, Any]) -> str:
    for name, color, marker, label in (
        ("recovery_over_control", "control", "s", "over control"),
        ("recovery", "qat", "o", "over float (naive)"),
    ):
        steps, values = _series(summary["history"], name)
        if steps:
            axes.plot(steps, values, color=_COLORS[color], marker=marker, markersize=4, label=label)
    axes.axhline(1, color=_COLORS["muted"], linewidth=1, linestyle="--")
    axes.axhline(0, color=_COLORS["muted"], linewidth=1)
    _axes(axes, "step")
    axes.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
    return "Validation split. 1 (dashed) is the whole gap, 0 is no better than quantizing after training."


def _bars(axes: Any, labels: list[str], values: list[float], colors: list[str], **options: Any) -> None:
    axes.barh(range(len(values)), values, color=[_COLORS[c] for c in colors], height=0.66, **options)
    axes.set_yticks(range(len(values)), labels)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", labelcolor=_COLORS["ink"])


def _draw_models(axes: Any, summary: dict[str, Any]) -> str:
    rows = [r for r in summary["models"] if r["difference_to_float"] is not None and r["name"] != "float"]
    values = [1e3 * row["difference_to_float"] for row in rows]
    intervals = [row["difference_interval"] for row in rows]
    spans = [(0.0, 0.0) if i is None or None in i else (1e3 * i[0], 1e3 * i[1]) for i in intervals]
    errors = [[v - s[0] if any(s) else 0 for v, s in zip(values, spans, strict=True)],
              [s[1] - v if any(s) else 0 for v, s in zip(values, spans, strict=True)]]  # fmt: skip
    names = [_SHADE.get(name, name) for name in (row["name"].partition("_int")[0] for row in rows)]
    _bars(
        axes, [title(summary, row["name"]) for row in rows], values,
        [n if n in _COLORS else "muted" for n in names],
        xerr=[[max(e, 0) for e in side] for side in errors], ecolor=_COLORS["ink"], capsize=3,
    )  # fmt: skip
    axes.axvline(0, color=_COLORS["ink"], linewidth=1)
    _axes(axes, grid="x")
    return "Test split; 0 is the float model before any training, less is better. Whiskers: 95 % intervals."


def _draw_train(axes: Any, summary: dict[str, Any]) -> str:
    axes.plot(*_series(summary["train_history"], "loss"), color=_COLORS["qat"], linewidth=1.3)
    _axes(axes, "step")
    return "Single batches: noisy, and not comparable with held-out losses."


def _draw_health(axes: Any, summary: dict[str, Any]) -> str:
    for name, color, dashes, label in (
        ("changed", "qat", "-", "changed since the last point"),
        ("oscillation", "ptq", "--", "turned back, each step"),
        ("clipped", "control", "-.", "clipped"),
        ("scale_drift", "control_ptq", ":", "drift of scales"),
    ):
        steps, shares = _series(summary["health"], name)
        axes.plot(steps, [100 * v for v in shares], color=_COLORS[color], linestyle=dashes, label=label)
    _axes(axes, "step")
    axes.set_ylim(bottom=0)
    axes.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
    return "Of the weights: codes that changed, that turned back, that are clipped; of the scales: their mean change."


def _draw_bytes(axes: Any, summary: dict[str, Any]) -> str:
    counts = [summary["model_float_bytes"], summary["model_packed_bytes"]]
    _bars(axes, ["16 bits", "packed"], counts, ["float", "qat"])
    for i, count in enumerate(counts):
        axes.annotate(size(count), (count, i), (5, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, 1.3 * max(counts))
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
    return f"The whole model: packed it is {number(shrinkage(summary), 2)} times smaller."


def _shared_path(names: list[str]) -> str:
    """What all dotted names start with, up to a dot: `model.layers.`."""
    first, last = min(names), max(names)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    return first[: first.rfind(".", 0, length) + 1]


def _draw_layers(axes: Any, summary: dict[str, Any]) -> str | None:
    rows = [row for row in summary["layers"] if row["error"] is not None]
    worst = sorted(rows, key=lambda row: -row["error"])[:LAYERS_DRAWN]
    rows, left_out = [row for row in rows if row in worst], len(rows) - len(worst)
    shared = _shared_path([row["name"] for row in rows])
    _bars(axes, [row["name"][len(shared) :] for row in rows], [row["error"] for row in rows], ["qat"] * len(rows))
    axes.tick_params(axis="y", labelsize=8.5)
    _axes(axes, grid="x")
    caption = "‖dequantized - float‖ / ‖float‖, in the order of the model"
    caption += f"; names follow {shared}*" if shared else ""
    return caption + (f". The {len(worst)} worst; {left_out} more are in the table" if left_out else "")


def _draw_sensitivity(axes: Any, summary: dict[str, Any]) -> str:
    rows = [row for row in summary["sensitivity"] if row["kl"] is not None and row["kl"] > 0]
    most = {name: max(r["kl"] for r in rows if r["name"] == name) for name in dict.fromkeys(r["name"] for r in rows)}
    drawn = sorted(most, key=lambda name: -most[name])[:LAYERS_DRAWN]
    names = [name for name in most if name in drawn]
    shared, left_out = _shared_path(names), len(most) - len(names)
    for row in rows:
        if row["name"] in drawn:
            chosen = row["bits"] == row["chosen_bits"]
            axes.text(
                1e3 * row["kl"], names.index(row["name"]), f"{row['bits']:g}", ha="center", va="center_baseline",
                color=_COLORS["qat" if chosen else "muted"], weight="bold" if chosen else "normal",
            )  # fmt: skip
    axes.set_yticks(range(len(names)), [name[len(shared) :] for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    shown = [1e3 * row["kl"] for row in rows if row["name"] in drawn]
    axes.set_xlim(min(shown) / 2, 2 * max(shown))
    _logarithmic(axes, "x")
    axes.tick_params(axis="y", labelsize=8.5, labelcolor=_COLORS["ink"])
    _axes(axes, grid="x")
    caption = "Each number is a width, in bits, where its cost is; the chosen one is bold. Calibration split"
    caption += f"; names follow {shared}*" if shared else ""
    return caption + (f". The {len(names)} most sensitive of {len(most)}" if left_out else "")


def _draw_frontier(axes: Any, summary: dict[str, Any]) -> str:
    rows = [row for row in summary["frontier"] if row["predicted"] is not None and row["predicted"] > 0]
    by_name = {name: [r for r in rows if r["name"] == name] for name in dict.fromkeys(row["name"] for row in rows)}
    for name, points in by_name.items():
        bits, costs = [r["bits"] for r in points], [1e3 * r["predicted"] for r in points]
        if name == "best":
            axes.plot(bits, costs, color=_COLORS["qat"], label="best assignment")
        elif name == "chosen":
            axes.plot(bits, costs, color=_COLORS["qat"], marker="o", linestyle="", label="chosen")
        else:
            axes.plot(bits, costs, color=_COLORS["ptq"], marker="s", markersize=4, linestyle="")
            axes.annotate(name, (bits[0], costs[0]), (6, 4), textcoords="offset points", fontsize=8.5)
    axes.plot([], [], color=_COLORS["ptq"], marker="s", markersize=4, linestyle="", label="one width for all")
    _logarithmic(axes, "y")
    _axes(axes, "bits a weight, scales included", grid="both")
    axes.legend(loc="upper right")  # the frontier leaves it free
    metric = summary["sensitivity_metric"]
    return f"Sums of what the groups cost alone ({metric}): a ranking, not a forecast. Calibration split."


def _logarithmic(axes: Any, axis: str) -> None:
    from matplotlib.ticker import NullFormatter

    getattr(axes, f"set_{axis}scale")("log")
    chosen = axes.xaxis if axis == "x" else axes.yaxis
    chosen.set_major_formatter(lambda value, _: f"{value:g}")
    chosen.set_minor_formatter(NullFormatter())
