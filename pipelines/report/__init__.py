"""The report of finished runs and evaluations: table, findings in sentences, plots and a page."""

from pipelines.report.contents import Settings
from pipelines.report.files import make_report, write_report_of_evaluations, write_reports
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
    "Settings",
    "findings",
    "findings_over_runs",
    "load_results",
    "make_report",
    "render_table",
    "table_rows",
    "table_rows_over_runs",
    "write_report_of_evaluations",
    "write_reports",
]
