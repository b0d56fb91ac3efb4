"""One rank of one attempt, from the hint to the end of its last process.

The pipeline, in order (``run.py``): claim -> prepare -> launch -> watch -> end the processes ->
flush what they reported -> conclude. Three threads serve it: the attempt's own, which watches the
process and decides; ``LeaseKeeper``, which renews; ``Reporter``, which writes to the store in the
order in which the rank reported, and waits as long as Postgres is away. While a
rank trains, the attempt's own thread makes no store call, so an outage cannot delay its deadline; while
an engine computes, it makes one only to turn to the next page of open shards.
"""
