"""The rollout service of postroad: the embedded inference engine and the rollout worker."""
