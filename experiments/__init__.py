"""The laboratory: what each objective does, where, and why. `plan.md` has the hypotheses."""
