"""Acceptance of the engine on a CUDA GPU: ``make gpu``, at most eight minutes.

Needs torch, transformers, sentence-transformers, tokenizers, pyarrow, requests and tenacity; what needs more is skipped
where it is not. Without a GPU, or with ``--small``, every line runs with tiny models.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

TASKS: dict[str, float] = {
    "environment": 45,
    "parity-minilm": 60,
    "throughput-minilm": 90,
    "survival": 40,
    "parity-qwen3": 60,
    "throughput-bge-base": 75,
    "tuning-minilm": 45,
    "feed": 60,
    "beside": 40,
    "parity-modernbert": 45,
    "parity-xlmr": 45,
    "parity-mpnet": 45,
    "throughput-qwen3": 70,
    "copies-minilm": 45,
    "throughput-bge-large": 70,
    "parity-bge-base": 45,
}
"""Longest time of each task in seconds, in order of importance."""


def run_task(name: str, device: str, is_small: bool, folder: Path) -> dict[str, Any]:
    """The findings of a task."""
    from embed_assets_tests.gpu import tasks

    bench = tasks.Bench(device, is_small, folder, 0.1 if is_small else 1.5)
    kind, _, model = name.partition("-")
    function: Callable[..., dict[str, Any]] = getattr(tasks, kind)
    return partial(function, bench, model)() if model else function(bench)


def _child(name: str, device: str, is_small: bool, folder: Path, out: Path) -> None:
    try:
        found = run_task(name, device, is_small, folder)
    except BaseException as error:  # a finding like any other
        found = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()[-1500:]}
    out.write_text(json.dumps(found, default=str))


def main() -> int:
    """Run the tasks, each in a process of its own: one that crashes or hangs costs only itself."""
    parser = argparse.ArgumentParser(prog="make gpu")
    parser.add_argument("--small", action="store_true", help="tiny models, on the CPU")
    parser.add_argument("--seconds", type=float, default=470, help="for everything")
    parser.add_argument("--only", default="", help=f"some of {','.join(TASKS)}")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault(
        "PYTORCH_NVML_BASED_CUDA_CHECK", "1"
    )  # looking for a GPU must not start CUDA before the forks
    import torch
    import transformers  # noqa: F401  imported once, for all forks

    from embed_assets_tests.gpu import tasks  # noqa: F401

    is_small = arguments.small or not torch.cuda.is_available()
    device = "cpu" if is_small else "cuda"
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # nothing is remembered from before
        for task in arguments.only.split(",") if arguments.only else TASKS:
            limit = min(TASKS[task] * (4 if is_small else 1), deadline - time.monotonic())
            found[task] = (
                _limited(task, limit, device, is_small, folder) if limit > 10 else {"error": "no time was left"}
            )
            print(f"{task}: {json.dumps(found[task])[:400]}", flush=True)
            arguments.out.write_text(json.dumps(found, indent=1))
    print(_table(found))
    errors = [task for task, values in found.items() if "error" in values]
    done = f"{len(found) - len(errors)} of {len(found)} tasks done"
    print(f"{done}; errors: {', '.join(errors) or 'none'}; see {arguments.out}")
    return int(bool(errors))


def _limited(task: str, limit: float, device: str, is_small: bool, folder: Path) -> dict[str, Any]:
    out = folder / "answer.json"
    out.unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(task, device, is_small, folder, out))
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        return {"error": f"it was not done after {limit:.0f} seconds"}
    if not out.exists():
        return {"error": f"its process ended with status {process.exitcode}"}
    answer: dict[str, Any] = json.loads(out.read_text())
    return answer


def _table(found: dict[str, Any]) -> str:
    """Markdown: tokens per second by model and kind of text, and how near they are to the device's matrix product."""
    peak = found.get("environment", {}).get("matmul_bfloat16_tflops") or 0
    lines = [
        "",
        "| model | texts | encode() float32 | encode() best | ours (budget) | times best | of matmul |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, values in found.items():
        if not task.startswith("throughput-") or "error" in values:
            continue
        for kind in ("512", "128", "mixed"):
            row = values[kind]
            single = max(row["encode_float32"].values())
            half = [speed for label, speeds in row.items() if label.startswith("encode_") for speed in speeds.values()]
            flash = values.get("encode_flash", {}).get(kind)
            best = max([*half, *([flash] if isinstance(flash, int) else [])])
            budget, ours = max(row["ours"].items(), key=lambda item: item[1])
            share = f"{100 * ours * row['gigaflop_per_token'] / (peak * 1000):.0f} %" if peak else ""
            name = task.removeprefix("throughput-")
            lines.append(
                f"| {name} | {kind} | {single:,} | {best:,} | {ours:,} ({budget}) | {ours / best:.2f} | {share} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
