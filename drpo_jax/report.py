"""One HTML page about runs: python -m drpo_jax.report --workdir=DIR [--workdir=DIR …] --output=FILE.html

The page is self-contained: inline SVG, no script, nothing fetched. Runs whose configs are equal but
for the seed form a group: one colour, one line, and a band over its seeds. What a run did not log or
save is left out, with a note in its place.
"""

import html
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from string import Template

import matplotlib
from absl import app, flags

from drpo_jax.cli import exit_with
from drpo_jax.errors import BadInput, bad_input
from drpo_jax.learner.record import load_rollout
from drpo_jax.reporting.charts import (
    METRICS,
    SECTIONS,
    SHARES,
    describe,
    line_chart,
    mu_chart,
    number,
    weight_map,
)
from drpo_jax.reporting.highlight import shade_key, telling_rows, token_spans
from drpo_jax.reporting.runs import TOLD, Group, accuracy, group_runs, load_run

TOKENS = 10_000  # in all samples of the page together


def samples(group: Group, limit: int) -> str:
    """Chosen responses of the first and the last rollout that the group's first run saved."""
    run, columns = group.runs[0], ""
    for step in sorted({*[*run.rollouts][:1], *[*run.rollouts][-1:]}):
        rollout = load_rollout(run.rollouts[step])
        if "piece_ids" not in rollout:
            columns = note("Its rollouts were saved without the text of each token.")
            break
        columns += f"<div><h4>step {step:,}</h4>"
        for row in telling_rows(rollout):
            verdict = "right" if rollout["reward"][row] > 0 else "wrong"
            facts = (
                f"answer {rollout['answer'][row]} · reward {number(rollout['reward'][row])} · "
                f"Â {number(rollout['advantage'][row])} · {rollout['response_lengths'][row]:,} tokens"
            )
            prompt = str(rollout["prompt"][row])
            prompt = prompt if len(prompt) <= 600 else f"{prompt[:300]} … {prompt[-300:]}"
            columns += (
                f'<p><b class="{verdict}">{verdict}</b> {html.escape(facts)}</p><pre>'
                f"<b>{html.escape(prompt)}</b>{token_spans(rollout, row, limit)}</pre>"
            )
        columns += "</div>"
    columns = columns or note("It saved no rollouts.")
    return f'<h3>{chip(group)}, seed {run.config.get("seed")}</h3><div class="two">{columns}</div>'


def mean_std(values: Sequence[float], form: str = ".1f") -> str:
    """'27.7 ± 1.2' with the sample standard deviation; '27.7' of one value, '–' of none."""
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return format(statistics.fmean(values), form).replace("-", "−") + spread


def plural(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


def note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def chip(group: Group) -> str:
    return f'<span class="chip" style="--c:{group.colour}">{html.escape(group.label)}</span>'


def cards(charts: dict[str, str], captions: dict[str, str], missing: str) -> str:
    """{name: SVG, '' where there is none} side by side, and a note on those that are `missing`."""
    shown = "".join(
        f"<figure><figcaption>{captions[name]}</figcaption>{chart}</figure>"
        for name, chart in charts.items()
        if chart
    )
    without = "; ".join(name for name, chart in charts.items() if not chart)
    return f'<div class="cards">{shown}</div>' + (note(f"{missing}: {without}.") if without else "")


def table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells are HTML; a cell that begins like a number is set like one."""

    def cell(content):
        numeric = re.match(r"[+−]?\d|–", content)
        return f'<td class="n">{content}</td>' if numeric else f"<td>{content}</td>"

    head = "".join(f"<th>{title}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def header(groups: Sequence[Group]) -> str:
    """What was run: the fields that all groups share, and a table of the groups."""
    first, *others = [group.runs[0].config for group in groups]
    lines, rows = "", []
    for section in TOLD:
        shared = {
            field.removeprefix(f"{section}."): html.escape(str(value))
            for field, value in first.items()
            if field.startswith(f"{section}.") and value not in (None, "", 0)
            if all(config.get(field) == value for config in others)
        }
        order = sorted(shared, key=lambda field: field != "name")
        values = ", ".join(f"{field} <b>{shared[field]}</b>" for field in order)
        lines += f"<dt>{section}</dt><dd>{values}</dd>"
    for group in groups:
        fields = [f"{field}={value}" for field, value in group.fields.items()]
        more = ", ".join(field for field in fields if field not in group.label)
        row = (
            ", ".join(str(run.config.get("seed", "?")) for run in group.runs),
            ", ".join(dict.fromkeys(f"{run.records[-1]['step']:,}" for run in group.runs)),
            f"{sum(len(run.rollouts) for run in group.runs):,}",
            html.escape(", ".join(str(run.workdir) for run in group.runs)),
        )
        rows.append([f"{chip(group)}<small>{html.escape(more)}</small>", *row])
    titles = ("group", "seeds", "last step", "saved rollouts", "workdirs")
    return f"<dl>{lines}</dl>{table(titles, rows)}"


def accuracy_table(groups: Sequence[Group]) -> str:
    modes, rows = {"sampled": "eval/avg", "greedy": "eval/greedy"}, []
    for group in groups:
        cells = [chip(group)]
        for name in modes.values():
            before, after, change = accuracy(group, name)
            cells += [mean_std(before), mean_std(after), mean_std(change, "+.1f")]
        rows.append(cells)
    times = ("before", "after", "change")
    return table(["group", *(f"{mode}, {time}" for mode in modes for time in times)], rows)


def metrics_table(group: Group) -> str:
    """Every metric of the group: last value (mean over its runs), smallest and largest."""
    order, rows = {name: i for i, name in enumerate(METRICS)}, []
    for name in sorted(group.names(), key=lambda n: (order.get(n, len(order)), n)):
        m, curves = describe(name), [[*points.values()] for points in group.curves(name)]
        if curves:
            last = statistics.fmean(values[-1] for values in curves)
            values = (last, min(map(min, curves)), max(map(max, curves)))
            told = html.escape(": ".join(filter(None, (m.title, m.definition))))
            values = [number(m.scale * value) for value in values]
            rows.append([f"<code>{html.escape(name)}</code>", *values, m.unit, told])
    body = table(("metric", "last", "min", "max", "unit", "what it is"), rows)
    return f"<details><summary>{chip(group)}</summary>{body}</details>"


def metric_charts(section: str, groups: Sequence[Group], last: int) -> str:
    charts = {m.name: line_chart(m, groups, last) for m in SECTIONS[section]}
    captions = {
        m.name: f"<b>{m.title}</b> <em>{m.unit}</em><p>{html.escape(m.definition)}</p>"
        for m in SECTIONS[section]
    }
    return cards(charts, captions, "Not logged")


def group_charts(draw: Callable[[Group], str], groups: Sequence[Group], missing: str) -> str:
    charts = {group.label: draw(group) for group in groups}
    return cards(charts, {group.label: chip(group) for group in groups}, missing)


def page(groups: Sequence[Group]) -> str:
    """The HTML page."""
    runs = [run for group in groups for run in group.runs]
    last = max(1, *(run.records[-1]["step"] for run in runs))
    limit = max(min(400, TOKENS // (8 * len(groups))), 40)
    ramp = matplotlib.colormaps[SHARES](range(0, 256, 51))
    return PAGE.substitute(
        counts=f"{plural(len(runs), 'run')}, {plural(len(groups), 'group')}",
        ramp=", ".join(map(matplotlib.colors.to_hex, ramp)),
        header=header(groups),
        legend="".join(map(chip, groups)),
        accuracy=accuracy_table(groups),
        learning=metric_charts("learning", groups, last),
        weights=metric_charts("weights", groups, last),
        maps=group_charts(weight_map, groups, "No saved rollout with Â ≠ 0"),
        by_mu=group_charts(mu_chart, groups, "by_mu/… is not logged"),
        mismatch=metric_charts("mismatch", groups, last),
        key=shade_key(),
        samples="".join(samples(group, limit) for group in groups),
        metrics="".join(map(metrics_table, groups)),
    )


PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>drpo_jax: $counts</title><style>
body { margin: 0 auto; padding: 28px 24px 80px; max-width: 1212px; background: #fbfbfc;
  color: #1d2129; font: 14px/1.5 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif }
h1 { margin: 0 0 16px; font-size: 26px } h1 span { color: #6b7280; font-weight: 400 }
h2 { margin: 40px 0 4px; font-size: 19px } h3 { margin: 24px 0 8px; font-size: 14px }
h4 { margin: 0 0 6px; color: #6b7280; font-weight: 600; font-size: 13px }
p { margin: 0 } .intro { max-width: 900px; margin-bottom: 12px; color: #4b5260 }
.note { margin: 10px 0; color: #6b7280; font-size: 13px; font-style: italic }
dl { display: grid; grid-template-columns: 90px 1fr; gap: 3px 12px; font-size: 13px }
dt { color: #6b7280 } dd { margin: 0; color: #4b5260 } dd b { color: #1d2129; font-weight: 600 }
nav { position: sticky; top: 0; z-index: 1; margin: 16px -24px 0; padding: 9px 24px; display: flex;
  flex-wrap: wrap; gap: 4px 22px; background: #fbfbfcf2; border-bottom: 1px solid #e3e5e9 }
.chip::before { content: ""; display: inline-block; width: 18px; height: 4px; margin: 0 8px 3px 0;
  border-radius: 2px; background: var(--c) }
small { display: block; color: #6b7280 }
.cards { display: grid; grid-template-columns: repeat(auto-fill, 392px); gap: 14px 18px }
figure { margin: 0; padding: 10px 9px 4px; display: flex; flex-direction: column; background: #fff;
  justify-content: space-between; border: 1px solid #e3e5e9; border-radius: 8px }
figcaption { padding: 0 4px 4px; line-height: 1.35 }
figcaption p { color: #6b7280; font-size: 12px }
em { color: #6b7280; font-style: normal; font-size: 12px; margin-left: 4px }
svg { display: block }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: 13px }
th { color: #6b7280; font-weight: 600; text-align: left; white-space: nowrap }
td, th { padding: 4px 22px 4px 0; border-bottom: 1px solid #e3e5e9; vertical-align: top }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
summary { padding: 6px 0; cursor: pointer }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 18px; font-size: 12.5px }
pre { margin: 3px 0 12px; padding: 8px 10px; overflow-wrap: anywhere; white-space: pre-wrap;
  background: #fff; border: 1px solid #e3e5e9; border-radius: 6px;
  font: 13px/1.75 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace }
pre > b { color: #6b7280; font-weight: 400 } pre u { color: #6b7280; text-decoration: none }
pre span { padding: 2px 0 } pre span:hover { outline: 1.5px solid #1d2129 }
.right { color: #00734f } .wrong { color: #b23c00 }
.ramp { white-space: nowrap } .ramp s { display: inline-block; width: 130px; height: 11px;
  margin: 0 6px; background: linear-gradient(90deg, $ramp); vertical-align: -1px }
.key { margin: 10px 0 14px; font-size: 11.5px; line-height: 2 }
</style></head><body>
<h1>drpo_jax <span>$counts</span></h1>
$header
<nav>$legend</nav>
<h2>Held-out accuracy</h2>
<p class="intro">Before the first step and at the last evaluation, in percent: mean ± standard
deviation over the seeds of a group, and of the change of each seed. Sampled: mean over the samples
of a problem (avg@k).</p>
$accuracy
<h2>Learning</h2>
<p class="intro">Over the rollout step. A line is the mean over the seeds of a group, a band reaches
from their smallest value to their largest. Curves of 30 points or more are running means over 9
points, or running extremes where they show extremes; a pale line is the value as logged.</p>
$learning
<h2>Weights</h2>
<p class="intro">The weight w that the objective puts on the gradient of a token: c = ∂J/∂log π = w·r·Â
with r = π/µ; the plain surrogate's is 1. Shares are of all sampled tokens. Where Â = 0, most
objectives have w = 1.</p>
$weights
<h3>Distribution of w</h3>
<p class="intro">In the saved rollouts, of the tokens with Â ≠ 0. The y-axis is w, even around 1 and
logarithmic in the distance from it; the x-axis is the rollout step. Below the dashed line, w = 0,
tokens are corrected. Colour: share of the tokens in each of 61 bins,
<span class="ramp">0.001 %<s></s>100 %</span> (log scale); white: none.</p>
$maps
<h3>Gradient by probability</h3>
<p class="intro">By bins of µ: ○ share of the tokens, ● share of Σ|c|, the gradient that the tokens
emit. In percent on a log scale, mean over steps and seeds.</p>
$by_mu
<h2>Mismatch</h2>
<p class="intro">Between the learner's π at an update and the µ that the ratio is anchored on; and
(engines) between the µ of the sampler and of the learner for the same weights.</p>
$mismatch
<h2>Samples</h2>
<p class="intro">From the first and the last rollout that the first run of a group saved: up to two
right and two wrong responses to different prompts, those with the largest mean |w − 1| where Â ≠
0. Colour: w. Hover over a token for its numbers. Grey: the prompt; ∎: a token without text.</p>
<p class="key">$key</p>
$samples
<h2>All metrics</h2>
<p class="intro">Last value (mean over seeds); smallest and largest over steps and seeds.</p>
$metrics
</body></html>
""")


# ------------------------------------------------------------------------------- the entry point


def main(workdirs: Sequence[str], output: str | None, rest: Sequence[str] = ()) -> None:
    """Writes the page about the runs in `workdirs` to `output`.

    Raises:
      BadInput: a flag is missing, `rest` (of the command line) is not empty, a workdir holds no run
        or a damaged one, or the file cannot be written.
    """
    if rest:
        raise BadInput(f"{rest[0]}: not a flag; give every directory its own --workdir=DIR")
    if not workdirs:
        raise BadInput("--workdir=DIR is missing, for example --workdir=runs/first")
    if not output:
        raise BadInput("--output=FILE.html is missing, for example --output=report.html")
    runs = [load_run(Path(workdir).expanduser()) for workdir in dict.fromkeys(workdirs)]
    text = page(group_runs(runs))
    with bad_input():
        Path(output).expanduser().write_text(text, encoding="utf-8")
    print(f"{output}: {plural(len(runs), 'run')}, {len(text.encode()) / 1e6:.1f} MB")


def launch() -> None:
    """Parses the command line and exits: 2 with one message for what the user got wrong."""
    workdirs = flags.DEFINE_multi_string("workdir", [], "Directory of a run; may be repeated.")
    output = flags.DEFINE_string("output", None, "The HTML file to write.")

    def checked(action, *arguments):
        try:
            return action(*arguments)
        except (BadInput, flags.Error) as error:
            exit_with(error, 2)

    app.run(
        lambda rest: checked(main, workdirs.value, output.value, rest[1:]),
        flags_parser=lambda argv: checked(flags.FLAGS, argv),
    )


if __name__ == "__main__":
    launch()
