"""``python -m workers.serve``: the worker process of one device, started by the host manager.

A module of its own, because one that is run as ``__main__`` and imported under its name exists
twice, and with it every command that it registers with Celery.
"""

import sys

from workers.celery_app import main

if __name__ == "__main__":
    sys.exit(main())
