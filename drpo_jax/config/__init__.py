"""The configuration of a run, from a config file to the copy in its workdir.

A config file (`configs/*.py`) starts from `default_config()` and sets fields. The command line sets
individual fields (`--config.train.steps=50`). `resolve` checks the result, fills in what follows from
other fields, and freezes it. `claim_workdir` keeps the resolved config beside the run, so that a
directory never mixes two experiments.

Every field is one row in the `settings.py` of the package that uses it (see `drpo_jax.fields`).

    settings    the sections of the run itself: train, sft, evaluate, checkpoint, log
    sections    all sections together; nested and flat forms
    checks      ranges, and the rules between sections
    objective   the objective's hyperparameters and boundary
    plugins     rewards and objectives that the config names by path
    resolve     derived fields
    workdir     config.json
    variants    what follows the colon in --config=FILE:VARIANT
    paper       what the configs of the DRPO paper share

Wrong input raises `drpo_jax.errors.BadInput`; the message names the field, its value, and what would
be right.
"""

from drpo_jax.config.objective import (
    boundary,
    learns_from_equal_rewards,
    objective_hyper,
    objective_summary,
    shared_hyper,
    with_hyper,
)
from drpo_jax.config.plugins import load_plugin
from drpo_jax.config.resolve import has_warm_start, resolve
from drpo_jax.config.sections import (
    default_config,
    field_table,
    flatten,
    from_dict,
    suggest,
)
from drpo_jax.config.validation import validate
from drpo_jax.config.workdir import (
    as_begun,
    changed_fields,
    claim_workdir,
    from_json,
    run_config,
    to_json,
)

__all__ = [
    "as_begun",
    "boundary",
    "changed_fields",
    "claim_workdir",
    "default_config",
    "field_table",
    "flatten",
    "from_dict",
    "from_json",
    "has_warm_start",
    "learns_from_equal_rewards",
    "load_plugin",
    "objective_hyper",
    "objective_summary",
    "resolve",
    "run_config",
    "shared_hyper",
    "suggest",
    "to_json",
    "validate",
    "with_hyper",
]
