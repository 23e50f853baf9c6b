"""The router service of postroad: the one address of the model.

A request's life: `access` knows whose it is and which session it names -> `api` reads it within bounds and, for
Anthropic's API and OpenAI's Responses, translates it to a chat request -> `exchange` makes its prompt in tokens: rendered
anew, or appended to what its session knows (`sessions`) -> `generation.GenerationRequest` -> `dispatch.Dispatcher`
generates on an engine that `routing` picks, and goes on from the tokens in `splice` on another where it fails -> each
`choice` makes reasoning, text and tool calls of the tokens (`parsers`, by the model's row in `families`) -> the turn is
recorded -> `completions`, `messages_api` or `responses_api` answer.
"""
