"""What Ray's clusters are told on a machine that does much else."""

from __future__ import annotations

PATIENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # what else this machine does is no reason to kill a worker
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_gcs_server_request_timeout_seconds": "300",
}
"""Ray takes a machine that is merely busy for a broken one, unless it is told to wait."""
