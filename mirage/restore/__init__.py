"""Restore images with a trained network: arrays, files and folders, at any size.

The network takes RGB in [0, 1] whose sides are multiples of 8. Here images of any size are padded on the right and at
the bottom and cropped back, grey images are fed as three equal channels and come back as their mean, and an alpha
channel is copied through untouched. Colours where alpha is 0 nobody sees, so they are copied too, and the network gets
in their place what its neighbours have: no hidden colour reaches a visible pixel. An RGB file with R = G = B is an RGB
image like any other, which the network may tint; save it as grey for a grey result.

`Restorer` is what to use. What needs the extra ``images`` is imported when it is first asked for.
"""

from __future__ import annotations

from mirage.lazy import lazily

_PLACES = {
    "Restorer": "restorer",
    "load_model": "loading",
    "packaged_features": "loading",
    "packaged_weights": "loading",
    "resolve_weights": "loading",
    "fill_hidden": "pixels",
    "pad_to_multiple": "pixels",
    "restore_array": "pixels",
    "needed_memory": "budget",
    "Job": "files",
    "Outcome": "files",
    "collect_jobs": "files",
    "restore_files": "files",
}

__all__ = [
    "Job",
    "Outcome",
    "Restorer",
    "collect_jobs",
    "fill_hidden",
    "load_model",
    "needed_memory",
    "packaged_features",
    "packaged_weights",
    "pad_to_multiple",
    "resolve_weights",
    "restore_array",
    "restore_files",
]


__getattr__, __dir__ = lazily(__name__, _PLACES)
