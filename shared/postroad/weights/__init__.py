"""The weight plane: snapshots that a trainer freezes, manifests in Redis, and pullers that verify what they read."""

from postroad.weights.manifest import Manifest, TensorEntry, WeightsError
from postroad.weights.publisher import Publisher
from postroad.weights.puller import Puller
from postroad.weights.snapshot import Snapshot

__all__ = ["Manifest", "Publisher", "Puller", "Snapshot", "TensorEntry", "WeightsError"]
