"""Flower's options file (``--conf``), a Python file that Flower executes. All values come from the
environment that ``gpuyard.local.flower`` has checked."""

import os

# The password is no command line argument, as everybody on the host can read those.
basic_auth = [f"{os.environ['GPUYARD_FLOWER_USER']}:{os.environ['GPUYARD_FLOWER_PASSWORD']}"]
max_tasks = 5_000
persistent = True
db = os.environ["GPUYARD_FLOWER_DB"]
state_save_interval = 10_000  # milliseconds
# A worker that was killed would be shown as online for ever; seconds.
purge_offline_workers = 600
tasks_columns = "name,args,state,received,started,runtime,worker"
# Seconds: jobs last from a moment to days. The defaults end at ten seconds.
task_runtime_metric_buckets = [
    *(1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3_600.0, 10_800.0),
    *(21_600.0, 43_200.0, 86_400.0, 259_200.0, 604_800.0, float("inf")),
]
