"""All studies of a store in the browser: `saeopt dashboard`."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from saeopt.options import Storage, new_app

app = new_app()


@app.command()
def dashboard(
    host: Annotated[str, typer.Option(envvar="DASHBOARD_ADDRESS", metavar="ADDRESS", help="Who may reach it.")] = (
        "127.0.0.1"
    ),
    port: Annotated[
        int, typer.Option(envvar="DASHBOARD_PORT", metavar="N", min=0, max=65535, help="0: any free one.")
    ] = 8080,
    storage: Storage = None,
) -> None:
    """Show all studies of a store in the browser.

    Serves optuna-dashboard with all their artifacts until Ctrl-C. It asks for no password and lets whoever reaches
    it delete studies: keep it on this host.
    """
    from saeopt.console import console, set_up_logging
    from saeopt.trials.storage import Store
    from saeopt.views.dashboard import server

    set_up_logging()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    store = Store.open(storage, create=False)
    with server(store, host, port) as serving:
        names = store.study_names()
        console.print(f"{len(names)} stud{'y' if len(names) == 1 else 'ies'} of {store.shown}", markup=False)
        console.print(f"dashboard: http://{host}:{serving.server_port}/ (Ctrl-C ends it)", markup=False)
        sys.stdout.flush()
        serving.serve_forever()
