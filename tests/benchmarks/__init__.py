"""How fast, how exact and how frugal transport and sparse experts are, beside their rivals.

`python -m tests.benchmarks.transport --help`, and the same with `experts`, from the repository's root; the numbers they print are the
ones in `reports/benchmarks/`.
"""
