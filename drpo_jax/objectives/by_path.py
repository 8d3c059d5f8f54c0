"""Objectives from files or modules: my_objectives.py:NAME becomes the row NAME of the table.

The object is one of these:

    f(logp, behavior_logp, advantage, …) -> (J, c, w)    arrays of one shape
    f(t: Token, …) -> (J, c, w)                          an equation as in `table`
    Objective(f, boundary=…, aggregation=…, …)           a row around either of them

Further arguments are hyperparameters if they have a default, else arrays that the learner provides
(`ARRAYS`). Like the table, the file may describe new hyperparameters in a dictionary `HYPERPARAMETERS`;
those without a row there must be positive.
"""

import dataclasses
import functools
import inspect
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from drpo_jax import plugins
from drpo_jax.objectives.aggregation import AGGREGATIONS
from drpo_jax.objectives.choice import unknown
from drpo_jax.objectives.rows import Hyperparameter, Objective
from drpo_jax.objectives.table import HYPERPARAMETERS, OBJECTIVES, hyperparameters
from drpo_jax.objectives.tokens import Terms, Token, token

# The arrays that the learner provides besides log π, log µ and Â.
ARRAYS = ("old_logp", "mask", "topk_logp", "behavior_topk_logp")
TOKEN = ("logp", "behavior_logp", "advantage")

_loaded: dict[str, plugins.Plugin] = {}  # The plug-ins of the table, by name.
_own: set[str] = set()  # The hyperparameters that plug-ins describe.


def load_objective(path: str, reserved: Collection[str] = ()) -> plugins.Plugin:
    """Adds the objective of a file or module to `OBJECTIVES`; a later plug-in of the same name replaces
    it.

    The equation is traced once with abstract arrays, which starts no devices.

    Args:
      path: FILE.py:NAME or MODULE:NAME.
      reserved: names that no hyperparameter may have.

    Returns:
      The plug-in, whose `name` is the name in the table.

    Raises:
      ValueError: there is no such object, or it cannot be an objective; the message says why.
    """
    return plugins.enter(
        path, "objective", OBJECTIVES, _loaded, functools.partial(_row_of, reserved=reserved)
    )


def _row_of(plugin, reserved):
    """Returns the row of a plug-in, after all checks, and describes its hyperparameters."""
    path, row = plugin.path, as_row(plugin.load(), plugin.path)
    if taken := sorted(row.hyper.keys() & set(reserved)):
        raise ValueError(
            f"{path}: the config section objective already has fields {', '.join(taken)}; rename these "
            "hyperparameters"
        )
    described = _described(row, getattr(plugin.module(), "HYPERPARAMETERS", {}), path)
    _check_hyper(row, described, path)
    _trace(row, path)
    HYPERPARAMETERS.update(described)
    _own.update(described)
    return row


def as_row(value: Any, path: str) -> Objective:
    """Returns the row of the table for an object of a file.

    Raises:
      ValueError: the object has none of the forms in the module's docstring.
    """
    row = value if isinstance(value, Objective) else None
    function = row.equation if row else value
    if not callable(function):
        raise ValueError(f"{path} must be a function or an Objective, not {value!r}")
    parameters = list(inspect.signature(function).parameters.values())
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ValueError(f"{path} must name its arguments, without *{parameter.name}")
    names = [parameter.name for parameter in parameters]
    by_token = bool(names) and (names[0] == "t" or parameters[0].annotation in (Token, "Token"))
    if not by_token:
        if tuple(names[:3]) != TOKEN:
            raise ValueError(
                f"{path}: the arguments must begin with {', '.join(TOKEN)}, or be one Token t; "
                f"they are {', '.join(names) or 'missing'}"
            )
        function = _on_tokens(function, parameters[3:])
    row = dataclasses.replace(row, equation=function) if row else Objective(function)
    for array in row.arrays:
        if array not in ARRAYS:
            error = unknown("array", array, ARRAYS)
            raise ValueError(f"{path}: {error} A hyperparameter needs a default.")
    top = {"topk_logp", "behavior_topk_logp"}
    if top & set(row.arrays) not in (set(), top):
        raise ValueError(f"{path} must take both or none of {' and '.join(sorted(top))}")
    if row.aggregation and row.aggregation not in AGGREGATIONS:
        raise ValueError(f"{path}: {unknown('aggregation', row.aggregation, AGGREGATIONS)}")
    if row.unbounded and row.unbounded not in OBJECTIVES:
        raise ValueError(f"{path}: {unknown('objective', row.unbounded, OBJECTIVES)}")
    return row


def _on_tokens(function, rest):
    """Returns f(logp, behavior_logp, advantage, …) as an equation of the table."""

    @functools.wraps(function)
    def equation(t: Token, **keywords) -> Terms:
        # log µ follows from the clipped log r, so that the function's ratios do not overflow.
        return function(t.logp, t.logp - t.log_r, t.A, **keywords)

    first = inspect.Parameter("t", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    equation.__signature__ = inspect.Signature([first, *rest])
    return equation


def _described(row, described, path):
    """Returns the rows of the hyperparameters that the file itself describes."""
    if not isinstance(described, dict):
        raise ValueError(f"{path}: HYPERPARAMETERS must be a dictionary, not {described!r:.80}")
    for key, value in described.items():
        if not isinstance(value, Hyperparameter):
            raise ValueError(f"{path}: HYPERPARAMETERS[{key!r}] must be a Hyperparameter")
        if key in HYPERPARAMETERS and key not in _own:
            raise ValueError(
                f"{path}: the table describes the hyperparameter {key!r}; choose another name"
            )
    return {key: described[key] for key in row.hyper if key in described}


def _check_hyper(row, described, path):
    """Checks the defaults of the hyperparameters; `described` has the rows of the file."""
    rows = hyperparameters() | described
    for key, default in row.hyper.items():
        if default is not None and not isinstance(default, bool | int | float):
            raise ValueError(f"{path}: {key} = {default!r} must be a number, True, False or None")
        kind = bool if isinstance(default, bool) else float
        known = rows.get(key) or Hyperparameter(key, "", type=kind)
        if known.type is not kind and default is not None:
            raise ValueError(
                f"{path}: {key} is a {known.type.__name__} in the table, so its default cannot be "
                f"{default!r}; choose another name"
            )
        if kind is float and default is not None and not known.holds(default):
            raise ValueError(
                f"{path}: {key} = {default!r} must be {known.allowed}; HYPERPARAMETERS = "
                f"{{{key!r}: Hyperparameter(…, above=…)}} in the file allows other numbers"
            )


def _trace(row, path):
    """Traces the equation with abstract arrays and checks what it returns."""
    shape = 2, 3
    array = jax.ShapeDtypeStruct(shape, jnp.float32)
    top = jax.ShapeDtypeStruct((*shape, 4), jnp.float32)
    arrays = dict(zip(ARRAYS, (array, jax.ShapeDtypeStruct(shape, jnp.int32), top, top)))

    def terms(logp, behavior_logp, advantage, needed):
        return row.equation(token(logp, behavior_logp, advantage), **needed, **row.hyper)

    try:
        returned = jax.eval_shape(
            terms, array, array, array, {key: arrays[key] for key in row.arrays}
        )
    except Exception as error:
        message = str(error).partition("\n")[0]
        raise ValueError(f"{path} fails on arrays: {type(error).__name__}: {message}") from error
    right = f"{path} must return (J, c, w), each of the shape and dtype of logp; "
    if not isinstance(returned, tuple | list) or len(returned) != 3:
        count = len(returned) if isinstance(returned, tuple | list) else 1
        values = "nothing" if returned is None else f"{count} value{'s' * (count != 1)}"
        raise ValueError(f"{right}it returns {values}")
    if any((x.shape, x.dtype) != (shape, jnp.float32) for x in returned):
        wrong = ", ".join(f"{x.dtype}{list(x.shape)}" for x in returned)
        raise ValueError(right + f"for float32{list(shape)} they are {wrong}")
