"""A page about a run: ``python -m fastalign.report RUN`` (docs/report.md)."""
