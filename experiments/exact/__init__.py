"""Level 1 of the laboratory: exact dynamics of softmax policies.

The modules, in the order of their imports:

    problem     the contexts, the exact expected reward, the warm start
    arms        the objectives of the table as the experiments run them
    run         a training run; all dials are data
    gradients   the exact expected gradient of an arm, by bins of µ
    cells       settings of a run, their names, their cache
    sweep       the cells of `experiments/plan.md`
    analysis    rows, choice of learning rates, intervals, collapse rates
    claims      the hypotheses with verdicts
    tables, figures, exactness, report    what comes out
"""
