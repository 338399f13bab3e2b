"""Weights and state of a language model: parameters, state sizes, and the FLOPs of both per token, exact.

FLOPs are those of a forward pass, of one layer and one token unless said otherwise, a multiply-add counting 2; a backward pass takes twice
as many of both kinds, so that ratios hold in training, too. Numbers are integers and Fractions. A mixer is what stands between the
projections of a layer: it has a state, of which `size` tells the numbers, `bytes` the bytes, and `flops` what is computed with it.
"""

from __future__ import annotations

from vidrial.flops.mixers import LSTM, Attention, Degree1, Latent, Mixer, Power, Window, mean_keys, rows
from vidrial.flops.model import CONFIGS, Model, Row, table
from vidrial.flops.parse import parse_lengths, parse_mixer

__all__ = [
    "CONFIGS",
    "LSTM",
    "Attention",
    "Degree1",
    "Latent",
    "Mixer",
    "Model",
    "Power",
    "Row",
    "Window",
    "mean_keys",
    "parse_lengths",
    "parse_mixer",
    "rows",
    "table",
]
