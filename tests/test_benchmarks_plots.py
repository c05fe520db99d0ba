"""Every plot is drawn, from hand-made results of each kind."""

import builtins
import json
import struct

import pytest

from benchmarks import plots, record
from benchmarks.step import BACKBONES, GROUPS

PARTS = {"masks": 0.4, "teacher": 40, "student": 35, "loss": 2, "backward": 80, "optimiser": 4}
RATE = {"baseline": 600.0, "zero": 1650.0, "drop": 2010.0, "fp8": 1800.0}


def step_rows():
    rows = []
    for name, batch in BACKBONES.items():
        for softcap, compiled, kinds in GROUPS:
            for kind in kinds:
                row = {"backbone": name, "softcap": softcap, "compiled": compiled, "implementation": kind}
                rate = RATE[kind] * batch / 256 / (1 if compiled else 2)
                row |= {"batch": batch, "images_per_second": rate, "mfu": 0.43, "parts_ms": PARTS}
                rows.append(row | {"run": "a", "peak_gib": 40.0})
    return [*rows, {**rows[0], "failed": "does not fit into memory"}]


def kernel_rows():
    rows = []
    for op, share in (
        ("expand_masked", "copy_share"),
        ("pack", "copy_share"),
        ("softcap_attention", "matmul_share"),
    ):
        for label in ("B/16-224 batch 256", "L/14-336 batch 32", "SO400M/14-384 batch 16 packed"):
            row = {"op": op, "label": label, "implementation": "ours", "mode": "full", "ms": 1.0, share: 0.8}
            rows += [row, {**row, "implementation": "eager"}, {**row, "mode": "forward"}]
    return [*rows, {"op": "other", "label": "y", "implementation": "ours", "failed": "wrong: output 0"}]


def attention_rows():
    rows = []
    for softcap in (30.0, None):
        for packed in (False, True):
            for index, name in enumerate(("ours", "eager", "sdpa_flash", "flash_attn_3")):
                for length in (197, 577, 256, 729):
                    row = {"implementation": name, "mode": "full", "width": 64, "length": length, "ms": 1.0}
                    row |= {"softcap": softcap, "packed": packed, "tflops": 100 + 50 * index + length / 10}
                    rows.append(row | ({"computes": "x"} if softcap and name == "sdpa_flash" else {}))
    return rows


def data_rows(key):
    rows = []
    for source in ("folder", "tar"):
        for load in (0.0, 0.9):
            for threads in (1, 2, 4, 8, 16):
                row = {"source": source, "decoder": "DALI GPU mixed", "hw_decoder_load": load}
                rows.append(row | {"threads": threads, key: 500 * threads**0.8 * (1 + load)})
    return rows


def results():
    shares = {name: value / sum(PARTS.values()) for name, value in PARTS.items()}
    speeds = {"baseline": {}, "zero": {"speedup_over_baseline": 1.1}, "drop": {"speedup_over_baseline": 1.3}}
    mask = {"device": "cpu", "threads": 1, "draw_speedup": 33.0, "draw_and_pack_speedup": 12.0}
    operation = "void at::native::vectorized_elementwise_kernel<4, at::native::AUnaryFunctor<float>>"
    return {
        "step": {"rows": step_rows()},
        "attention": {"rows": attention_rows()},
        "step_cpu": {
            "rows": [
                {"backbone": "vit_small_patch16_224", "implementation": kind, "parts": shares, **speed}
                for kind, speed in speeds.items()
            ]
        },
        "kernels": {"rows": kernel_rows()},
        "masks": {"rows": [{"kind": kind, **mask} for kind in ("uniform", "blockwise")]},
        "data": {"rows": data_rows("images_per_second"), "needs": 2100.0},
        "data_cpu": {"rows": data_rows("ratio")},
        "scaling": {
            "rows": [
                {
                    "ranks": n,
                    "batch_per_rank": 256,
                    "images_per_second": 1600.0 * n**0.97,
                    "efficiency": n**-0.03,
                }
                for n in (1, 2, 4, 8)
            ]
        },
        "profile": {
            "rows": [{"operation": operation, "ms_a_step": 9.0 - n, "share": 0.1} for n in range(8)],
            **{"backbone": next(iter(BACKBONES)), "mode": "zero", "batch": 256},
        },
    }


@pytest.fixture(autouse=True)
def _results(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    environment = {
        "gpu": "NVIDIA H100 80GB HBM3",
        "torch": "2.11.0",
        "commit": "abc",
        "date": "2026-01-01 10:00",
    }
    for name, result in results().items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"environment": environment, **result}))


@pytest.mark.parametrize("name", list(plots.PLOTS))
def test_a_plot_of_each_result(name, tmp_path):
    assert plots.main([name]) == 0
    data = (tmp_path / f"{name}.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert 600 < width < 1600
    assert 200 < height < 4000
    assert 5_000 < len(data) < 150_000


def test_without_matplotlib_it_says_so(monkeypatch, capsys, tmp_path):
    original = builtins.__import__

    def without(name, *arguments, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *arguments, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert plots.draw("step") is None
    assert capsys.readouterr().out == "no step.png: matplotlib is not installed\n"
    assert not list(tmp_path.glob("*.png"))


def test_where_nothing_is_measured_nothing_is_drawn(capsys):
    record.write("step", [{"failed": "does not fit into memory"}])
    assert plots.draw("step") is None
    assert "nothing has been measured" in capsys.readouterr().out
    assert plots.draw("x") is None
    with pytest.raises(SystemExit, match="no plot x; there are step"):
        plots.main(["x"])
