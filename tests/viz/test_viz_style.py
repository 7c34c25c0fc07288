"""Colours can be read and told apart, on both grounds and by the colour-blind; labels do not collide."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from monge.viz.style import THEME, colour_name, label_ends, new_figure

SHOWN = ("dense", "topk", "ssr", "maxscore", "prices")  # of the demonstration
# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}


def linear(colour: str) -> np.ndarray:
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def luminance(colour: str) -> float:
    return float(linear(colour) @ [0.2126, 0.7152, 0.0722])


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def lab(rgb: np.ndarray) -> np.ndarray:
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb
    f = np.cbrt(np.maximum(xyz / [0.9505, 1.0, 1.089], 0.0089))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("theme", [0, 1])
def test_text_and_lines_stand_out_from_the_ground(theme):
    paper = THEME["paper"][theme]
    for name, pair in THEME.items():
        if name not in ("paper", "grid"):
            # WCAG asks 4.5 of text and 3 of graphics; only names of lines are written in these two.
            assert contrast(pair[theme], paper) >= (3.7 if name in ("orange", "grey") else 4.5), name


@pytest.mark.parametrize("theme", [0, 1])
@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_the_routers_of_the_demonstration_differ_for_everyone(theme, deficiency):
    seen = {
        name: lab(np.clip(DEFICIENCIES[deficiency] @ linear(THEME[colour_name(name)][theme]), 0, 1))
        for name in SHOWN
    }
    for a, b in combinations(SHOWN, 2):
        assert np.linalg.norm(seen[a] - seen[b]) > 12, (a, b)


def test_no_two_colours_of_the_theme_are_the_same_drawing():
    for i in (0, 1):
        assert len({pair[i] for pair in THEME.values()}) == len(THEME)


def test_an_unknown_router_has_a_colour_that_stays():
    assert colour_name("tomorrows_router") == colour_name("tomorrows_router")
    assert colour_name("tomorrows_router") in THEME


@pytest.mark.parametrize("ends", [[1.0] * 7, [0.0] * 7, [0.0, 0.5, 0.51, 0.52, 0.53, 1.0], [-5.0, 9.0]])
def test_labels_keep_their_order_and_their_distance(ends):
    ax = new_figure(4, 3).subplots()
    ax.set_ylim(0, 1)
    label_ends(ax, [(value, f"r{i}") for i, value in enumerate(ends)], points_high=150)
    heights = sorted((text.get_position()[1], int(text.get_text()[1:])) for text in ax.texts)
    assert len(heights) == len(ends)
    assert np.diff([y for y, _ in heights]).min() > 10 / 150
    assert [ends[i] for _, i in heights] == sorted(ends)
    assert heights[-1][0] <= 1 + 1e-9
