"""Every vision transformer of timm is equal to timm's or refused in one line, as docs/backbones.md says."""

from benchmarks.names import PAGE, summary, survey, table


def test_every_name_equals_timm_or_is_refused_as_documented():
    """Tokens, pooled output and every gradient."""
    results = list(survey())
    assert not [r.name for r in results if max((r.errors or {"": 0}).values()) > 1e-5]
    page = PAGE.read_text()
    assert summary(results) in " ".join(page.split())
    documented = [line.split("|") for line in page.splitlines() if line.startswith("| ")]
    for row in table(results).splitlines()[2:]:
        _, family, names, equal, *_, refused, _ = row.split("|")
        assert any(cells[1:4] == [family, names, equal] and cells[-2] == refused for cells in documented), row
