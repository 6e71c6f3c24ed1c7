import json

import pytest
from rich.console import Console

from qat.report.summary import read_summary
from qat.report.table import compare_rows, compare_table, layers_table, run_table

LOSSES = {"float": 2.1034, "ptq": 2.1412, "qat": 2.0461, "control": 2.0402, "control_ptq": 2.0541}
RUN = {
    "recipe": "llama_int4_qat", "scheme": "w4a16-g128", "model": "m", "data": "d", "seed": 0, "steps": 300,
    **{f"{name}_loss": loss for name, loss in LOSSES.items()},
    "qat_minus_control_ptq": -0.008, "qat_minus_control_ptq_interval": [-0.0097, -0.0063],
    "recovery": 2.52, "recovery_interval": [2.31, 2.74],
    "recovery_over_control": 0.58, "recovery_over_control_interval": [0.49, 0.65],
    "float_bytes": 400, "packed_bytes": 100, "model_float_bytes": 500, "model_packed_bytes": 200, "seconds": 301.2,
    "export_dir": "here/export",
    "models": [
        {"name": n, "loss": loss, "perplexity": 8.25, "accuracy": 0.5512, "difference_to_float": loss - 2.1034,
         "difference_interval": [loss - 2.1064, loss - 2.1004]}
        for n, loss in LOSSES.items()
    ],
}  # fmt: skip


@pytest.fixture
def summary(tmp_path):
    def read(**change):
        (tmp_path / "summary.json").write_text(json.dumps(RUN | change))
        return read_summary(tmp_path)

    return read


def shown(renderable, width=160) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"), force_terminal=False)
    with console.file:
        console.print(renderable)
    return console.export_text()


def line(text: str, start: str) -> str:
    return next(one for one in text.splitlines() if one.strip("│ ").startswith(start))


def test_run_table_shows_every_model_with_its_figures(summary):
    text = shown(run_table(summary()), 80)
    assert "-57.3 [-60.3, -54.3]" in line(text, "QAT ") and "2.0461" in line(text, "QAT ")
    assert "+37.8" in line(text, "PTQ ") and "55.12 %" in line(text, "PTQ ") and "8.250" in line(text, "PTQ ")


def test_run_table_shows_ratios_with_intervals(summary):
    text = shown(run_table(summary()))
    assert "-8.0 [-9.7, -6.3] millinats" in line(text, "QAT - PTQ(control)")
    assert "0.58 [0.49, 0.65]" in line(text, "recovery over control")
    assert "2.52 [2.31, 2.74]" in line(text, "recovery  ")
    assert "here/export" in text and "5 min 1 s" in text


def test_sizes_are_those_of_the_whole_model(summary):
    text = shown(run_table(summary()))
    assert "200 bytes packed, 500 bytes in 16 bits, 2.50 times smaller (quantized layers 4.00)" in line(text, "size")
    (row,) = compare_rows([summary()])
    assert row["bytes_ratio"] == 2.5
    assert "times smaller: the whole model, than in 16 bits" in shown(compare_table([summary()]))


def test_a_summary_that_knows_its_layers_only_claims_no_more(summary):
    old = summary(model_float_bytes=None, model_packed_bytes=None)
    text = shown(run_table(old))
    assert "quantized layers: 100 bytes packed, 400 bytes in 16 bits, 4.00 times smaller" in line(text, "size")
    assert compare_rows([old])[0]["bytes_ratio"] is None
    assert "times smaller" not in shown(compare_table([old]))


def test_null_recovery_shows_its_reason(summary):
    text = shown(run_table(summary(recovery_over_control=None, recovery_over_control_reason="gap not resolvable: 0.1")))
    assert "— (gap not resolvable: 0.1)" in line(text, "recovery over control")


def test_float_run_has_a_table(tmp_path):
    (tmp_path / "summary.json").write_text(
        json.dumps({"recipe": "r", "scheme": "none", "models": [{"name": "float", "loss": 2.0}]})
    )
    summary = read_summary(tmp_path)
    text = shown(run_table(summary))
    assert "no control was run" in text and "nothing was exported" in text
    assert "2.0000" in text and shown(compare_table([summary]))


def test_runs_that_differ_in_seed_only_get_a_mean(summary):
    runs = [summary(seed=seed, qat_loss=2.0 + 0.1 * seed, seconds=100) for seed in (0, 1, 2)]
    rows = compare_rows(runs)
    assert [row["seed"] for row in rows] == [0, 1, 2, "mean of 3"]
    assert rows[-1]["qat_loss"] == pytest.approx(2.1) and rows[-1]["qat_loss_sd"] == pytest.approx(0.1)
    text = shown(compare_table(runs))
    assert "2.1000" in line(text, "mean of 3") and "± 0.1000" in text


def test_repetitions_have_one_config_and_may_differ_in_tokens(summary):
    runs = [summary(seed=seed, tokens=1000 + seed, config_digest="a") for seed in (0, 1)]
    assert [row["seed"] for row in compare_rows(runs)] == [0, 1, "mean of 2"]
    runs[1]["config_digest"] = "b"  # another learning rate, which nothing else in a summary names
    assert [row["seed"] for row in compare_rows(runs)] == [0, 1]
    before = [summary(seed=seed, tokens=1000 + seed) for seed in (0, 1)]  # without a digest
    assert [row["seed"] for row in compare_rows(before)] == [0, 1, "mean of 2"]


def test_the_rows_of_a_sweep_are_told_apart_by_what_differs(summary):
    runs = [
        summary(seed=seed, config_digest=lr, overrides=["data=chat", f"optim.lr={lr}"])
        for lr in ("1e-3", "1e-4")
        for seed in (0, 1)
    ]
    text = shown(compare_table(runs))
    assert sum("optim.lr=1e-3" in one for one in text.splitlines()) == 3  # two seeds and their mean
    assert "data=chat" not in text and " run " not in text


def test_rows_that_no_override_tells_apart_name_their_folders(tmp_path):
    runs = []
    for name in ("first", "deeper/second"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "summary.json").write_text(json.dumps(RUN))
        runs.append(read_summary(tmp_path / name))
    text = shown(compare_table(runs))
    assert " first " in text and "deeper/second" in text and str(tmp_path) not in text


def test_the_calibration_that_won_may_differ_between_seeds(summary):
    runs = [summary(seed=seed, control_ptq_calibration=name) for seed, name in enumerate(("absmax", "mse"))]
    assert [row["seed"] for row in compare_rows(runs)] == [0, 1, "mean of 2"]


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 400},
        {"scheme": "w8a16"},
        {"calibration": "awq"},
        {"objective": "x"},
        {"start": "control"},
        {"seed": 0},
    ],
    ids=str,
)
def test_runs_that_differ_otherwise_get_no_mean(summary, change):
    rows = compare_rows([summary(), summary(**{"seed": 1} | change)])
    assert len(rows) == 2


def test_a_mean_over_a_missing_figure_is_missing(summary):
    rows = compare_rows([summary(), summary(seed=1, recovery_over_control=None)])
    assert rows[-1]["recovery_over_control"] is None and rows[-1]["qat_loss"] == pytest.approx(2.0461)


def test_rows_are_json(summary):
    assert json.loads(json.dumps(compare_rows([summary()])))[0]["bytes_ratio"] == 2.5


@pytest.mark.parametrize("width", [80, 100, 130])
def test_no_number_is_cut_on_a_narrow_terminal(summary, width):
    text = shown(compare_table([summary(), summary(recipe="another_quite_long_name_of_a_recipe")], width), width)
    assert "…" not in text and "-8.0" in text and "[-9.7, -6.3]" in text and "[0.49, 0.65]" in text
    assert max(map(len, text.splitlines())) <= width


def test_compare_names_the_reason_of_a_missing_ratio(summary):
    text = shown(
        compare_table([summary(recovery_over_control=None, recovery_over_control_reason="gap not resolvable")])
    )
    assert "recovery over control —: gap not resolvable" in text


def test_layers_have_totals():
    rows = [
        {"name": f"l{i}", "scheme": "w4a16-g128", "shape": [4, 8], "bytes": 100 * i, "float_bytes": 600,
         "scale_range": [1e-3, 2e-3], "error": 0.0812} for i in (1, 2)
    ]  # fmt: skip
    text = shown(layers_table(rows, 50))
    assert "1/4.00" in text and "300 bytes" in text and "350 bytes" in line(text, "total") and "0.0812" in text
