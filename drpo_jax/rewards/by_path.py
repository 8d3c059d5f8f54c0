"""Rewards from files or modules: my_rewards.py:NAME becomes the row NAME of the table.

The object is one of these, or a `Reward` row around one of them:

    f(prompt, response, answer) -> number
    f(prompt, response, answer, tokens) -> number, or a list with a number or None per token
    async def f(prompt, response, answer[, tokens])
    @batch f(prompts, responses, answers[, tokens]) -> list with one result per response

`tokens` are the texts of the response's tokens. A batch holds the responses to one problem. The calls of
an async function for the responses to one problem run concurrently. Every function runs in worker
processes under the limits of `Pool`, which `limits` can change; a batch is one call.
"""

import inspect
import itertools
import math
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from drpo_jax import plugins
from drpo_jax.rewards.pool import Isolated, Pending, Pool
from drpo_jax.rewards.table import REWARDS, Reward, submit
from drpo_jax.rewards.verdict import Results, RewardFailed, Verdict, as_token_rewards, excerpt

_LIMITS = MemoryError, RecursionError  # The worker counts these as exceeded limits.
TEXTS = ("prompt", "response", "answer")

_loaded: dict[str, plugins.Plugin] = {}  # The plug-ins of the table, by name.


def batch(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a reward that takes lists, with all responses to a problem in one call."""
    function.takes_batch = True  # type: ignore[attr-defined]
    return function


def limits(**values: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Changes how the workers of a reward call it.

    Args:
      **values: cpu_seconds, wall_seconds, workers and cache are arguments of `Pool`. warm is a list of
        (prompt, response, answer). Every worker makes these calls once, without limits, before the first
        real call.
    """
    if wrong := set(values) - {"cpu_seconds", "wall_seconds", "workers", "cache", "warm"}:
        raise ValueError(
            f"there is no limit {', '.join(sorted(wrong))}; there are cpu_seconds, wall_seconds, "
            "workers, cache and warm"
        )

    def marked(function):
        function.limits = values
        return function

    return marked


def load_reward(path: str) -> plugins.Plugin:
    """Adds the reward of a file or module to `REWARDS`; a later plug-in of the same name replaces it.

    Args:
      path: FILE.py:NAME or MODULE:NAME.

    Returns:
      The plug-in, whose `name` is the name in the table.

    Raises:
      ValueError: there is no such object, or it cannot be a reward; the message says why.
    """
    return plugins.enter(path, "reward", REWARDS, _loaded, _row_of)


def _row_of(plugin):
    value, call = plugin.load(), Call(plugin)
    function = ByPath(call)
    if not isinstance(value, Reward):
        summary = (inspect.getdoc(value) or "").partition("\n")[0]
        return Reward(function, summary=summary, per_token=call.takes_tokens)
    if value.equal and plugin.defines(value.equal.pool.function):
        raise ValueError(
            f"{plugin.path}: workers must be able to import the function of `equal`; define it in a "
            "module instead of this file"
        )
    return replace(value, function=function, per_token=call.takes_tokens)


def check_reward(row: Reward, prompt: str, answer: str) -> None:
    """Computes the reward of the answer as a response, as the run will compute it.

    A batch function gets the answer twice, so one that returns too few rewards is noticed.

    Raises:
      ValueError: the call fails or exceeds its limits.
    """
    try:
        count = 2 if isinstance(row.function, ByPath) and row.function.call.takes_batch else 1
        answers = [answer] * count
        tokens = [[answer]] * count if row.per_token else None
        verdict, *_ = submit(row, [prompt] * count, answers, answers, tokens).verdicts()
    except RuntimeError as error:
        raise ValueError(f"a call for the first problem fails: {error}") from error
    if verdict.limited or verdict.lost:
        raise ValueError(
            "a call for the first problem has no result: it exceeds its limits of CPU time, memory or "
            "wall time, or ends its process; drpo_jax.rewards.limits(cpu_seconds=…) raises a limit"
        )


class Call:
    """The function of a plug-in as a worker calls it: from the texts of several responses to `Results`.

    Attributes:
      path: path of the plug-in.
      takes_tokens, takes_batch, is_async: form of the function.
      function: the function.
    """

    def __init__(self, plugin: plugins.Plugin):
        self.plugin, self.path = plugin, plugin.path
        value = plugin.load()
        self.function: Any = value.function if isinstance(value, Reward) else value
        if isinstance(self.function, Isolated):
            self.function = self.function.pool.function
        if not callable(self.function):
            raise ValueError(
                f"{self.path} must be a function or a Reward, not {self.function!r:.80}"
            )
        self.takes_batch = getattr(self.function, "takes_batch", False)
        self.is_async = inspect.iscoroutinefunction(self.function)
        self.takes_tokens = self._check_signature()

    def __reduce__(self):
        return Call, (self.plugin,)

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        answers: Sequence[str],
        tokens: Sequence[Sequence[str]] | None = None,
    ) -> Results:
        columns: list[Sequence[Any]] = [prompts, responses, answers]
        columns += [tokens or ()] if self.takes_tokens else []
        texts = list(zip(*columns, strict=True))
        if self.takes_batch:
            values = self._called([list(column) for column in columns])
            values = _run(values) if self.is_async else values
            values = self._checked_batch(values, len(texts))
        elif self.is_async:
            values = _run(self._concurrently(texts))
        else:
            values = [self._one(row) for row in texts]
        return Results(self._checked(value, row) for value, row in zip(values, texts))

    def _called(self, columns):
        """Calls the function with three texts, or lists of them, and with the tokens by keyword."""
        return self.function(*columns[:3], **({"tokens": columns[3]} if columns[3:] else {}))

    def _one(self, row):
        try:
            return self._called([*row[:3], *map(list, row[3:])])
        except _LIMITS:
            raise
        except (Exception, SystemExit) as error:
            raise _failed(row, error) from error

    async def _concurrently(self, texts):
        import asyncio

        async def one(row):
            try:
                return await self._one(row)
            except (*_LIMITS, RewardFailed):
                raise
            except (Exception, SystemExit) as error:
                raise _failed(row, error) from error

        return await asyncio.gather(*map(one, texts))

    def _checked(self, value, row):
        try:
            return as_token_rewards(value, len(row[3]) if row[3:] else None)
        except ValueError as error:
            raise RewardFailed(f"{_named(row)}: {error}") from None

    def _checked_batch(self, values, count):
        if not hasattr(values, "__len__") or isinstance(values, str) or len(values) != count:
            raise RewardFailed(
                f"a batch: it must return a list of {count} results for {count} responses, not "
                f"{values!r:.80}"
            )
        return values

    def _check_signature(self) -> bool:
        """Returns whether the function takes tokens; raises ValueError for other arguments."""
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: its arguments cannot be read: {error}") from None
        plural = "s" if self.takes_batch else ""
        right = ", ".join(f"{text}{plural}" for text in TEXTS)
        required = [p.name for p in parameters if p.default is p.empty]
        takes_tokens = any(p.name == "tokens" for p in parameters)
        texts = [name for name in required if name != "tokens"]
        if len(texts) != len(TEXTS) or any(p.kind is p.VAR_KEYWORD for p in parameters):
            raise ValueError(
                f"{self.path} must take ({right}), and may take tokens; it takes "
                f"({', '.join(required)})"
            )
        return takes_tokens


class ByPath(Isolated):
    """The reward of a plug-in. The worker processes receive its source."""

    def __init__(self, call: Call):
        self.call = call
        limits = dict(getattr(call.function, "limits", {}))
        warm = [self._columns(*([text] for text in texts)) for texts in limits.pop("warm", [])]
        self.pool = Pool(call, warm, **limits)

    def submit(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        answers: Sequence[str],
        tokens: Sequence[Sequence[str]] | None = None,
    ) -> Pending:
        """Starts computing the rewards of N responses.

        A batch or async function gets adjacent responses to the same problem in one call.

        Args:
          prompts, responses, answers: N texts each.
          tokens: the texts of each response's tokens, if the function takes them.
        """
        if self.call.takes_tokens and tokens is None:
            raise ValueError(f"{self.call.path} takes the tokens of the responses")
        rows = list(zip(*self._columns(prompts, responses, answers, tokens), strict=True))
        if self.call.takes_batch or self.call.is_async:
            by_problem = itertools.groupby(rows, key=lambda row: (row[0], row[2]))
            groups = [list(group) for _, group in by_problem]
        else:
            groups = [[row] for row in rows]
        calls = [tuple(zip(*group)) for group in groups]
        futures = self.pool.submit(calls).values
        return Pending(
            [
                one
                for call, future in zip(calls, futures, strict=True)
                for one in _by_response(future, len(call[0]))
            ]
        )

    def _columns(self, prompts, responses, answers, tokens=None):
        """Returns the arguments of a call for several responses, by default of one token each."""
        columns = tuple(prompts), tuple(responses), tuple(answers)
        tokens = [[response] for response in responses] if tokens is None else tokens
        by_token = (tuple(tuple(texts) for texts in tokens),) if self.call.takes_tokens else ()
        return columns + by_token


def _run(coroutine):
    import asyncio  # Imported late: every worker imports this module, and asyncio would dominate.

    return asyncio.run(coroutine)


def _named(row: Sequence[Any]) -> str:
    return f"prompt, response and answer {excerpt(tuple(row[:3]))}"


def _failed(row: Sequence[Any], error: BaseException) -> RewardFailed:
    """Returns the error of a call, with its texts and the traceback inside the plug-in."""
    assert error.__traceback__ is not None
    frames = traceback.format_exception(type(error), error, error.__traceback__.tb_next)
    return RewardFailed(f"{_named(row)}:\n{''.join(frames).rstrip()}")


def _by_response(future: Any, count: int) -> list[Future]:
    """Splits the future of a call for `count` responses into one future per response."""
    parts: list[Future] = [Future() for _ in range(count)]

    def split(done):
        for i, part in enumerate(parts):
            if error := done.exception():
                part.set_exception(error)
            else:
                part.set_result(_verdict(done.result(), i))

    future.add_done_callback(split)
    return parts


def _verdict(verdict: Verdict, i: int) -> Verdict:
    values: Any = verdict.value
    value = values[i] if isinstance(values, list) else values  # 0.0 for a call without result
    if not isinstance(value, list):
        return verdict._replace(value=value)
    total = math.fsum(reward for reward in value if reward is not None)
    return verdict._replace(value=total, tokens=tuple(value))
