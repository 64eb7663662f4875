"""The tests, laid out like the package.

`callbacks`, `cli`, `distributed`, … hold one file for each file or subject of the folder of that name in the package.
`*_on_ranks.py` start real processes (`tests.support.ranks`), two unless the number matters.
`support` is what tests share: models, Trainers, ranks, faults to inject, a slow oracle for every number of the monitor.
`meta` tests the repository itself: its layout, its package, its examples, its benchmarks and these tools.
No test file imports another. Public names are imported from `lightning_init`, others from where they are.
Names start with their subject: `pytest -k kurtosis`. Warnings are errors, and there is no network (`conftest`).
Markers: `processes` (starts other processes) and `slow` (long matrices of cases); `make quick` leaves both out.
A numeric tolerance is derived, in a comment beside it: rounding, or five standard errors of the sample.
"""
