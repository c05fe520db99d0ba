"""Every benchmark runs, at a tiny size, so that none is ever broken."""

from benchmarks import record, step


def test_step(capsys):
    rows = step.main(["--tiny"])
    assert [row["softcap"] for row in rows] == [30.0, None]
    assert all(row["images_per_second"] > 0 for row in rows)
    assert "images/s" in capsys.readouterr().out


def test_a_record_says_where_it_was_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    text = record.write("x", [{"a": 1}]).read_text()
    for key in ("gpu", "torch", "commit", "command", "rows"):
        assert f'"{key}"' in text
