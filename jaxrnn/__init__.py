"""Recurrent networks for JAX: write the naive step, run the expert's loop."""

from jaxrnn import cells
from jaxrnn._bidirectional import bidirectional
from jaxrnn._explain import explain, explain_scan
from jaxrnn._rnn import rnn
from jaxrnn._scan import scan

__version__ = "0.1.0"

__all__ = ["bidirectional", "cells", "explain", "explain_scan", "rnn", "scan"]
