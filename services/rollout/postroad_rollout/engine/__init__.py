"""The embedded inference engine: a small one on torch that speaks SGLang's HTTP contract.

A request's life: `app` checks it and builds `request.Request` -> `engine.Engine.submit` (bounded queue) -> `scheduler`
gives it a cache slot (`cache`, with prefix reuse) and packs its tokens with everybody else's into one `model.forward`
-> `sampling` draws the next token -> `app` answers. `weights` holds the served and the staged parameters.
Left out on purpose: paged KV, tensor parallelism, speculative decoding, LoRA, grammars: those are SGLang's.
"""
