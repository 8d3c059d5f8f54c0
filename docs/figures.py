"""Draws the figures of the documentation: python docs/figures.py"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from drpo_jax.objectives import gradient_weight

IMAGES = Path(__file__).parent / "images"
MU, DELTA = 0.3, 0.15
# Okabe and Ito's colors, distinct for color-blind readers, as in the notebooks.
CURVES = {
    "drpo": ("DRPO", {"color": "#0072B2", "linewidth": 2.8}),
    "dppo_tv": ("DPPO-TV", {"color": "#D55E00", "linewidth": 1.8}),
    "grpo": ("GRPO", {"color": "black", "linewidth": 1.5, "linestyle": (0, (1, 1.2))}),
    "spo": ("SPO, ε = 0.2", {"color": "#009E73", "linewidth": 1.8}),
}
HYPER = {"drpo": {"delta": DELTA}, "dppo_tv": {"delta": DELTA}, "spo": {"epsilon": 0.2}}


def weight(name, mu, pi):
    """w of tokens with probabilities µ and π and a positive advantage."""
    return np.asarray(gradient_weight(name, jnp.log(pi), jnp.log(mu), 1.0, **HYPER.get(name, {})))


def draw(path: Path = IMAGES / "weights.png") -> None:
    """The weight against π for one µ, and the largest weight against µ."""
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    near, tail = figure.subplots(1, 2, width_ratios=(1.35, 1))
    pi = np.linspace(0.001, 0.999, 4000)
    for name, (label, look) in CURVES.items():
        w = weight(name, MU, pi)
        w = np.where(np.abs(np.diff(w, append=w[-1])) > 0.5, np.nan, w)  # a gap where w jumps
        near.plot(pi, w, label=label, **look)
    near.axvline(MU, color="0.6", linewidth=0.8)
    near.axvline(MU + DELTA, color="0.6", linewidth=0.8, linestyle=(0, (4, 3)))
    near.axhline(0, color="0.6", linewidth=0.8)
    near.text(MU - 0.01, 3.1, "µ", ha="right", fontsize=11)
    near.text(MU + DELTA + 0.01, 3.1, "µ + δ", fontsize=11)
    regions = ((0.15, "amplified"), (0.375, "attenuated"), (0.72, "corrected"))
    for x, text in regions:
        near.text(x, -3.85, text, ha="center", color="#0072B2", fontsize=9.5)
    near.set(xlim=(0, 1), ylim=(-4.2, 3.6), xlabel="π, the policy's probability of the token")
    near.set_ylabel("gradient weight w")
    near.set_title("One token, µ = 0.3, positive advantage", loc="left", fontsize=11)
    near.legend(frameon=False, loc="upper right", fontsize=9.5)

    mu = np.geomspace(1e-5, 0.5, 200)
    grid = np.geomspace(1e-5, 0.9999, 2000)[:, None]
    for name, (label, look) in CURVES.items():
        tail.loglog(mu, np.abs(weight(name, mu, grid)).max(axis=0), label=label, **look)
    tail.set(xlabel="µ, the sampler's probability of the token", ylim=(0.5, 1e6))
    tail.set_title("Largest |w| over all π", loc="left", fontsize=11)
    for axes in (near, tail):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    draw()
