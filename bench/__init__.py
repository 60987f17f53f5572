"""Performance, side by side with what a user would pick instead: ``collm bench``.

shapes.py       pairs of models: made on the spot, or the shipped demo pair
workload.py     cells (concurrency, deferral, prompt length) and the jobs in them
contenders/     what is measured, one file each, with one interface
standin.py      a lane without a model, for the cost model and for tests
load.py         the closed-loop load generator
coordination.py, compare.py, context.py, memory.py    one measurement each
report.py       medians, tables, bars
LOG.md          what was tried, what was expected, what came out
"""
