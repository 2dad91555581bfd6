"""`align serve-reward`: one reward as a service for runs on other processes and machines."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.console import Console

from align.config import load_config, load_resolved
from align.errors import UserError
from align.train import readable_errors
from align.trainable import check_fixed
from rewards.registry import RewardConfig, build_reward

TOKEN_VARIABLE = "ALIGN_REWARD_TOKEN"


def serve_command(
    reward: Annotated[
        str, typer.Argument(help="a registered reward, FILE.py:NAME, or with --run a name of its config")
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8400,
    host: Annotated[
        str, typer.Option(help="address to listen on; beyond this machine a token is required")
    ] = "127.0.0.1",
    arg: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="an argument of the reward; repeatable")
    ] = None,
    run: Annotated[str | None, typer.Option(help="a run's folder or YAML file whose reward is served")] = None,
    token_env: Annotated[
        str, typer.Option(help="environment variable with the bearer token that requests must carry")
    ] = TOKEN_VARIABLE,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Serve a reward over HTTP, for runs that name it with type: remote. Ctrl-C ends it.

    For example: align serve-reward my_reward.py:score --port 8400
    """
    console = Console()
    with readable_errors(console, debug):
        serve_reward(chosen_reward(reward, arg or [], run), reward, host, port, token_env, console)


def chosen_reward(name: str, arguments: Sequence[str], run: str | None) -> RewardConfig:
    """The reward to serve: of a run's configuration, or by type, each with `arguments` (KEY=VALUE) on top.

    Raises: UserError for an argument without a name or a name that the run does not have.
    """
    settings = RewardConfig(type=name)
    if run is not None:
        resolved = Path(run) / "config.yaml"
        config = load_resolved(resolved) if resolved.is_file() else load_config(run)
        known = {**config.rewards, **config.eval_rewards}
        if name not in known:
            raise UserError(f"{run} has no reward '{name}': it has {', '.join(known)}")
        settings = known[name]
    given: dict[str, Any] = {}
    for text in arguments:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"--arg {text}: give KEY=VALUE")
        try:
            given[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--arg {text}: the value is not valid YAML") from error
    return RewardConfig(settings.type, args={**settings.args, **given}, max_batch=settings.max_batch)


def serve_reward(settings: RewardConfig, name: str, host: str, port: int, token_env: str, console: Console) -> None:
    """Load the reward and answer requests until the process is told to stop.

    Raises: UserError without a token on an address that others reach; RewardError if the reward cannot be loaded or
    served, or the port is taken.
    """
    missing = [package for package in ("fastapi", "uvicorn") if find_spec(package) is None]
    if missing:
        raise UserError(f"serve-reward needs {' and '.join(missing)}: pip install 'flow-align[serve]'")
    from rewards.server import create_app, is_loopback, listen, serve

    token = os.environ.get(token_env, "").strip()
    if not token and not is_loopback(host):
        raise UserError(f"{host} is reached by others: set {token_env} to a secret that requests must carry")
    reward = build_reward(name, settings)
    check_fixed(name, reward)
    listener = listen(host, port)  # before a long load, in case it is taken
    with listener:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with console.status(f"loading {name}"):
            reward.setup(torch.device(device), torch.float32)
        app = create_app(reward, token, device=device)
        name_of_host = socket.gethostname() if host in ("0.0.0.0", "::") else host
        address = f"[{name_of_host}]" if ":" in name_of_host else name_of_host
        url = f"http://{address}:{listener.getsockname()[1]}"
        secret = f", token_env: {token_env}" if token else ""
        console.print(f"serving {name} on {url}", highlight=False, soft_wrap=True)
        console.print(
            f"in a run: {{type: remote, args: {{url: '{url}'{secret}}}}}", highlight=False, soft_wrap=True, markup=False
        )
        serve(app, listener)
