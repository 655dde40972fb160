"""What a network's features look like: ``mirage analyze``.

The quantities of the paper's Figures 3 to 6 (arXiv 2505.18679), of any weights on any images: `collect` runs the
network and gathers them, `draw` writes them as pictures and tables.
"""

from __future__ import annotations

from mirage.analyze.collect import Analysis, analyze
from mirage.analyze.spectra import Moments, Spectrum

__all__ = ["Analysis", "Moments", "Spectrum", "analyze"]
