"""`make gpu` on the CPU, with tiny models: every line but the calls into CUDA."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.mark.long
def test_the_gpu_acceptance_runs_without_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    only = "environment,parity-qwen3,parity-mpnet,throughput-minilm,survival,tuning-minilm,feed,beside,copies-minilm"
    command = [sys.executable, "-m", "embed_assets_tests.gpu", "--small", "--out", str(out), "--only", only]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert set(found) == set(only.split(","))
    assert {found["parity-qwen3"][precision]["path"] for precision in ("float32", "bfloat16")} == {"torch-packed"}
    assert found["parity-mpnet"]["float32"]["path"] == "torch-padded"
    assert found["parity-qwen3"]["float32"]["cosine_min"] > 0.99999
    assert found["survival"]["cosine_min"] > 0.99999 and found["survival"]["budget_after"] <= 3000
    assert found["feed"]["sync"]["tokens"] > 0
    assert "| minilm | mixed |" in done.stdout


def test_the_engine_needs_neither_dagster_nor_the_lake() -> None:
    code = (
        "import sys\n"
        "missing = ('dagster', 'deltalake', 'polars', 'pydantic', 'fsspec', 'click')\n"
        "sys.modules.update(dict.fromkeys(missing))\n"
        "import embed_assets_tests.gpu.tasks, embed_assets.engine.process_child"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
