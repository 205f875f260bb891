"""A frozen language model as a service: one model, many users, over the protocol that OpenAI's clients speak.

    app.py           the application: its routers, limits on bodies, every error in the protocol's form
    state.py         what all routes share: the model with all that belongs to it, and who asks
    ask.py           router: /ask, a pipeline's answers with their evidence, stage by stage; marks, right or wrong
    page.py          router: the page at /, of page.html, page.css and page.js
    completions.py   router: /v1/completions and /v1/chat/completions
    models.py        router: /v1/models, /v1/artifacts, /tokenize, /v1/word_vectors
    operations.py    router: /healthz, /metrics; logs as JSON lines
    schema.py        what a request may say
    prompts.py       from a request to rows of tokens or vectors; encoder.py makes tokens of texts and chats
    tensors.py       the one door for tensors that users send
    scheduler.py     rows of all users in one batch, step by step; writing.py is one row of it
    keys.py, artifacts.py      who may ask, and what they have registered: on disk
    asking.py        questions of all users, one after the other; told.py says what is told of one; marks.py keeps marks
    listening.py     waiting for news, and for the client to leave
    client.py        `Engine` over HTTP: black-box tuning against this server, or another one
    server.py        `odqa serve`: uvicorn, signals, shutdown

A router is one module with a `router = fastapi.APIRouter()`, named in `app.ROUTERS`. Routes get their user by
`Depends(state.user_of)`, and model, bank, scheduler and pipeline by `Depends(state.service_of)`. What others must not
see needs the former: a route without it is open to all.
"""
