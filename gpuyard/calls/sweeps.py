"""Calls about sweeps."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpuyard.addresses import at
from gpuyard.calls.files import FileCalls
from gpuyard.references import with_uploads
from gpuyard.transfer import OnBytes
from shared.sweeps import parse_sweep, plan
from shared.views import SweepDetail, SweepView


class SweepCalls(FileCalls):
    def submit_sweep(
        self,
        sweep: Mapping[str, Any],
        *,
        upload: bool = False,
        idempotency_key: str | None = None,
        bases: Sequence[Path] = (),
        on_bytes: OnBytes | None = None,
    ) -> SweepDetail:
        """Submit a sweep: ``spec``, a training, and ``parameters``, the fields that differ.

        Arguments as for ``submit``; a file that ``spec.data`` names is uploaded once for all trials.

        Raises:
            InvalidSpec: before anything is sent; names the trial.
        """
        data = dict(sweep)
        plan(parse_sweep(data))
        if upload:
            spec = with_uploads(data["spec"], lambda path: self._uploaded_id(path, on_bytes), bases)
            data["spec"] = spec
        answer = self._transport.request(
            "POST",
            "/v1/sweeps",
            json=data,
            headers={"Idempotency-Key": idempotency_key or secrets.token_hex(16)},
        )
        return self._transport.read(answer, SweepDetail)

    def sweep(self, id: str) -> SweepDetail:
        """A sweep with its trials, and the best of those that have succeeded."""
        return self._transport.get(at("sweeps", id), SweepDetail)

    def sweeps(self) -> Iterator[SweepView]:
        """All sweeps, newest first."""
        return self._pages("/v1/sweeps", SweepView)

    def cancel_sweep(self, id: str) -> SweepDetail:
        """Cancel every trial that is not over."""
        answer = self._transport.request("POST", at("sweeps", id, "cancel"))
        return self._transport.read(answer, SweepDetail)
