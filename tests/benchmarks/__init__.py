"""How fast, how exact and how frugal the transport is, beside its rivals.

`python -m tests.benchmarks.transport --help` from the repository's root; the numbers it prints are the ones in `reports/benchmarks/`.
"""
