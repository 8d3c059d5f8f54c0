r"""Checks per second of the math verifier, compared with math-verify in one process.

    python -m benchmarks.verifier [--output=FILE.json]

First prints the rates of wrong verdicts of the reward and of math-verify on tests/rewards/pairs.txt:
false positives, which reward a wrong answer, and false negatives. Every pair counts in both orders.

A response is a few sentences that end in a box; about half of the answers are wrong. There are two
sets, drawn from a seed:

    GSM8K-like   integers, plain and with commas, units, dollar signs, decimals
    MATH-like    fractions, roots, tuples, intervals, sets, polynomials, and one third integers

    reward            the reward as training calls it: the quick stage, then workers
    workers alone     every check by math-verify in the workers, without the quick stage
    math-verify       its `parse` and `verify` on the boxed answer, one second each, in one process

There are 2 worker processes, warm, without a cache of verdicts. The ways alternate, and each figure
is the median over rounds. Ratios are formed round by round, so that they hold on a shared machine.
"""

import logging
import time

import numpy as np
from absl import app

from benchmarks.common import OUTPUT, machine, write_results
from drpo_jax.rewards import Isolated, last_box, submit
from drpo_jax.rewards.math import VERIFIERS, WARM, check
from tests.rewards.pairs import pairs as pairs_of_table

ROUNDS = 3
# Checks per round if math-verify makes all or most of them; twenty times as many otherwise.
COUNT = 250
WORKERS = 2
FILLER = (
    "First we add what she has in the morning to what she buys, and then take away a third. " * 6
)

INTEGERS = ["{n}", "{n:,}", r"\${n}", r"{n}\text{{ apples}}", "{n}.00", r"{n}\%", " {n} "]
EXPRESSIONS = [
    (r"\frac{{{n}}}{{7}}", r"{n}/7"),
    (r"{n}\sqrt{{2}}", r"\sqrt{{2}}\cdot {n}"),
    ("({n}, {m})", r"\left({n},{m}\right)"),
    (r"[-{n}, {m})", r"[-{n},{m})"),
    (r"\{{{n}, {m}\}}", "{m}, {n}"),
    ("x^2+{n}x-{m}", "{n}x+x^2-{m}"),
    (r"\frac{{{n}\pi}}{{3}}", r"{n}\pi/3"),
    ("{n}+{m}i", "{m}i+{n}"),
]


def integers(rng, count):
    """Returns pairs (response, answer) as in GSM8K."""
    n = rng.integers(1, 100_000, count)
    wrong = rng.integers(0, 2, count) * rng.integers(1, 50, count)
    forms = rng.choice(INTEGERS, count)
    return [(form.format(n=a + w), str(a)) for a, w, form in zip(n, wrong, forms)]


def expressions(rng, count):
    """Returns pairs (response, answer) as in MATH."""
    pairs = integers(rng, count)
    for i in np.flatnonzero(rng.integers(0, 3, count)):
        answer, response = EXPRESSIONS[rng.integers(len(EXPRESSIONS))]
        n, m = rng.integers(1, 1000, 2)
        pairs[i] = response.format(n=n + rng.integers(2), m=n + m), answer.format(n=n, m=n + m)
    return pairs


def by_reward(reward, pairs):
    """Returns the verdicts of a reward on pairs (boxed answer, right answer), float [N]."""
    responses = [rf"{FILLER}The answer is $\boxed{{{boxed}}}$." for boxed, _ in pairs]
    return submit(reward, [""] * len(pairs), responses, [answer for _, answer in pairs]).result()


def by_math_verify(pairs):
    """Returns the verdicts of math-verify, float [N]."""
    from math_verify import parse, verify

    verdicts = []
    for boxed, answer in pairs:
        sides = [parse(rf"\boxed{{{side}}}", parsing_timeout=1) for side in (answer, boxed)]
        verdicts.append(float(verify(*sides, timeout_seconds=1)))
    return np.array(verdicts)


def errors(ways):
    """Prints and returns the rates of wrong verdicts on the pairs of pairs.txt.

    Args:
      ways: {name: function from pairs (answer, known answer) to verdicts}.
    """
    table = list(pairs_of_table(few=True))
    equal = np.array([same for _, _, same in table])
    print(f"\n{equal.sum()} pairs of equal answers, {(~equal).sum()} of different ones")
    figures = {}
    for name, run in ways.items():
        verdicts = run([pair[:2] for pair in table]) == 1
        rates = {
            "false positives": float(np.mean(verdicts[~equal])),
            "false negatives": float(np.mean(~verdicts[equal])),
        }
        print(f"  {name:<16}" + "".join(f"{rate:>8.2%} {kind}" for kind, rate in rates.items()))
        figures[name] = {kind: round(rate, 4) for kind, rate in rates.items()}
    return figures


def main(_):
    print(machine())
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    quick = Isolated(check, quick=VERIFIERS["boxed"].quick, warm=WARM, workers=WORKERS, cache=False)
    slow = Isolated(
        check, quick=lambda _, text, answer: (last_box(text), answer),
        warm=WARM, workers=WORKERS, cache=False,
    )  # fmt: skip
    ways = {
        "reward": (lambda pairs: by_reward(quick, pairs), 20 * COUNT),
        "workers alone": (lambda pairs: by_reward(slow, pairs), COUNT),
        "math-verify": (by_math_verify, COUNT),
    }
    compared = {"reward": ways["reward"][0], "math-verify": by_math_verify}
    figures, rng = {"pairs": errors(compared)}, np.random.default_rng(0)
    for name, draw in (("GSM8K-like", integers), ("MATH-like", expressions)):
        rates = {way: [] for way in ways}
        for round_ in range(ROUNDS + 1):
            pairs = draw(rng, 20 * COUNT)
            verdicts = {}
            for way, (run, count) in ways.items():
                if draw is expressions and way == "reward":
                    count = COUNT
                start = time.perf_counter()
                verdicts[way] = run(pairs[:count])
                if round_:  # The first round warms up.
                    rates[way].append(count / (time.perf_counter() - start))
        agree = np.mean(verdicts["reward"][:COUNT] == verdicts["math-verify"][:COUNT])
        print(f"\n{name}: checks per second ({agree:.1%} of verdicts agree with math-verify)")
        figures[name] = {"verdicts as math-verify's": round(float(agree), 4)}
        for way, rate in rates.items():
            ratio = np.median(np.divide(rate, rates["math-verify"]))
            print(f"  {way:<16}{np.median(rate):>10,.0f}{ratio:>8.1f} x math-verify")
            figures[name][way] = {
                "checks/s": round(float(np.median(rate))),
                "over math-verify": round(float(ratio), 2),
            }
    print()
    print(machine())
    if OUTPUT.value:
        write_results(OUTPUT.value, "python -m benchmarks.verifier", figures)


if __name__ == "__main__":
    app.run(main)
