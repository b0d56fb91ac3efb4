"""The submission API: FastAPI over the job store. ``app.create_app`` wires it."""

from scheduler.api.app import create_app

__all__ = ["create_app"]
