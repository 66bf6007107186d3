"""One module per library, each run as a process: `python -m benchmarks.workers.NAME`."""
