"""Trajectories on disk: written durably, read back, and checked from the record alone."""

from midstream.records.certificate import verify
from midstream.records.schema import SCHEMA, Record
from midstream.records.store import RecordWriter, read_records
from midstream.records.violations import Violation

__all__ = ["SCHEMA", "Record", "RecordWriter", "Violation", "read_records", "verify"]
