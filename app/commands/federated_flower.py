"""The server of a federated training as a Flower ServerApp: the rounds of `federate` with clients elsewhere."""

from __future__ import annotations

import shlex
from functools import partial

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from app.commands.federate import federate, make_plan
from app.config.fit_keys import ParseFit
from app.federated.flower import over_flower
from app.federated.plan import check_arms


def make_server_app(parse: ParseFit) -> ServerApp:
    """Return the app of the server. The values of the run (`--run-config`) are the options of `federate`.

    Args:
        parse: Parser of `fit`.
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
        federate(plan, arms, parse, str(values["output"]), partial(over_flower, grid, plan))

    return app
