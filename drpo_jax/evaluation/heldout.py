"""Samples responses to the held-out problems and verifies them."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

from drpo_jax.evaluation import accuracy
from drpo_jax.evaluation.response import Response
from drpo_jax.models import Transformer
from drpo_jax.parallel import multihost
from drpo_jax.run import NOISE, Group, Run
from drpo_jax.sampler import Sampler, SamplingParams

# The processes exchange the verdicts of this many problems at once.
GATHER = 32


def evaluate(run: Run, model: Transformer) -> dict[str, float]:
    """Measures held-out accuracy; leaves training's random streams untouched.

    Returns:
      eval/avg, the mean reward of evaluate.samples responses to each problem at evaluate.temperature;
      eval/greedy; both per kind of problem; eval/length and eval/truncated. See
      `accuracy.eval_metrics`.
    """
    responses = list(itertools.chain.from_iterable(sample_heldout(run, model)))
    return accuracy.eval_metrics(in_order(run, responses))


def sample_heldout(
    run: Run,
    model: Transformer,
    done: Iterable[Response] = (),
    places: Sequence[int] | None = None,
) -> Iterator[list[Response]]:
    """Samples responses with the sampler that evaluate.precision selects, and verifies them.

    A response depends only on the weights and on the index of its problem. Part of an evaluation, or
    the rest of an interrupted one, therefore yields the same responses as the whole.

    Args:
      done: existing responses; for each problem and mode, either all or none.
      places: indices into run.heldout of the problems to evaluate; None: all.

    Yields:
      The responses to one problem in one mode, in the order in which they are verified.
    """
    sampler = loaded_sampler(run, model)
    existing = {(response.mode, response.id) for response in done}
    places = range(len(run.heldout)) if places is None else places
    for mode, params in _modes(run).items():
        missing = [i for i in places if (mode, run.heldout[i].id) not in existing]
        problems = [run.heldout[i] for i in missing]
        if missing and not sampler.compilations():
            print("compiling prefill and decode, evaluating the held-out problems …", flush=True)
        groups = run.sample(sampler, problems, params, run.evaluation_key, missing)
        for group, verdicts in _verified(groups):
            problem, rollouts = problems[group.index], group.rollouts
            texts = group.texts or rollouts.texts(run.tokenizer)
            yield [
                Response(
                    id=problem.id,
                    kind=problem.kind,
                    mode=mode,
                    prompt=problem.prompt,
                    response=text,
                    answer=problem.answer,
                    reward=float(reward),
                    tokens=int(tokens),
                    finished=bool(finished),
                )
                for text, reward, tokens, finished in zip(
                    texts, verdicts, rollouts.response_lengths, rollouts.finished
                )
            ]
    sampler.load(None)


def in_order(run: Run, responses: Iterable[Response]) -> list[Response]:
    """Sorts responses by mode, then by the order of the held-out problems."""
    order = {problem.id: i for i, problem in enumerate(run.heldout)}
    return sorted(responses, key=lambda response: (response.mode, order[response.id]))


def loaded_sampler(run: Run, model: Transformer) -> Sampler:
    """Returns the sampler that evaluate.precision selects, with the model's weights loaded."""
    programs = run.programs
    if run.config.evaluate.precision == "exact":
        programs.exact_sampler.load(programs.sync_exact(model))
        return programs.exact_sampler
    # All evaluations draw the same noise, so that only the weights differ.
    programs.sampler.load(programs.sync(model, run.key(0, NOISE)))
    return programs.sampler


def _modes(run: Run) -> dict[str, SamplingParams]:
    config = run.config.evaluate
    limits = dict(max_tokens=run.config.sampler.max_response_length, stop=run.tokenizer.stop_ids)
    modes = {
        "avg": SamplingParams(samples=config.samples, temperature=config.temperature, **limits)
    }
    if config.greedy:
        modes["greedy"] = SamplingParams(temperature=0.0, **limits)
    return modes


def _verified(groups: Iterator[Group]):
    """Yields each group with its rewards, once they have arrived on all processes.

    Waits for the rewards of GATHER groups when as many again have been sampled, so that verification
    overlaps with sampling.
    """
    parts = iter(lambda: list(itertools.islice(groups, GATHER)), [])
    for part, _ in itertools.pairwise(itertools.chain(parts, [[]])):
        own = [(group.index, group.rewards.result()) for group in part if group.rewards is not None]
        gathered = multihost.gather(
            "verdicts", index=[i for i, _ in own], reward=[reward for _, reward in own]
        )
        verdicts = {
            i: reward
            for process in gathered
            for i, reward in zip(process["index"].tolist(), process["reward"])
        }
        for group in part:
            yield group, verdicts[group.index]
