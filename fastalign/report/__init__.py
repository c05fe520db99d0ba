"""A page about a run: ``fastalign report RUN`` (docs/report.md)."""
