"""Votes of a majority: equal answers count as one answer, however they are spelled."""

from collections import Counter
from collections.abc import Sequence

from drpo_jax.rewards.pool import Isolated

Vote = tuple[str | None, float]  # An answer, None without one, and its reward.
ROUNDS = 16  # Rounds of comparisons; further distinct answers to a problem are not merged.


def merge_votes(ballots: Sequence[Sequence[Vote]], equal: Isolated | None) -> list[list[Vote]]:
    """Returns the votes with one spelling for equal answers.

    All correct answers to a problem are equal. Among the others, each round compares the most frequent
    remaining answer of every problem with the rest, in worker processes, which limit the time of each
    comparison. The answers that are left after `ROUNDS` rounds are merged only if their texts are equal.

    Args:
      ballots: one list of votes per problem.
      equal: ("", answer, answer) -> 1.0 if they are equal. None: only equal texts are.

    Returns:
      The same lists, with one spelling for each answer.
    """
    if equal is None:
        return [list(votes) for votes in ballots]
    spelling = [_right_as_one(votes) for votes in ballots]
    left = [
        [vote for vote, _ in Counter(votes).most_common() if vote[0] is not None and vote[1] != 1]
        for votes in ballots
    ]
    for _ in range(ROUNDS):
        pairs = [(i, rest[0], vote) for i, rest in enumerate(left) for vote in rest[1:]]
        if not pairs:
            break
        texts = [(first[0] or "", vote[0] or "") for _, first, vote in pairs]
        verdicts = equal.submit([""] * len(texts), *map(list, zip(*texts))).result()
        left = [rest[1:] for rest in left]
        for (i, first, vote), same in zip(pairs, verdicts):
            if same and first[1] == vote[1]:
                spelling[i][vote] = first
                left[i].remove(vote)
    return [[names.get(vote, vote) for vote in votes] for votes, names in zip(ballots, spelling)]


def _right_as_one(votes: Sequence[Vote]) -> dict[Vote, Vote]:
    right = [vote for vote in votes if vote[0] is not None and vote[1] == 1]
    return {vote: right[0] for vote in right}
