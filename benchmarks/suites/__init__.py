"""The suites of run.py: each has `run(settings)`, which yields rows, and `plot(rows, figure)`."""
