"""The weight plane: snapshots that a trainer freezes, manifests in Redis, and pullers that verify what they read."""

from postroad.weights.manifest import Manifest, Part, TensorEntry
from postroad.weights.protocol import WeightsError
from postroad.weights.publisher import Holder, Publisher
from postroad.weights.puller import Puller
from postroad.weights.snapshot import Shard, Snapshot

__all__ = ["Holder", "Manifest", "Part", "Publisher", "Puller", "Shard", "Snapshot", "TensorEntry", "WeightsError"]
