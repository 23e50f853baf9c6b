"""Tools that agents call while they attempt a prompt, asked for by NATS request and reply.

A call's life: `service` takes it -> finds the `base.Tool` of that name -> validates its arguments -> runs it within its
deadline -> replies with a typed status (postroad.messages.ToolStatus). `python`, `search`, `functions` and `mcp_servers`
make tools, one file per kind of the recipe's section `tools`.
"""
