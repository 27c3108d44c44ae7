"""`trl-unigrpo serve-rewards`."""

from dataclasses import dataclass
from typing import Annotated

import typer

from .options import told_in_a_line


@dataclass(frozen=True)
class ServeOptions:
    """Arguments and options of `trl-unigrpo serve-rewards`."""

    rewards: Annotated[list[str], typer.Argument(help="Rewards as module:NAME, such as my_rewards:redness.")]
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine's.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free one.")] = 8000
    token_env: Annotated[
        str | None, typer.Option(help="Environment variable with the token; needed unless the host is 127.0.0.1.")
    ] = None
    max_images: Annotated[int, typer.Option(min=1, help="Images in a request.")] = 64
    max_body_mb: Annotated[int, typer.Option(min=1, help="Size of a request, in MiB.")] = 256
    max_pixels: Annotated[int, typer.Option(min=1, help="Width x height of an image.")] = 2048 * 2048


def serve_command(options: ServeOptions) -> None:
    """Serve reward functions over HTTP, for trl_unigrpo.rewards.RemoteReward."""
    with told_in_a_line("serve-rewards", ImportError, ValueError):
        from ..rewards.remote.server import Limits, serve

        limits = Limits(options.max_images, options.max_body_mb * 2**20, options.max_pixels)
        serve(options.rewards, options.host, options.port, options.token_env, limits)
