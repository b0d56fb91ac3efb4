"""Bare Celery: a task that counts itself, and how many of them a second two workers do."""

from __future__ import annotations

import os
import sys
import time

import redis
from celery import Celery

URL = os.environ.get("BENCH_BROKER_URL", "redis://127.0.0.1:6379/9")
DONE = "bench-done"

app = Celery("bench", broker=URL)
app.conf.update(task_ignore_result=True, worker_hijack_root_logger=False)


@app.task(name="bench.work")  # type: ignore[untyped-decorator]
def work() -> None:
    with app.connection_for_write().channel() as channel:
        channel.client.incr(DONE)


def main(count: int) -> None:
    """Publish, wait for all, print tasks per second."""
    with redis.Redis.from_url(URL) as broker:
        broker.delete(DONE)
        work.delay()
        while int(broker.get(DONE) or 0) < 1:  # a worker is up
            time.sleep(0.01)
        broker.set(DONE, 0)
        began = time.perf_counter()
        for _ in range(count):
            work.delay()
        while int(broker.get(DONE) or 0) < count:
            time.sleep(0.005)
        print(count / (time.perf_counter() - began))


if __name__ == "__main__":
    main(int(sys.argv[1]))
