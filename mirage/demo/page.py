"""The page, in Gradio, and its server on this machine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mirage.demo.session import MODES, Refused, Studio
from mirage.extras import not_there

__all__ = ["build", "serve"]

HOST = "127.0.0.1"
WAITING = 8
"""Requests that wait while one picture is being restored; more are turned away."""

KEPT = 3600
"""Seconds after which a picture is removed from the server's folder while it runs."""

CSS = """
footer { display: none !important; }
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; }
"""


def build(studio: Studio, folder: str | Path) -> Any:
    """The page as a ``gradio.Blocks``; results are written into ``folder``, and removed after an hour."""
    gr = _gradio()
    limits = studio.limits

    with gr.Blocks(title="MIRAGE", analytics_enabled=False, delete_cache=(60, KEPT)) as page:
        gr.Markdown(
            "# MIRAGE: restore a picture\n"
            f"Nothing leaves this machine. Up to {limits.pixels / 1e6:g} million pixels and {limits.bytes / 1e6:g} MB."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                # no file_types: what is no picture gets a sentence that says why, not the browser's silence
                picture = gr.File(label="Picture", type="filepath", elem_id="picture", height=140)
                weights = gr.Dropdown(list(studio.weights), label="Weights", elem_id="weights")
                modes = [(MODES.get(mode, mode), mode) for mode in studio.modes]
                mode = gr.Radio(modes, value=studio.modes[0], label="Mode", elem_id="mode")
                button = gr.Button("Restore", variant="primary", elem_id="restore")
            with gr.Column(scale=3):
                slider = gr.ImageSlider(
                    label="Before and after",
                    format="png",
                    interactive=False,
                    elem_id="slider",
                    max_height=640,
                    buttons=["fullscreen"],  # its own download has the preview
                )
                report = gr.Markdown(elem_id="report")
                download = gr.DownloadButton(
                    "Download the result in full", interactive=False, elem_id="download", size="md"
                )

        def clear() -> tuple[None, str, Any]:
            return None, "", gr.update(value=None, interactive=False)

        picture.change(clear, None, [slider, report, download], queue=False, show_progress="hidden")
        button.click(_handler(gr, studio, Path(folder)), [picture, weights, mode], [slider, report, download],
                     concurrency_limit=1, api_name=False)  # fmt: skip
    return page.queue(default_concurrency_limit=1, max_size=WAITING, api_open=False)


def _handler(gr: Any, studio: Studio, folder: Path) -> Callable[..., Any]:
    def restore(path: str | None, weights: str, mode: str) -> tuple[Any, str, Any]:
        if not path:
            raise gr.Error("Drop a picture first.", print_exception=False)
        try:
            done = studio.restore(path, weights, mode)
        except Refused as error:
            raise gr.Error(str(error), duration=None, title="Not restored", print_exception=False) from error
        target = Path(tempfile.mkdtemp(dir=folder)) / done.name
        target.write_bytes(done.data)
        text = (
            f"{done.width} x {done.height} pixels in {done.seconds:.2g} s; the file has {len(done.data) / 1e3:,.0f} kB."
        )
        text += "".join(f"\n\nNote: {note}" for note in done.notes)
        return (done.before, done.after), text, gr.update(value=str(target), interactive=True)

    return restore


def serve(studio: Studio, *, port: int | None = 7860, open_browser: bool = False, block: bool = True) -> Any:
    """Serve the page on 127.0.0.1.

    Args:
        port: to listen on; None takes a free one.
        open_browser: also open it there.
        block: until Ctrl-C; else return the running page, whose ``close()`` stops it and removes its pictures.

    Returns:
        The ``gradio.Blocks``; ``local_url`` is its address.

    Raises:
        ImportError: Gradio is missing.
        OSError: the port is taken.
    """
    gr = _gradio()
    folder = tempfile.TemporaryDirectory(prefix="mirage-demo-")
    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = folder.name  # where uploads and previews go
    fonts = ["system-ui", "sans-serif"]  # the themes' own are fetched from elsewhere
    theme = gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])
    page = build(studio, folder.name)
    stop = page.close

    def close(*arguments: Any, **options: Any) -> None:
        stop(*arguments, **options)
        folder.cleanup()
        os.environ.pop("GRADIO_TEMP_DIR", None)
        if before is not None:
            os.environ["GRADIO_TEMP_DIR"] = before

    page.close = close
    try:
        page.launch(
            server_name=HOST, server_port=port, share=False, inbrowser=open_browser, prevent_thread_lock=True,
            quiet=True, show_error=True, ssr_mode=False, mcp_server=False, enable_monitoring=False, pwa=False,
            max_file_size=studio.limits.bytes, theme=theme, css=CSS, footer_links=[],
        )  # fmt: skip
        if block:
            page.block_thread()
    finally:
        if block or not getattr(page, "is_running", False):
            page.close()
    return page


def _gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported and when a page is built
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    missing = not_there("demo", "gradio")
    if missing is not None:
        raise ImportError(missing)
    import gradio

    return gradio
