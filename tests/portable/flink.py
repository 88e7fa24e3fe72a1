"""What only Flink's own REST API can do: cancel a job, stop it with a savepoint, say where its checkpoints are."""

from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path
from typing import Any


class Cluster:
    """A session cluster on this machine."""

    def __init__(self, address: str) -> None:
        self._url = f"http://{address}"

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self._url}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return dict(json.loads(answer.read() or b"{}"))

    def running_jobs(self) -> set[str]:
        return {job["jid"] for job in self._call("GET", "/jobs/overview")["jobs"] if job["state"] == "RUNNING"}

    def last_checkpoint(self, job_id: str) -> tuple[int, str] | None:
        """Return the number and the path of the last one that was completed."""
        last = self._call("GET", f"/jobs/{job_id}/checkpoints")["latest"]["completed"]
        return None if last is None else (int(last["id"]), str(last["external_path"]))

    def cancel(self, job_id: str) -> None:
        self._call("PATCH", f"/jobs/{job_id}?mode=cancel")
        self._wait_until_gone(job_id)

    def stop_with_savepoint(self, job_id: str, directory: Path) -> str:
        """Stop without drain, which never completes; return the savepoint's path."""
        trigger = self._call("POST", f"/jobs/{job_id}/stop", {"targetDirectory": f"file://{directory}", "drain": False})
        deadline = time.monotonic() + 60
        while True:
            told = self._call("GET", f"/jobs/{job_id}/savepoints/{trigger['request-id']}")
            if told["status"]["id"] == "COMPLETED":
                assert "failure-cause" not in told["operation"], told["operation"]["failure-cause"]
                self._wait_until_gone(job_id)
                return str(told["operation"]["location"])
            assert time.monotonic() < deadline, f"no savepoint after 60 s: {told}"
            time.sleep(0.1)

    def _wait_until_gone(self, job_id: str) -> None:
        deadline = time.monotonic() + 60
        while job_id in self.running_jobs():
            assert time.monotonic() < deadline, f"job {job_id} still runs after 60 s"
            time.sleep(0.1)
