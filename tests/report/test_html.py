import json
import re
from html.parser import HTMLParser

import pytest

from qat.report.html import write_report
from qat.report.summary import read_summary

VOID = {"meta", "br", "link", "img", "hr"}
LOSSES = {"float": 2.1034, "ptq": 2.1412, "qat": 2.0461, "control": 2.0402, "control_ptq": 2.0541}
SMALL = {
    "recipe": "llama_int4_qat", "scheme": "w4a16-g128", "seed": 0, "steps": 300, "seconds": 301.2,
    "qat_minus_control_ptq": -0.008, "qat_minus_control_ptq_interval": [-0.0097, -0.0063],
    "recovery": 2.52, "recovery_interval": [2.31, 2.74],
    "recovery_over_control": 0.58, "recovery_over_control_interval": [0.49, 0.65],
    **{f"{name}_loss": loss for name, loss in LOSSES.items()},
    "models": [
        {"name": n, "loss": loss, "perplexity": 8.25, "accuracy": 0.5512, "difference_to_float": loss - 2.1034,
         "difference_interval": [loss - 2.1064, loss - 2.1004]}
        for n, loss in LOSSES.items()
    ],
}  # fmt: skip
FULL = SMALL | {
    "float_bytes": 400, "packed_bytes": 100, "model_float_bytes": 500, "model_packed_bytes": 200,
    "export_dir": "here/export",
    "history": [{"step": s, "qat_loss": 2.1 - s / 1e4, "recovery": s / 100,
                 "recovery_over_control": None if s < 50 else s / 500}
                for s in (0, 50, 100)],
    "train_history": [{"step": s, "loss": 2.2} for s in (10, 20)],
    "health": [{"step": s, "oscillation": 0.004, "changed": 0.03, "clipped": 0.01, "scale_drift": s / 1e3,
                "gradient_ratio": None} for s in (10, 20)],
    "layers": [{"name": f"model.layers.{i}.q_proj", "scheme": "w4a16-g128", "shape": [256, 128], "bytes": 17000,
                "float_bytes": 65536, "error": 0.081 + i / 1000} for i in range(60)],
    "sensitivity": [{"name": f"model.layers.{i}.{n}", "bits": b, "bytes": 100 * b, "kl": 4.0**-b, "loss": -1e-4,
                     "fisher": 4.0**-b, "chosen_bits": 4}
                    for i in range(2) for n in ("q_proj+k_proj", "down_proj") for b in (2, 4, 8)],
    "frontier": [{"name": "best", "bits": b, "predicted": 4.0**-b} for b in (2.1, 4.1, 8.1)]
    + [{"name": "4 bits", "bits": 4.1, "predicted": 0.02}, {"name": "chosen", "bits": 4.0, "predicted": 0.01}],
    "budget_bits": 4.0, "sensitivity_metric": "kl",
    "stages": {"control": 120.0}, "versions": {"torch": "2.13.0+cpu"}, "control_ptq_calibration": "weighted_mse",
}  # fmt: skip


class Page(HTMLParser):
    """Cells of tables by id, text, ids and attributes; refuses tags that do not close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.attributes, self.tables, self.texts = [], [], [], {}, []
        self.table = None
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.table = self.tables.setdefault(dict(attrs).get("id"), [])
        if tag == "tr":
            self.table.append([])
        if tag in ("td", "th"):
            self.table[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.table[-1][-1] += data


def render(folder, values):
    (folder / "summary.json").write_text(json.dumps(values))
    write_report(read_summary(folder), folder / "report.html")
    text = (folder / "report.html").read_text()
    return text, Page(text)


@pytest.fixture
def page(tmp_path):
    return lambda values: render(tmp_path, values)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The text and the parsed page of a report with everything."""
    return render(tmp_path_factory.mktemp("full"), FULL)


def test_report_needs_nothing_from_elsewhere(full):
    text, parsed = full
    assert not re.search(r"https?:|//[a-z]|<script|@import", text)
    links = [v for _, name, v in parsed.attributes if name in ("src", "href", "xlink:href")]
    assert links and all(link.startswith("#") and link[1:] in parsed.ids for link in links)
    assert all(name in parsed.ids for name in re.findall(r"url\(#([^)]+)\)", text))
    assert len(text) < 1_000_000


def test_ids_are_unique(full):
    _, parsed = full
    assert len(parsed.ids) == len(set(parsed.ids))


def test_shown_figures_are_those_of_the_summary(full):
    _, parsed = full
    rows = {row[0]: row[1:] for row in parsed.tables["models"][1:]}
    assert rows["QAT"][0] == "2.0461" and rows["QAT"][1] == "-57.3 [-60.3, -54.3]"
    assert rows["PTQ"] == ["2.1412", "+37.8 [+34.8, +40.8]", "—", "8.250", "55.12 %"]
    stored = {name: value for name, value in parsed.tables["everything"]}
    for name in ("qat_loss", "recovery", "recovery_over_control_interval", "packed_bytes", "seed", "seconds"):
        assert json.loads(stored[name]) == FULL[name]
    assert len(parsed.tables["layers"]) == 61 and parsed.tables["layers"][1][5] == "0.0810"


def test_headline_is_in_words(full):
    _, parsed = full
    assert "QAT beat fine-tuning first and quantizing after, by 8.0" in " ".join(parsed.texts)


def test_null_recovery_shows_its_reason(page):
    reason = "gap not resolvable: 0.12 millinats"
    _, parsed = page(SMALL | {"recovery_over_control": None, "recovery_over_control_reason": reason})
    assert f"— ({reason})" in parsed.texts


def test_every_plot_has_a_name_for_screen_readers_and_follows_dark_mode(full):
    text, parsed = full
    labels = [v for tag, name, v in parsed.attributes if tag == "svg" and name == "aria-label"]
    assert len(labels) == 9 and len(set(labels)) == 9
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    figures = text[text.index("<figure") : text.rindex("</figure>")]
    assert not re.findall(r"(?:fill|stroke): #.{9}", figures), "colours that dark mode cannot change"


def test_only_the_worst_of_many_layers_are_drawn(full):
    text, _ = full
    assert ">59.q_proj<" in text and ">11.q_proj<" not in text and "12 more are in the table" in text


@pytest.mark.parametrize(
    "absent",
    [
        ["history", "train_history"],
        ["layers", "packed_bytes", "model_packed_bytes", "export_dir"],
        ["control_loss", "control_ptq_loss", "qat_minus_control_ptq", "recovery_over_control"],
        [name for name in FULL if name not in ("recipe", "scheme", "models")],
    ],
    ids=["no history", "no export", "no control", "almost nothing"],
)
def test_missing_parts_leave_no_gap(page, absent):
    text, parsed = page({k: v for k, v in FULL.items() if k not in absent})
    assert "None" not in text and "nan" not in parsed.texts


def test_float_run_has_a_report(page):
    text, _ = page(
        {"recipe": "r", "scheme": "none", "models": [{"name": "float", "loss": 2.0, "difference_to_float": 0.0}]}
    )
    assert "nothing was quantized" in text and "<svg" not in text


def test_text_of_the_summary_is_escaped(page):
    text, _ = page(SMALL | {"recipe": "<script>alert(1)</script>"})
    assert "<script" not in text and "&lt;script&gt;" in text


def test_validation_losses_of_other_models_are_preferred_to_those_of_the_test_split(page, full):
    history = [row | {"ptq_loss": 2.2, "float_loss": 2.15} for row in FULL["history"]]
    assert "on the test split after training" in full[0]
    assert "All lines: validation split" in page(SMALL | {"history": history})[0]


def test_a_failed_write_leaves_the_old_report_and_no_rubbish(page, tmp_path, monkeypatch):
    page(SMALL)
    before = (tmp_path / "report.html").read_text()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        page(SMALL | {"recipe": "other"})
    assert (tmp_path / "report.html").read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "summary.json"]
