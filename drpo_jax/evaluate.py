"""Held-out accuracy: python -m drpo_jax.evaluate --config=configs/tiny.py --workdir=runs/tiny

Evaluates the latest checkpoint of the run in the workdir (that of the warm start, if RL has none yet),
or that of --step, without quantization or with the rollout sampler (evaluate.precision). The problems
are a held-out part of the training problems, or the sets that `evaluate.sets` names, such as
aime24,aime25. If the workdir holds no run, the model in --config.model.path is evaluated. The config may
differ from the run's in everything but the model. The run itself is left unchanged. Writes

  evaluate.json     checkpoint, step, k, temperature, …, and `accuracy`: for "all" problems and for each
                    kind, the number of problems and, by metric (avg@k, pass@j for j = 2, 4, … and k,
                    maj@k, greedy), {"mean", "low", "high"}: shares with the 95 % bootstrap interval
  evaluations/…/    one directory per evaluation: result.json, the same; problems.tsv, one line per
                    problem, the hardest first; responses.jsonl, one object per response (problem, mode
                    avg or greedy, text, reward, tokens)

and prints a table. The same command resumes an interrupted evaluation. Several machines share the work
with --shard=1/4 to --shard=4/4; the same command without --shard then joins their responses.
"""

import dataclasses
from pathlib import Path

import jax
from absl import flags
from ml_collections import FrozenConfigDict

from drpo_jax import cli, loop
from drpo_jax.evaluation import files, in_order, sample_heldout, source
from drpo_jax.evaluation.accuracy import by_problem
from drpo_jax.evaluation.tables import Progress, accuracy_table
from drpo_jax.parallel import multihost
from drpo_jax.rewards import get_reward, merge_votes, reward_summary

SHARD = flags.DEFINE_string("shard", "1/1", "The part of the problems to evaluate, such as 1/4.")
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the latest.")


def main(
    config: FrozenConfigDict, workdir: Path, shard: str = "1/1", step: int | None = None
) -> None:
    """Evaluates a checkpoint or model.path, writes the results, and prints a table.

    Args:
      config: a resolved config.
      workdir: directory of the run.
      shard: the part of the problems to evaluate, such as "1/4".
      step: step of the checkpoint; None: the latest.

    Raises:
      BadInput: the workdir, the shard or the checkpoint does not fit the config.
    """
    directory = source.checkpoint_directory(workdir, config)
    run = loop.Run.create(config, workdir, train=False)
    places = files.shard_places(shard, len(run.heldout))
    whole = len(places) == len(run.heldout)
    with jax.set_mesh(run.mesh):
        if directory is None:
            checkpoint, step, model = config.model.path, 0, loop.initial_model(run)
        else:
            step, model = source.load_checkpoint(run, directory, step)
            checkpoint = str(directory / str(step))
        settings = files.evaluation_settings(run, checkpoint, step)
        folder = workdir / "evaluations" / files.folder_name(settings)
        print(_introduction(run, settings))
        with files.ResponseFile(folder, "" if whole else shard, settings) as file:
            samples = config.evaluate.samples + config.evaluate.greedy
            progress = Progress([run.heldout[i].id for i in places], samples, file.responses)
            for new in sample_heldout(run, model, file.responses, places):
                file.add(new)
                progress.add(new)
    if not multihost.is_main():
        return
    if not whole:
        print(f"shard {shard} is done; the same command without --shard joins the shards")
        return
    responses = in_order(run, file.responses)
    reward = get_reward(config.reward.name, config.reward.extract)
    problems = by_problem(responses, reward.extract)
    merged = merge_votes([problem.avg for problem in problems], reward.equal)
    problems = [dataclasses.replace(p, avg=votes) for p, votes in zip(problems, merged)]
    result = files.write_results(workdir, folder, settings, responses, problems)
    print(f"{checkpoint}: accuracy ({settings['sets']}), % (95 % interval)\n")
    print(accuracy_table(result["accuracy"]))
    print(
        f"\n{result['mean_tokens']:.0f} tokens per response on average, {100 * result['cut_off']:.1f} % "
        f"cut off at {settings['max_response_length']}; results by problem and all responses: {folder}"
    )


def _introduction(run, settings):
    config = run.config
    chat = f", system {config.data.system!r}" if config.data.system else ""
    greedy = " and one greedy response" if config.evaluate.greedy else ""
    engine = ", by the rollout sampler" if config.evaluate.precision == "sampler" else ""
    return (
        f"{len(run.heldout)} problems ({settings['sets']}), {settings['k']} responses each at "
        f"temperature {settings['temperature']}{greedy}{engine}; "
        f"reward {reward_summary(config.reward)}, instruction {config.data.instruction!r}{chat}"
    )


if __name__ == "__main__":
    cli.launch(lambda config, workdir: main(config, workdir, SHARD.value, STEP.value))
