"""The rollout worker: takes tasks, runs the members of a group at the same time, publishes each as it ends.

A task's life: `service` takes it from TASKS -> `group.GroupRunner` finds out which members are missing and runs an
agent of `agents` for each -> the agent calls the model through `model_client` -> the trajectory is published -> the task
is acknowledged when all of them are.
"""
