"""Run the benchmarks and print Markdown tables: ``python -m tests.benchmarks [--only NAME …] [--repeats N]``."""

from __future__ import annotations

import argparse
import platform
import time

import lightning
import numpy as np
import torch

from tests.benchmarks import (
    accuracy,
    digits,
    gpu,
    heads,
    leave_one_out,
    memory,
    mutants,
    noise,
    online_probe,
    probes,
    race,
    ranking,
    ranking_quality,
    speed,
    sync,
    trainer,
)

BENCHMARKS = {
    "speed": speed.report,
    "memory": memory.report,
    "sync": sync.report,
    "trainer": trainer.report,
    "noise": noise.report,
    "digits": digits.report,
    "race": race.report,
    "leave_one_out": leave_one_out.report,
    "accuracy": accuracy.report,
    "probes": probes.report,
    "gpu": gpu.report,
    "heads": heads.report,
    "ranking": ranking.report,
    "quality": ranking_quality.report,
    "online_probe": online_probe.report,
    "mutants": mutants.report,
}
# These take long, or need more packages.
_IF_ASKED_FOR = ("heads", "race", "ranking", "quality", "online_probe", "mutants")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--only", choices=BENCHMARKS, nargs="+", help="run only these")
    parser.add_argument("--repeats", type=int, default=5, help="number of timed rounds; each figure is a median")
    parser.add_argument(
        "--quick", action="store_true", help="run small sizes and two rounds, to see that everything runs"
    )
    parser.add_argument(
        "--processor-time", action="store_true", help="measure processor time of one thread, if other jobs are running"
    )
    options = parser.parse_args()
    if options.processor_time:
        torch.set_num_threads(1)
        setattr(time, "perf_counter", time.process_time)  # noqa: B010
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads (default, the same for all); "
        f"Python {platform.python_version()}, torch {torch.__version__}, NumPy {np.__version__}, "
        f"Lightning {lightning.__version__}\n"
    )
    for name in options.only or [name for name in BENCHMARKS if name not in _IF_ASKED_FOR]:
        BENCHMARKS[name](2 if options.quick else options.repeats, options.quick)


if __name__ == "__main__":
    main()
