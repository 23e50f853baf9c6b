"""Metadata in Redis: compare-and-set documents, leases with fencing tokens, registries that forget the dead."""

from postroad.store.store import Lease, LeaseLost, Store, StoreConflict, StoreError

__all__ = ["Lease", "LeaseLost", "Store", "StoreConflict", "StoreError"]
