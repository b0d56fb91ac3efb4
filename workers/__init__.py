"""The doing side: Celery workers, leases, supervision of rank processes, and the torch code in ``ranks``."""
