"""The report of finished runs: the 3H table, findings in sentences, two plots and a page."""

from pipelines.report.files import make_report, write_reports
from pipelines.report.findings import findings, findings_over_runs
from pipelines.report.results import Results, load_results
from pipelines.report.table import (
    LEGEND,
    LEGEND_OVER_RUNS,
    PLAIN_WIDTH,
    render_table,
    table_rows,
    table_rows_over_runs,
)

__all__ = [
    "LEGEND",
    "LEGEND_OVER_RUNS",
    "PLAIN_WIDTH",
    "Results",
    "findings",
    "findings_over_runs",
    "load_results",
    "make_report",
    "render_table",
    "table_rows",
    "table_rows_over_runs",
    "write_reports",
]
