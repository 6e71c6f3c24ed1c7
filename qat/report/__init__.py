"""From a run's summary.json to tables on the terminal and to report.html."""

from qat.report.html import write_report
from qat.report.summary import find_runs, read_summary
from qat.report.table import compare_table, run_table

__all__ = ["compare_table", "find_runs", "read_summary", "run_table", "write_report"]
