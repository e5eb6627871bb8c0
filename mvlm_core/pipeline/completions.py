"""Completions of loaded models over HTTP, by the server of ``transformers serve``.

That server's public classes are used as they are, and a few of their public methods replaced:

- It loads a model when a request names it, by path or hub name, and looks its class up in the transformers module,
  where model 2's is not. Here models are loaded before it starts, and a request chooses among them.
- What it would answer with a server error, or not do as asked, is refused before it gets that far.
- It has a thread for each model and seeds torch when a request comes in. Here all models share one thread, and a
  request's seed is set when its turn has come. (Its paged batches would be quicker for many clients at once, but they
  take the first request's temperature for all, and model 2's attention cannot read a paged cache.)
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException as AnyHTTPException
from tokenizers.processors import TemplateProcessing
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerateManager, GenerationState

from mvlm_core.evaluation.bits_per_byte import context_of
from mvlm_core.evaluation.generation import prompt_ids

PATHS = ("/v1/completions", "/v1/models", "/health")
Stop = Annotated[str, Field(min_length=1, max_length=100)]


class CompletionRequest(BaseModel):
    """What a request may hold; what is null counts as not there. The last ones have but the value that changes
    nothing, which some clients send."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    prompt: str = Field("", max_length=1 << 20)
    max_tokens: int = Field(16, ge=1)  # OpenAI's default
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    frequency_penalty: float = Field(0.0, ge=0, le=2)
    seed: int = Field(default_factory=lambda: secrets.randbits(63), ge=0, lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(min_length=1, max_length=4)] | None = None
    suffix: str | None = None
    stream: bool = False
    user: str = ""
    n: Literal[1] = 1
    best_of: Literal[1] = 1
    echo: Literal[False] = False
    presence_penalty: Literal[0] = 0


class LoadedModels(ModelManager):
    """Models by the name under which requests ask for them."""

    def __init__(self, models: Mapping[str, tuple[Any, Any]]) -> None:
        super().__init__(model_timeout=-1)
        self.models, self.started = models, int(time.time())
        for model, tokenizer in models.values():
            # transformers' default is greedy decoding among the 50 likeliest tokens, whatever the temperature.
            model.generation_config.update(do_sample=True, top_k=0)
            start = tokenizer.bos_token
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single=f"{start} $A", special_tokens=[(start, tokenizer.bos_token_id)]
            )

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def load_model_and_processor(self, model_id_and_revision: str, *_: Any, **__: Any) -> tuple[Any, Any]:
        return self.models[model_id_and_revision]

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]
        return [{"id": name, "object": "model", "created": self.started, "owned_by": "local"} for name in self.models]


class OneThread(GenerationState):
    """One generation thread for all models: torch has one random generator for all."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = GenerateManager()

    def get_manager(self, model_id: str, use_cb: bool = False) -> GenerateManager:
        return self.thread


class CheckedCompletions(CompletionHandler):
    """Completions of requests that are known to be good, one at a time."""

    def __init__(self, models: LoadedModels, state: OneThread) -> None:
        super().__init__(models, state)
        self.models, self.thread, self.turn = models.models, state.thread, asyncio.Lock()

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """The answer, as JSON or as a stream.

        Raises:
            HTTPException: 400, every problem with the request named; 404 for a model that is not here.
        """
        request = self.checked({name: value for name, value in body.items() if value is not None})
        async with self.turn:
            await self.thread.async_submit(lambda: None)  # done when the stream before it is written
            return await super().handle_request(request, request_id)

    def checked(self, body: dict[str, Any]) -> dict[str, Any]:
        """The fields that the handler reads, ``max_tokens`` cut to what the context leaves."""
        try:
            request = CompletionRequest.model_validate(body)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, item['loc'][:1]))}: {item['msg']}" for item in error.errors()]
            raise HTTPException(400, "; ".join(dict.fromkeys(problems))) from None
        if request.model not in self.models:
            raise HTTPException(404, f"no model {request.model[:100]!a}; there are: {', '.join(self.models)}")
        model, tokenizer = self.models[request.model]
        length, context = len(prompt_ids(tokenizer, request.prompt)), context_of(model)
        if length >= context:
            raise HTTPException(
                400, f"prompt: {length:,} tokens with the start token; the model reads {context:,} at once"
            )
        known = request.model_dump(exclude={"user", "n", "best_of", "echo", "presence_penalty"}, exclude_none=True)
        return known | {"max_tokens": min(request.max_tokens, context - length)}


def completions_app(models: Mapping[str, tuple[Any, Any]]) -> FastAPI:
    """Build the application that serves ``models``: name to (model, tokenizer)."""
    manager, state = LoadedModels(models), OneThread()
    unused: Any = None  # handlers of chat, transcription, …, whose routes are removed below
    app = build_server(manager, unused, CheckedCompletions(manager, state), unused, unused, unused, state)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in PATHS]

    @app.exception_handler(AnyHTTPException)
    async def refused(_: Any, error: AnyHTTPException) -> JSONResponse:
        message = f"{error.detail}: {', '.join(PATHS)}" if error.detail == "Not Found" else error.detail
        return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, error.status_code)

    @app.exception_handler(RequestValidationError)
    async def no_json(_: Any, error: RequestValidationError) -> JSONResponse:
        message = "the body must be a JSON object, sent as application/json"
        return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, 400)

    return app
