"""``mirage demo``."""

from __future__ import annotations

from pathlib import Path

import click

from mirage.commands.common import require

__all__ = ["demo"]


@click.command()
@click.option("--weights", multiple=True, metavar="FILE|NAME",
              help="Checkpoint, or the name of weights that come with the package; may be repeated.  "
              "[default: all that come with the package]")  # fmt: skip
@click.option("--port", default=7860, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--max-pixels", default=50_000_000, show_default=True, type=click.IntRange(min=1), help="Of a picture.")
@click.option("--max-megabytes", default=100, show_default=True, type=click.IntRange(min=1), help="Of its file.")
@click.option("--open/--no-open", "open_browser", default=False, help="Open the page in the browser.")
def demo(weights, port, device, max_pixels, max_megabytes, open_browser):
    """Serve a page to restore pictures with, on this machine alone: drop one, compare, download the result.

    The page listens on 127.0.0.1, shares nothing and reports nothing; its pictures are removed when it ends.
    """
    import signal
    import sys

    require("demo", "gradio")
    from mirage.demo import Limits, Studio, serve
    from mirage.restore import packaged_weights, resolve_weights

    try:
        found = {Path(one).name: resolve_weights(one) for one in weights or packaged_weights()}
    except FileNotFoundError as error:
        raise click.ClickException(str(error)) from error
    missing = [str(path) for path in found.values() if not path.is_file()]
    if missing or not found:
        what = (
            f"no such file: {', '.join(missing)}" if missing else "no weights come with this package; name a checkpoint"
        )
        raise click.ClickException(f"--weights: {what}")
    studio = Studio(found, Limits(max_pixels, max_megabytes << 20), {"device": device})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that pictures are removed then, too
    try:
        page = serve(studio, port=port or None, open_browser=open_browser, block=False)
    except OSError as error:
        raise click.ClickException(f"--port: {error}") from error
    try:
        click.echo(f"open {page.local_url} in a browser; Ctrl-C ends it")
        page.block_thread()
    finally:
        page.close()
