"""Sessions: conversations whose tokens are kept exactly, turn by turn, as a tree in Redis.

A turn is one generation. `tree` says which turn a request goes on from, by the equivalence of messages; `junction` what
tokens lie between that turn and the next; `store` keeps turns; `session` binds these for one request; `trajectories`
reads a tree back as what the trainer learns from, and `drift` says how far it is from the template's own rendering.
"""
