"""What publisher and workers agree on about the broker. A plain dict: Celery is not imported here.

The broker is a doorbell. Every setting below follows from that: nothing is acknowledged late, kept,
retried or scheduled by Celery, because Postgres does all of it.
"""

from __future__ import annotations

from typing import Any

from shared.settings import Settings

_TEN_YEARS = 10 * 365 * 86_400


def celery_config(settings: Settings) -> dict[str, Any]:
    """Celery settings of both sides. The one task is ``shared.messages.RUN_TASK``; it is called with
    the fields of ``shared.messages.Hint`` as keyword arguments, and its id is ``Hint.task_id``."""
    return {
        "broker_url": broker_url(settings),
        "broker_connection_timeout": 4,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,  # for ever: workers outlive any outage
        "broker_transport_options": {
            # Hints are acknowledged on arrival, so nothing is left to be redelivered; and should
            # something be, it must not start a second run of a job that lasts a week.
            "visibility_timeout": _TEN_YEARS,
            # Without a timeout a publish on a dead connection hangs for ever.
            "socket_timeout": 30,
            "socket_connect_timeout": 4,
            "socket_keepalive": True,
            "health_check_interval": 25,
        },
        "accept_content": ["json"],
        "task_serializer": "json",
        "event_serializer": "json",
        "result_backend": None,
        "task_ignore_result": True,
        "task_publish_retry": False,  # the outbox is the retry
        "task_acks_late": False,
        "task_reject_on_worker_lost": False,
        "task_default_queue": "gpuyard.unrouted",
        "worker_prefetch_multiplier": 1,
        # A prefetched hint would wait behind a running job and find its attempt taken back.
        "worker_disable_prefetch": True,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        # What Flower shows.
        "worker_send_task_events": True,
        # No event when a hint is sent: Celery calls the task `gpuyard.run` in it, not by its legible
        # name, and a hint that is sent again would rename a task that has long begun.
        "task_send_sent_event": False,
        "task_track_started": True,
        "event_queue_ttl": 60,
        "event_queue_expires": 600,
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "timezone": "UTC",
        "enable_utc": True,
    }


def broker_url(settings: Settings) -> str:
    """In Celery's spelling: a socket is ``redis+socket://`` there and ``unix://`` in redis-py."""
    url = settings.broker_url
    return "redis+socket://" + url.removeprefix("unix://") if url.startswith("unix://") else url
