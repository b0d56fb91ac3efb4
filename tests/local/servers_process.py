"""A process that owns both servers: ``python servers_process.py FOLDER [thread]``.

Prints their process ids as JSON once both answer, and then stays. ``thread``: starts them from
another thread than the main one, so that they get no death signal and outlive a SIGKILL.
"""

import json
import sys
import threading
import time
from pathlib import Path

from gpuyard.local.servers import PostgresServer, ValkeyServer


def main() -> None:
    data = Path(sys.argv[1])
    servers = [PostgresServer(data, fsync=False), ValkeyServer(data)]

    def start() -> None:
        for server in servers:
            server.start()

    if sys.argv[2:] == ["thread"]:
        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
    else:
        start()
    print(json.dumps({server.name: server.pid for server in servers}), flush=True)
    if sys.argv[2:] == ["stop"]:
        for server in servers:
            server.stop()
        return
    time.sleep(600)


if __name__ == "__main__":
    main()
