"""Level 2 of the laboratory: objectives on small transformers, see experiments/plan.md.

arms      the objectives and settings that are compared
plan      the cells of the sweep, in the order in which they run
cell      runs one cell: 40 steps from a shared warm start
worker    a process that runs cells, with its compiled programs kept between them
results   the files of finished cells
analysis  statistics of finished cells
report    the tables and figures of docs/laboratory.md
tail      measures the tail of a warm start, and what depends on it
"""
