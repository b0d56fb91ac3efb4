"""Devices and the processes that serve them."""

from __future__ import annotations

from fastapi import APIRouter

from scheduler.api.context import ContextDep
from scheduler.api.views import device_view, worker_view
from shared.store import read
from shared.views import DeviceView, Page, WorkerView

router = APIRouter(tags=["fleet"])


@router.get("/devices", summary="List devices")
def list_devices(context: ContextDep) -> Page[DeviceView]:
    """What each can do, holds warm and runs."""
    rows = context.store.call(read.list_devices)
    return Page(items=[device_view(row, context.settings.device_timeout) for row in rows])


@router.get("/workers", summary="List workers")
def list_workers(context: ContextDep) -> Page[WorkerView]:
    """The process that serves each device now, or served it last."""
    rows = context.store.call(read.list_devices)
    return Page(items=[worker_view(row.worker) for row in rows])
