"""Flower's ServerApp of a federated training: the rounds of `federate` with remote clients."""

from __future__ import annotations

import shlex
from functools import partial

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from app.commands.federate import federate, make_plan
from app.config.fit_keys import FitKeys
from app.federated.flower import flower_training
from app.federated.plan import check_arms


def make_server_app(fit: FitKeys) -> ServerApp:
    """Return Flower's app of the server. The values of `--run-config` are the options of `federate`.

    Args:
        fit: Access to the keys of `fit`.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        values = context.run_config
        plan = make_plan(
            shlex.split(str(values["fit"])),
            [str(values["clients"])],
            int(values["rounds"]),
            int(values["local_steps"]),
            str(values["partition"]),
        )
        arms = check_arms(str(values["arms"]).split(), own_data=False)
        federate(plan, arms, fit, str(values["output"]), partial(flower_training, grid, plan))

    return app
