"""Flower app of a federated training: server and clients. docs/federated.md describes its use."""

from __future__ import annotations

from collections.abc import Iterator

from flwr.app import Context

from app.cli import FIT_KEYS, restricted_imports
from app.commands.federated_flower import make_server_app
from app.config.yaml_files import checked_yaml
from app.console import console_logging, quiet_libraries
from app.federated.flower import make_client_app

# Flower searches the source for these two names, without an import.
server_app = make_server_app(FIT_KEYS)
client_app = make_client_app(FIT_KEYS.parse)


@server_app.lifespan()
@client_app.lifespan()
def set_up_process(context: Context) -> Iterator[None]:
    """Set up logging, restrict imports and check YAML, as `main.py` does."""
    quiet_libraries()
    with console_logging(), restricted_imports(), checked_yaml():
        yield
