"""The page of a report: the contents of the template `report.html`."""

import html
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup

from drpo_jax.learner.record import load_rollout, response_advantages
from drpo_jax.metrics import METRICS, SECTIONS, Section, describe, diagnose, duration
from drpo_jax.reporting.charts import SHARES, line_chart, mu_chart, number, weight_map
from drpo_jax.reporting.highlight import notable_rows, shade_key, token_spans
from drpo_jax.reporting.runs import (
    LONG,
    ORDER,
    WINDOW,
    Group,
    Run,
    accuracy,
    objective_text,
    training_seconds,
)

TOKENS = 10_000  # Approximate maximum number of tokens in all samples of the page.
PROMPT = 600  # Maximum characters of a sample's prompt.
WEIGHTS = "Gradient weights"  # Section that also shows the weights of saved rollouts.
TABLE_ONLY = "Other"  # Section whose metrics have no charts.


def render(groups: Sequence[Group]) -> str:
    """Returns the page about groups of runs: self-contained HTML without scripts."""
    runs = [run for group in groups for run in group.runs]
    last = max(1, *(int(run.records[-1]["step"]) for run in runs))
    limit = max(min(400, TOKENS // (8 * len(groups))), 40)
    ramp = matplotlib.colormaps[SHARES](range(0, 256, 51))
    sections = [metric_section(s, groups, last) for s in SECTIONS if s.title != TABLE_ONLY]
    sections = [s for s in sections if s["logged"] or s["title"] == WEIGHTS]
    ks = {run.config.get("evaluate.samples") for run in runs}
    return (
        environment()
        .get_template("report.html")
        .render(
            counts=f"{plural(len(runs), 'run')}, {plural(len(groups), 'group')}",
            contents=["Results", "Runs", *(s["title"] for s in sections), "Samples", "Metrics"],
            groups=groups,
            avg=f"avg@{ks.pop()}" if len(ks) == 1 and None not in ks else "avg@k",
            accuracy=accuracy_table(groups),
            facts=[(group, facts(group)) for group in groups],
            findings=[(group, rows) for group in groups if (rows := findings(group))],
            differences=differences(groups),
            shared=shared_fields(groups),
            sections=sections,
            weights=WEIGHTS,
            long=LONG,
            window=WINDOW,
            ramp=", ".join(map(matplotlib.colors.to_hex, ramp)),
            maps=group_charts(weight_map, groups, "No saved rollout has a token with Â ≠ 0"),
            by_mu=group_charts(mu_chart, groups, "by_mu/… is not logged"),
            key=Markup(shade_key()),
            samples=[samples(group, limit) for group in groups],
            metrics=[(group, metrics_table(group)) for group in groups],
        )
    )


def environment() -> jinja2.Environment:
    """Returns the environment of this package's templates, which escape all inserted values."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )


# --------------------------------------------------------------------------- results and runs


def mean_std(values: Sequence[float], form: str = ".1f") -> str:
    """Returns '27.7 ± 1.2' with the sample standard deviation; '27.7' for one value, '–' for none."""
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return format(statistics.fmean(values), form).replace("-", "−") + spread


def plural(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


def accuracy_table(groups: Sequence[Group]) -> dict[str, Any]:
    """Returns the modes that were evaluated, and the rows (group, cells): three cells for each mode."""
    modes = {"sampled": "eval/avg", "greedy": "eval/greedy"}
    modes = {m: name for m, name in modes.items() if any(g.curves(name) for g in groups)}
    rows = []
    for group in groups:
        cells = []
        for name in modes.values():
            before, after, change = accuracy(group, name)
            cells += [mean_std(before), mean_std(after), mean_std(change, "+.1f")]
        rows.append((group, cells))
    return {"modes": list(modes), "rows": rows}


def facts(group: Group) -> list[tuple[str, str]]:
    """Returns (name, text) of a group's objective, duration, hardware, …; unknown ones are left out."""
    runs = group.runs
    seeds = ", ".join(str(run.config.get("seed", "?")) for run in runs)
    starts = [start for run in runs for start in run.starts]
    resumes = sum(max(len(run.starts) - 1, 0) for run in runs)
    rows = {
        "objective": [objective_text(run.config) for run in runs],
        "runs": [f"{plural(len(runs), 'run')} (seed{'s' * (len(runs) != 1)} {seeds})"],
        "steps": [f"{run.records[-1]['step']:,}" for run in runs],
        "duration": [_durations(runs)],
        "started": [f"{run.starts[0]['time'][:16].replace('T', ' ')} UTC" for run in runs if run.starts],
        "resumed": [plural(resumes, "time")] if resumes else [],
        "hardware": [f"{s['devices']} × {s['device_kind']} on {s['host']}" for s in starts],
        "software": [_software(start) for start in starts],
        "commit": [start["commit"] for start in starts if start["commit"]],
        "rollouts": [f"{sum(len(run.rollouts) for run in runs):,} saved"],
        "directory": [str(run.workdir) for run in runs],
    }  # fmt: skip
    distinct = {name: [*dict.fromkeys(filter(None, values))] for name, values in rows.items()}
    return [(name, "; ".join(values)) for name, values in distinct.items() if values]


def _durations(runs: Sequence[Run]) -> str:
    seconds = sorted(s for run in runs if (s := training_seconds(run)) is not None)
    texts = [*dict.fromkeys(map(duration, [*seconds[:1], *seconds[-1:]]))]
    return " to ".join(texts) + " of rollout steps" if texts else ""


def _software(start: dict[str, Any]) -> str:
    packages = ("drpo_jax", "jax", "jaxlib", "flax", "optax", "python")
    return ", ".join(f"{name} {start[name]}" for name in packages if start.get(name))


def findings(group: Group) -> list[tuple[str, str]]:
    """Returns (place, text) of the health warnings of the group's runs, see `metrics.health`."""
    return [
        (f"seed {run.config.get('seed', '?')}, step {finding.step:,}", finding.text)
        for run in group.runs
        for finding in diagnose(run.records, run.config)
    ]


def differences(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Returns (field, its value in each group) for the fields in which the groups differ."""
    fields = dict.fromkeys(field for group in groups for field in group.fields)
    configs = [group.runs[0].config for group in groups]
    return [(f, ["–" if c.get(f) is None else str(c[f]) for c in configs]) for f in fields]


def shared_fields(groups: Sequence[Group]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Returns (section, [(field, value)]) of the config fields that all groups share."""
    first, *others = [group.runs[0].config for group in groups]
    shared = {
        field: value
        for field, value in first.items()
        if value not in (None, "") and field != "seed"
        if all(config.get(field) == value for config in others)
    }
    sections = sorted(
        {field.partition(".")[0] for field in shared},
        key=lambda s: (ORDER.index(s) if s in ORDER else len(ORDER), s),
    )
    return [
        (s, [(f.partition(".")[2], str(v)) for f, v in shared.items() if f.startswith(f"{s}.")])
        for s in sections
    ]


# ------------------------------------------------------------------------------------- charts


def metric_section(section: Section, groups: Sequence[Group], last: int) -> dict[str, Any]:
    """Returns the charts of a section, and notes on the metrics without one.

    A metric has no chart if it is not logged, zero throughout, or constant over several steps.
    """
    charts, missing, zero, constant = [], [], [], []
    for metric in section.metrics:
        if "{" in metric.name:
            continue
        values = [v for group in groups for c in group.curves(metric.name) for v in c.values()]
        if not values:
            missing.append(metric.name)
        elif not any(values):
            zero.append(metric.name)
        elif len(values) > 1 and min(values) == max(values):
            value = number(metric.scale * values[0])
            constant.append(f"{metric.name} = {value} {metric.unit}".strip())
        else:
            caption = Markup("<b>{}</b> <em>{}</em><p>{}</p>").format(
                metric.title, metric.unit, metric.definition
            )
            charts.append({"caption": caption, "svg": Markup(line_chart(metric, groups, last))})
    notes = {"Zero throughout": zero, "Constant": constant, "Not logged": missing}
    return {
        "title": section.title,
        "about": code(section.about),
        "charts": charts,
        "notes": [f"{text}: {'; '.join(names)}." for text, names in notes.items() if names],
        "logged": bool(charts or zero or constant),
    }


def code(text: str) -> Markup:
    """Returns a text with its `names` in backticks as HTML."""
    parts = [html.escape(part) for part in text.split("`")]
    return Markup("".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts)))


def group_charts(
    draw: Callable[[Group], str], groups: Sequence[Group], missing: str
) -> dict[str, Any]:
    """Returns a chart for each group, and a note on the groups without one."""
    drawn = {group.label: draw(group) for group in groups}
    without = "; ".join(label for label, chart in drawn.items() if not chart)
    chip = Markup('<span class="chip" style="--c:{}">{}</span>')
    return {
        "charts": [
            {"caption": chip.format(g.color, g.label), "svg": Markup(drawn[g.label])}
            for g in groups
            if drawn[g.label]
        ],
        "notes": [f"{missing}: {without}."] if without else [],
    }


# ------------------------------------------------------------------------ samples and metrics


def samples(group: Group, limit: int) -> dict[str, Any]:
    """Returns notable responses of the first and the last rollout that the group's first run saved.

    Args:
      group: the group.
      limit: maximum number of tokens shown per response.
    """
    run = group.runs[0]
    sample: dict[str, Any] = {"group": group, "seed": run.config.get("seed"), "rollouts": []}
    if not run.rollouts:
        return sample | {"note": "It saved no rollouts."}
    for step in sorted({*[*run.rollouts][:1], *[*run.rollouts][-1:]}):
        rollout = load_rollout(run.rollouts[step])
        if "piece_ids" not in rollout:
            return sample | {"note": "Its rollouts were saved without the text of each token."}
        responses = [_response(rollout, row, limit) for row in notable_rows(rollout)]
        sample["rollouts"].append((f"{step:,}", responses))
    return sample


def _response(rollout: dict[str, Any], row: int, limit: int) -> dict[str, Any]:
    facts = (
        f"answer {rollout['answer'][row]} · reward {number(rollout['reward'][row])} · "
        f"Â {number(response_advantages(rollout)[row])} · {rollout['response_lengths'][row]:,} tokens"
    )
    prompt = str(rollout["prompt"][row])
    if len(prompt) > PROMPT:
        prompt = f"{prompt[: PROMPT // 2]} … {prompt[-PROMPT // 2 :]}"
    return {
        "verdict": "right" if rollout["reward"][row] > 0 else "wrong",
        "facts": facts,
        "prompt": prompt,
        "tokens": Markup(token_spans(rollout, row, limit)),
    }


def metrics_table(group: Group) -> list[dict[str, Any]]:
    """Returns a row for every metric of the group, in the order of the catalogue."""
    order, rows = {name: i for i, name in enumerate(METRICS)}, []
    for name in sorted(group.names(), key=lambda n: (order.get(n, len(order)), n)):
        metric, curves = describe(name), [[*points.values()] for points in group.curves(name)]
        if curves:
            last = statistics.fmean(values[-1] for values in curves)
            values = (last, min(map(min, curves)), max(map(max, curves)))
            rows.append(
                {
                    "name": name,
                    "numbers": [number(metric.scale * value) for value in values],
                    "unit": metric.unit,
                    "definition": ": ".join(filter(None, (metric.title, metric.definition))),
                }
            )
    return rows
