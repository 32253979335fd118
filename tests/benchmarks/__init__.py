"""Speed, memory and cost in a Trainer, measured: ``python -m tests.benchmarks`` from the root of the repository."""
