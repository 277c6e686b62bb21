"""gunicorn with metrics that are right under several workers.

    pip install gunicorn uvicorn-worker
    gunicorn -c examples/workers/gunicorn_conf.py --chdir examples/workers app:app

Each of the workers tells what all of them have counted, also those that were killed or replaced.
"""

import atexit
import os
import shutil
import tempfile

from uvicorn_worker import UvicornWorker

workers = 4
bind = "127.0.0.1:8000"


class SeawallWorker(UvicornWorker):
    """uvicorn, which leaves the address of whoever is connected as it is: by that Seawall knows whom to believe."""

    CONFIG_KWARGS = {**UvicornWorker.CONFIG_KWARGS, "proxy_headers": False}  # noqa: RUF012


worker_class = SeawallWorker

# Where the workers keep what they count. In memory, where there is such a place: no request has to wait for a disk.
# Name a directory yourself where workers are another user's (`user = ...`), who must be able to write there.
if "SEAWALL_METRICS_DIR" not in os.environ:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    os.environ["SEAWALL_METRICS_DIR"] = directory = tempfile.mkdtemp(prefix="seawall-metrics-", dir=memory)

    def remove(master: int = os.getpid()) -> None:
        if os.getpid() == master:  # the workers are copies of it
            shutil.rmtree(directory, ignore_errors=True)

    atexit.register(remove)
