"""Verbs that list what options can name: models, datasets, strategies."""

from typing import TYPE_CHECKING

from harness.cli.app import LISTS, app, run_verb

if TYPE_CHECKING:
    from harness.report import Report


@app.command("models", rich_help_panel=LISTS)
def models_command() -> None:
    """List what --model can name."""
    from harness.models import list_models

    def run(report: "Report") -> int:
        report.rows(
            "Also any Hugging Face id (owner/name, or owner/name@revision) and any local folder.",
            ("model", "kind", "what it is"),
            [(model.name, model.kind, model.summary) for model in list_models()],
        )
        return 0

    run_verb(run)


@app.command("datasets", rich_help_panel=LISTS)
def datasets_command() -> None:
    """List what --dataset can name."""
    from harness.prompts import registered_datasets

    def run(report: "Report") -> int:
        report.rows(
            "Also owner/name[:config[/split]][@revision] with --prompt-template, and local json, jsonl, csv, parquet.",
            ("dataset", "offline", "licence", "what it is"),
            [
                (alias, "yes" if entry.offline else "", entry.licence, entry.summary)
                for alias, entry in registered_datasets().items()
            ],
        )
        return 0

    run_verb(run)


@app.command("strategies", rich_help_panel=LISTS)
def strategies_command() -> None:
    """List what --strategy can name."""
    from strategies.registry import all_strategies

    def run(report: "Report") -> int:
        report.rows(
            "", ("strategy", "what it does"), [(entry.name, entry.summary) for entry in all_strategies()]
        )
        return 0

    run_verb(run)
