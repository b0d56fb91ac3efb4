"""Calls about devices and workers, and what was used of them."""

from __future__ import annotations

from datetime import date, datetime

from gpuyard.calls.base import Calls
from shared.views import DeviceView, Health, UsageReport, WorkerView


class FleetCalls(Calls):
    def devices(self) -> list[DeviceView]:
        return self._transport.get_list("/v1/devices", DeviceView)

    def workers(self) -> list[WorkerView]:
        return self._transport.get_list("/v1/workers", WorkerView)

    def health(self) -> Health:
        """Whether the service is ready, and which part is not. Asks once.

        Raises:
            Unavailable: nothing answers at all.
        """
        return self._transport.probe("/readyz", Health)

    def usage(
        self,
        *,
        since: datetime | date | str | None = None,
        until: datetime | date | str | None = None,
        group: str | None = None,
    ) -> UsageReport:
        """Devices, rows and tokens that were used from ``since`` to before ``until``; ``group`` is key,
        project or day. Days and times without a zone are those of UTC."""
        period = {
            name: value.isoformat() if isinstance(value, date) else value
            for name, value in (("since", since), ("until", until))
        }
        return self._transport.get("/v1/usage", UsageReport, group=group, **period)
