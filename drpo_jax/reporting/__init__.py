"""The parts of a report.

The modules:

    runs        workdirs, grouped by config; curves and bands over seeds
    charts      SVG drawings of metrics and saved rollouts
    highlight   responses with their tokens colored by weight
    page        the contents of the page; `report.html` is its template
    mismatch    an engine's logprobs against a model's, as a dict and as text
    comparison  the page about several objectives on one rollout; `comparison.html` is its template
    curves      `learning.png`, the learning curves of one run
    explain     one problem from its text to the gradient, as text
"""
