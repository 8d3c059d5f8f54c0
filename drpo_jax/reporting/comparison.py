"""The page of `drpo compare`: the contents of the template `comparison.html`."""

import math
from collections.abc import Mapping, Sequence

from drpo_jax.comparison import BINS, Judgment
from drpo_jax.reporting.charts import number
from drpo_jax.reporting.page import environment

SHADES = ("weight/corrected", "weight/masked", "weight/attenuated", "weight/amplified")


def comparison_page(judgments: Sequence[Judgment], facts: Mapping[str, str]) -> str:
    """Returns self-contained HTML without scripts.

    Args:
      judgments: the judgment of every objective, in the order of the page.
      facts: descriptions of the model, the rollouts and the config, by name.
    """
    names = [judgment.name for judgment in judgments]
    tokens = {name: judgments[0].metrics[f"by_mu/{name}/tokens"] for name in BINS}
    return (
        environment()
        .get_template("comparison.html")
        .render(
            judgments=judgments,
            names=names,
            facts=facts,
            shades={name: name.partition("/")[2] for name in SHADES},
            bins=BINS,
            tokens=tokens,
            number=lambda x: number(x) if math.isfinite(x) else "–",
            percent=lambda x: f"{100 * x:.2f}" if math.isfinite(x) else "–",
            finite=math.isfinite,
        )
    )
