import json
import re
from pathlib import Path

import numpy as np
import pytest

from qat.evaluation import DocumentLosses, Estimate, difference
from qat.report.build import build_summary
from qat.report.summary import duration, find_runs, millinats, number, read_summary, shrinkage, size, verdict
from qat.report.table import figures as table_figures

SMALL = {"recipe": "r", "scheme": "w4a16-g128", "models": [{"name": "float", "loss": 2.0}]}


def write(folder: Path, values: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return folder


def against(difference: float, interval: list[float] | None) -> dict:
    return {"qat_minus_control_ptq": difference, "qat_minus_control_ptq_interval": interval}


def test_folder_and_file_read_the_same(tmp_path):
    folder = write(tmp_path, SMALL)
    assert read_summary(folder) == read_summary(folder / "summary.json")


def test_missing_parts_are_none_or_empty(tmp_path):
    summary = read_summary(write(tmp_path, SMALL))
    assert summary["qat_loss"] is None and summary["recovery_interval"] is None and summary["recovery_reason"] is None
    assert summary["layers"] == [] and summary["history"] == [] and summary["stages"] == {}
    assert summary["models"][0]["perplexity"] is None


def test_half_written_summary_says_that_the_run_was_interrupted(tmp_path):
    folder = write(tmp_path, json.dumps(SMALL)[:-20])
    with pytest.raises(ValueError, match=r"summary\.json is not complete JSON.*interrupted"):
        read_summary(folder)


def test_unknown_folder_says_where_a_summary_comes_from(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no such run folder.*finished run"):
        read_summary(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no summary\.json in this folder"):
        read_summary(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": None}, "recipe is missing"),
        ({"models": None}, "models is missing"),
        ({"qat_loss": "2.1"}, "qat_loss must be a number or null"),
        ({"steps": True}, "steps must be a number"),
        ({"recovery_interval": [1]}, r"recovery_interval must be \[low, high\]"),
        ({"stages": [1]}, "stages must be a mapping"),
        ({"models": [{"loss": 2.0}]}, r"models\[0\] has no name"),
        ({"history": [{"step": 1, "qat_loss": "x"}]}, r"history\[0\]\.qat_loss must be a number"),
        ({"layers": 3}, "layers must be a list"),
    ],
)
def test_wrong_fields_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read_summary(write(tmp_path, SMALL | change))


def test_a_summary_must_be_a_mapping(tmp_path):
    with pytest.raises(ValueError, match="holds a list"):
        read_summary(write(tmp_path, [1, 2]))


def test_nan_becomes_none_with_a_reason(tmp_path):
    summary = read_summary(write(tmp_path, SMALL | {"qat_loss": float("nan")}))
    assert summary["qat_loss"] is None and "diverged" in summary["qat_loss_reason"]


def test_runs_are_found_once_in_natural_order(tmp_path):
    for job in ("10", "2", "0"):
        write(tmp_path / "multirun" / job, SMALL)
    found = find_runs([tmp_path, tmp_path / "multirun" / "2", tmp_path / "multirun" / "0" / "summary.json"])
    assert [folder.name for folder in found] == ["0", "2", "10"]


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no finished run"):
        find_runs([tmp_path])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number(None), "—"),
        (number(-0.00001, 2, sign=True), "0.00"),
        (number(1234.5, 1), "1,234.5"),
        (millinats(-0.008, [-0.01, -0.006]), "-8.0 [-10.0, -6.0]"),
        (millinats(0.0, [0, 0]), "0.0"),
        (size(999), "999 bytes"),
        (size(2_488_320), "2.49 MB"),
        (duration(301.2), "5 min 1 s"),
        (duration(7380), "2 h 3 min"),
    ],
)
def test_numbers_read_well(text, expected):
    assert text == expected


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (against(-0.008, [-0.0097, -0.0063]), "beat .*8.0.*6.3 to 9.7"),
        (against(0.008, [0.006, 0.01]), "did worse than .*6.0 to 10.0"),
        (against(0.0001, [-0.001, 0.001]), "cannot be told apart"),
        (against(-0.008, None), "below .*no interval"),
        ({"qat_loss": 2.0, "ptq_loss": 2.1, "steps": 9}, "100.0 millinats per token below .*without a control"),
        ({"qat_loss": 2.1, "ptq_loss": 2.1, "float_loss": 2.0, "steps": 0}, r"without training: \+100.0"),
        ({}, "nothing was quantized"),
    ],
    ids=["better", "worse", "undecided", "no interval", "no control", "no steps", "float"],
)  # fmt: skip
def test_verdict_claims_no_more_than_was_measured(tmp_path, values, words):
    assert re.search(words, verdict(read_summary(write(tmp_path, SMALL | values))))


@pytest.mark.parametrize(
    ("delta", "learned", "values", "advised"),
    [
        (0.006, [-0.019, -0.008], {}, True),
        (0.006, [-0.019, 0.008], {}, False),
        (0.006, None, {}, False),
        (0.006, [-0.019, -0.008], {"start": "control"}, False),
        (0.006, [-0.019, -0.008], {"objective": "next_token"}, False),
        (-0.006, [-0.019, -0.008], {}, False),
    ],
    ids=["the control learned", "it may have", "no interval", "from it already", "no teacher", "QAT was better"],
)  # fmt: skip
def test_a_control_that_learned_what_the_teacher_does_not_know_is_named_as_the_start(
    tmp_path, delta, learned, values, advised
):
    control = {"name": "control", "loss": 2.0, "difference_interval": learned}
    values = {"objective": "distillation", "start": "float", "models": [*SMALL["models"], control], **values}
    values |= against(delta, [delta - 0.001, delta + 0.001])
    assert ("start=control" in verdict(read_summary(write(tmp_path, SMALL | values)))) is advised


@pytest.mark.parametrize(("prefix", "part"), [("model_", "model"), ("", "layers")])
def test_shrinkage_needs_both_sizes(tmp_path, prefix, part):
    sizes = {f"{prefix}float_bytes": 8}
    assert shrinkage(read_summary(write(tmp_path, SMALL | sizes)), part) is None
    summary = read_summary(write(tmp_path, SMALL | sizes | {f"{prefix}packed_bytes": 2}))
    assert {p: shrinkage(summary, p) for p in ("model", "layers")} == {"model": None, "layers": None, part: 4}


def test_a_run_on_one_document_has_a_summary_that_excludes_no_chance(tmp_path):
    losses = {
        name: DocumentLosses(np.array([nll, 0.0]), np.zeros(2), np.array([10, 0]))
        for name, nll in (("float", 20.0), ("qat", 21.0), ("control_ptq", 22.0))
    }
    figures: dict[str, Estimate] = {"qat_minus_control_ptq": difference(losses["qat"], losses["control_ptq"])}
    summary = read_summary(write(tmp_path, build_summary(SMALL, losses, figures)))
    assert [row["interval"] for row in summary["models"]] == [None] * 3
    assert "by 100.0 millinats per token; no interval was computed, so chance is not excluded" in verdict(summary)
    assert "no interval: only one document has tokens" in dict(table_figures(summary))["QAT - PTQ(control)"]
