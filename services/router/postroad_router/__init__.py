"""The router service of postroad: the one address of the model.

A request's life: `api` checks it and `openai_types` reads it -> `template` renders and tokenises the messages ->
`generation.GenerationRequest` -> `dispatch.Dispatcher.generate` picks an engine of `pool`, streams from it through
`engine_client` and, where it fails, goes on from the tokens in `splice` on another one -> `completions` answers.
"""
