"""Checks objectives: python -m drpo_jax.objectives.check my_objectives.py:NAME [drpo ...]

Prints a table per objective, and exits with status 1 if a check fails. The arguments are names in the
table or objective plug-ins (see `by_path`).

The tokens are random, in 40 rows of 100 with several responses each: close to on-policy and far from
it, with µ down to e⁻²¹. The hostile tokens combine log-probabilities from 0 to −∞ with advantages from
0 to ±100.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from drpo_jax.objectives.by_path import load_objective
from drpo_jax.objectives.choice import unknown
from drpo_jax.objectives.table import OBJECTIVES, resolve_hyper, token_terms
from drpo_jax.objectives.tokens import beyond_clip

ROWS, TIME, RESPONSES, TOP = 40, 100, 8, 4
# Log-probabilities of the hostile tokens, in nats.
EXTREME = np.array([0.0, -1e-8, -1e-3, -1, -19.9, -20, -20.1, -50, -110, -1e4, -1e30, -np.inf])
ADVANTAGES = np.array([0.0, -0.0, 1e-30, -1e-30, 1.0, -1.0, 100.0, -100.0])
EXACT = 1e-7  # Tolerance of identities in float64, relative and absolute.
ROUNDED = 1e-3  # Tolerance of float32, relative to r·|Â|·(1 + |w|).
# Share of tokens so close to a boundary that float32 may put them on its other side.
FLIPPED = 5e-3


class Tokens(NamedTuple):
    """Arrays [B, T], and further arrays that some objectives take, by name."""

    logp: np.ndarray
    behavior_logp: np.ndarray
    advantage: np.ndarray
    arrays: dict[str, np.ndarray]

    def needs(self, name: str) -> dict[str, np.ndarray]:
        """Returns the arrays that the objective `name` takes."""
        return {key: self.arrays[key] for key in OBJECTIVES[name].arrays}

    def astype(self, dtype: Any) -> "Tokens":
        """Returns the tokens in another floating dtype; the mask keeps its dtype."""
        cast = {k: v if k == "mask" else v.astype(dtype) for k, v in self.arrays.items()}
        return Tokens(
            self.logp.astype(dtype),
            self.behavior_logp.astype(dtype),
            self.advantage.astype(dtype),
            cast,
        )

    def where(self, kept: np.ndarray, others: "Tokens") -> "Tokens":
        """Returns these tokens where `kept` [B, T], and `others` elsewhere, with this mask."""

        def merged(mine, theirs):
            return np.where(kept.reshape(kept.shape + (1,) * (mine.ndim - 2)), mine, theirs)

        arrays = {k: merged(v, others.arrays[k]) for k, v in self.arrays.items() if k != "mask"}
        return Tokens(
            merged(self.logp, others.logp),
            merged(self.behavior_logp, others.behavior_logp),
            merged(self.advantage, others.advantage),
            arrays | {"mask": self.arrays["mask"]},
        )


class Outcome(NamedTuple):
    """A line of the table.

    Attributes:
      check: what must hold.
      tokens: number of tokens that were compared.
      worst: the largest error, or a fraction, as text.
      problem: "" if the check holds; else the token that violates it most, or an exception.
    """

    check: str
    tokens: int
    worst: str
    problem: str


def check(name: str, **hyper: Any) -> list[Outcome]:
    """Runs all checks of an objective of the table.

    Args:
      name: a key of `OBJECTIVES`.
      **hyper: its hyperparameters.
    """
    program = _program(name, hyper)
    tokens = random_tokens()
    try:
        with jax.enable_x64(True):
            exact = program(tokens)
        single = tokens.astype(np.float32)
        narrow = program(single)
        worst = [program(part) for part in hostile_tokens()]
    except Exception as error:
        message = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return [Outcome("runs under jit, in float64 and float32", 0, "", message)]
    return [
        _derivative(name, tokens, exact),
        _weight(tokens, exact),
        _finite(worst),
        _no_signal(worst),
        *_independence(name, tokens, exact, program),
        _vmapped(name, hyper, single, narrow),
        _float32(tokens, exact, narrow),
        _dtypes(exact, narrow),
    ]


def random_tokens() -> Tokens:
    """Returns float64 tokens with |log r| < 20 that reach every regime of every objective."""
    rng, shape = np.random.default_rng(0), (ROWS, TIME)
    logp, behavior_logp = np.log(rng.beta(0.3, 0.5, (2, *shape)))
    near = rng.random(shape) < 0.5  # Half of them are close to on-policy.
    logp = np.where(near, np.minimum(behavior_logp + rng.normal(0, 0.3, shape), -1e-4), logp)
    rare = rng.random(shape) < 0.1  # Some have a huge or tiny ratio.
    behavior_logp = np.where(rare, -1.0 - rng.uniform(0, 19.9, shape), behavior_logp)
    logp = np.where(rare, -1.0, logp)
    swapped = rare & (rng.random(shape) < 0.5)
    logp, behavior_logp = np.where(swapped, (behavior_logp, logp), (logp, behavior_logp))
    # Ten rows whose sequence ratios are around GSPO's clip.
    logp[:10] = np.minimum(behavior_logp[:10] + rng.normal(0, 1e-3, (10, TIME)), -1e-4)
    logp = np.clip(logp, behavior_logp - 19.99, behavior_logp + 19.99)

    # Several responses per row; some tokens belong to none (0). Â is constant within a response.
    mask, advantage = np.zeros(shape, np.int32), rng.normal(0, 1, shape)
    for row in range(ROWS):
        cuts = np.sort(rng.choice(np.arange(1, TIME), RESPONSES, replace=False))
        for number, span in enumerate(np.split(np.arange(TIME), cuts)):
            mask[row, span] = number
            if number:
                advantage[row, span] = advantage[row, span[0]]

    # Whole distributions over eight tokens; the four likeliest under µ are recorded.
    logits = rng.normal(0, 2, (*shape, 8))
    moved = logits + rng.choice([0.02, 0.3, 2.0], (*shape, 1)) * rng.normal(0, 1, (*shape, 8))
    likeliest = np.argsort(-logits, axis=-1)[..., :TOP]
    topk = [
        np.take_along_axis(x - np.log(np.exp(x).sum(-1, keepdims=True)), likeliest, axis=-1)
        for x in (moved, logits)
    ]
    old_logp = np.minimum(logp + rng.normal(0, 0.3, shape), -1e-6)
    arrays = {"mask": mask, "old_logp": old_logp}
    arrays |= {"topk_logp": topk[0], "behavior_topk_logp": topk[1]}
    return Tokens(logp, behavior_logp, advantage, arrays)


def hostile_tokens() -> list[Tokens]:
    """Returns two batches of extreme float32 tokens, shaped like `random_tokens`."""
    grid = np.meshgrid(EXTREME, EXTREME, EXTREME[::2], ADVANTAGES)
    logp, behavior_logp, old_logp, advantage = (
        np.resize(x.astype(np.float32), (2, ROWS, TIME)) for x in grid
    )
    topk = np.stack([logp, behavior_logp, old_logp, logp], -1)
    mask = (np.arange(ROWS * TIME).reshape(ROWS, TIME) % (RESPONSES - 1)).astype(np.int32)
    return [
        Tokens(
            logp[i],
            behavior_logp[i],
            advantage[i],
            {
                "mask": mask,
                "old_logp": old_logp[i],
                "topk_logp": topk[i],
                "behavior_topk_logp": topk[i, ..., ::-1],
            },
        )
        for i in range(2)
    ]


class Terms(NamedTuple):
    """NumPy arrays [B, T]; `derivative` is ∂(Σ J)/∂logp, summed over the responses' tokens."""

    J: np.ndarray
    c: np.ndarray
    w: np.ndarray
    derivative: np.ndarray


def _program(name: str, hyper: dict[str, Any]) -> Callable[[Tokens], Terms]:
    """Returns the compiled terms of an objective, a function of `Tokens`."""

    @jax.jit
    def terms(tokens, in_responses):
        def total(logp):
            others = tokens.behavior_logp, tokens.advantage
            J, c, w = token_terms(name, logp, *others, **tokens.arrays, **hyper)
            return jnp.where(in_responses, J, 0).sum(), (J, c, w)

        derivative, returned = jax.grad(total, has_aux=True)(tokens.logp)
        return Terms(*returned, derivative)

    def on_the_host(tokens):
        counted = _counted(name, tokens)
        tokens = tokens._replace(arrays=tokens.needs(name))
        return jax.tree.map(np.asarray, terms(tokens, counted))

    return on_the_host


def _counted(name: str, tokens: Tokens) -> np.ndarray:
    """Returns where the objective is defined: on responses, if it takes whole responses."""
    mask = tokens.arrays["mask"] > 0
    return mask if OBJECTIVES[name].needs_sequences else np.ones_like(mask)


# ------------------------------------------------------------------------------------ the checks


def _derivative(name: str, tokens: Tokens, exact: Terms) -> Outcome:
    at = _counted(name, tokens)
    return _equal("c = ∂J/∂logp, by autodiff in float64", tokens, exact.c, exact.derivative, at)


def _weight(tokens: Tokens, exact: Terms) -> Outcome:
    product = np.exp(tokens.logp - tokens.behavior_logp) * tokens.advantage * exact.w
    return _equal("c = w·r·Â, in float64", tokens, exact.c, product, np.ones(product.shape, bool))


def _finite(worst: Sequence[Terms]) -> Outcome:
    title, count, wrong = "J, c and w are finite on hostile tokens", 0, []
    for tokens, terms in zip(hostile_tokens(), worst):
        at = np.isfinite(terms.J) & np.isfinite(terms.c) & np.isfinite(terms.w)
        count += at.size
        wrong += [_token(tokens, place) + _values(terms, place) for place in np.argwhere(~at)]
    return Outcome(title, count, f"{len(wrong)} tokens", wrong[0] if wrong else "")


def _no_signal(worst: Sequence[Terms]) -> Outcome:
    title, count, wrong = "c = w = 0 where |log r| > 20", 0, []
    for tokens, terms in zip(hostile_tokens(), worst):
        clipped = np.asarray(beyond_clip(tokens.logp, tokens.behavior_logp))
        count += int(clipped.sum())
        at = clipped & ((terms.c != 0) | (terms.w != 0))
        wrong += [_token(tokens, place) for place in np.argwhere(at)]
    return Outcome(title, count, f"{len(wrong)} tokens", wrong[0] if wrong else "")


def _independence(name, tokens, exact, program) -> list[Outcome]:
    """Tokens outside of responses, other rows, and other responses of a row have no influence."""
    others = hostile_tokens()[0].astype(np.float64)
    mask = tokens.arrays["mask"]
    upper = np.zeros(mask.shape, bool)
    upper[: ROWS // 2] = True
    alone = dict(tokens.arrays, mask=np.where(mask == 1, 1, 0).astype(np.int32))
    cases = [
        ("masked tokens have no influence", tokens.where(mask > 0, others), mask > 0),
        ("rows have no influence on each other", tokens.where(upper, others), upper & (mask > 0)),
        (
            "responses of a row have no influence on each other",
            tokens._replace(arrays=alone).where(mask == 1, others),
            mask == 1,
        ),
    ]
    outcomes = []
    for title, changed, at in cases:
        with jax.enable_x64(True):
            terms = program(changed)
        results = [_equal(title, tokens, getattr(terms, x), getattr(exact, x), at) for x in "Jcw"]
        outcomes.append(next((result for result in results if result.problem), results[0]))
    return outcomes


def _vmapped(name, hyper, tokens, narrow) -> Outcome:
    title = "jax.vmap over rows yields the same, in float32"
    needed = tokens.needs(name)

    def one(logp, behavior_logp, advantage, needed):
        return token_terms(name, logp, behavior_logp, advantage, **needed, **hyper)

    try:
        mapped = jax.jit(jax.vmap(one))(*tokens[:3], needed)
    except Exception as error:
        return Outcome(title, 0, "", f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    J, c, w = map(np.asarray, mapped)
    return _near(title, tokens, Terms(J, c, w, narrow.derivative), narrow)


def _float32(tokens, exact, narrow) -> Outcome:
    return _near("float32 agrees with float64", tokens, narrow, exact)


def _dtypes(exact, narrow) -> Outcome:
    wrong = [
        f"{field} is {getattr(terms, field).dtype} where logp is {dtype}"
        for terms, dtype in ((exact, "float64"), (narrow, "float32"))
        for field in ("J", "c", "w")
        if getattr(terms, field).dtype != dtype
    ]
    return Outcome("J, c and w have the dtype of logp", exact.J.size, "", ", ".join(wrong))


def _equal(title, tokens, value, expected, at) -> Outcome:
    """Compares arrays at some tokens, with tolerance `EXACT`."""
    with np.errstate(invalid="ignore"):
        error = np.where(at, abs(value - expected) / (1 + abs(expected)), 0)
    error = np.where(np.isfinite(error), error, np.inf)
    place = np.unravel_index(error.argmax(), error.shape)
    problem = ""
    if error.max() > EXACT:
        problem = f"{_token(tokens, place)}: {value[place]:.6g} instead of {expected[place]:.6g}"
    return Outcome(title, int(at.sum()), f"{error.max():.0e}", problem)


def _near(title, tokens, terms, expected) -> Outcome:
    """Compares terms for all but a fraction `FLIPPED` of the tokens, with tolerance `ROUNDED`."""
    r = np.exp(np.float64(tokens.logp) - np.float64(tokens.behavior_logp))
    pull = r * abs(tokens.advantage) * (1 + abs(expected.w))
    scales = {"J": pull + abs(expected.J), "c": pull + abs(expected.c), "w": 1 + abs(expected.w)}
    far = np.zeros(r.shape, bool)
    for field, scale in scales.items():
        error = abs(np.float64(getattr(terms, field)) - getattr(expected, field))
        far |= ~(error <= ROUNDED * (scale + EXACT))
    problem = ""
    if far.mean() > FLIPPED:
        place = tuple(np.argwhere(far)[0])
        problem = (
            f"{_token(tokens, place)}{_values(terms, place)}; expected{_values(expected, place)}"
        )
    return Outcome(title, far.size, f"{100 * far.mean():.2g} % differ", problem)


def _token(tokens: Tokens, place) -> str:
    logp, behavior_logp, advantage = (x[tuple(place)] for x in tokens[:3])
    return f"at log π = {logp:.6g}, log µ = {behavior_logp:.6g}, Â = {advantage:.6g}"


def _values(terms: Terms, place) -> str:
    return "".join(f", {x} = {getattr(terms, x)[tuple(place)]:.6g}" for x in "Jcw")


# --------------------------------------------------------------------------------- command line


def table(outcomes: Sequence[Outcome]) -> str:
    """Returns the outcomes as text."""
    rows = [("check", "tokens", "worst", "result")]
    rows += [(o.check, f"{o.tokens:,}", o.worst, "FAILS" if o.problem else "ok") for o in outcomes]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = []
    for row, problem in zip(rows, ["", *(o.problem for o in outcomes)]):
        left, *numbers, result = row
        cells = [text.rjust(width) for text, width in zip(numbers, widths[1:])]
        lines.append("  ".join([left.ljust(widths[0]), *cells, result]))
        lines += [f"    {problem}"] * bool(problem)
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Checks the named objectives and prints a table for each.

    Returns:
      The exit status: 0 if all checks hold, 1 if any fails, 2 if a name is unknown.
    """
    if not arguments or arguments[0].startswith("-"):
        print((__doc__ or "").strip())
        return 0 if arguments else 2
    status = 0
    for argument in arguments:
        try:
            if argument not in OBJECTIVES and ":" not in argument:
                raise unknown("objective", argument, OBJECTIVES)
            name = load_objective(argument).name if ":" in argument else argument
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        outcomes = check(name)
        hyper = ", ".join(f"{k} = {v}" for k, v in resolve_hyper(name, {}).items())
        print(f"{argument}   {OBJECTIVES[name].summary}\nhyperparameters: {hyper or 'none'}\n")
        failed = sum(bool(outcome.problem) for outcome in outcomes)
        verdict = f"{failed} of {len(outcomes)} checks fail" if failed else "all checks hold"
        print(f"{table(outcomes)}\n\n{verdict}\n")
        status = max(status, int(failed > 0))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
