"""Completions over HTTP with the server of ``transformers serve``.

Its public classes are reused, with a few public methods overridden:

- The original server loads a model on request, by path or hub name, and looks up its class in the transformers module,
  which lacks model 2's. Here models are loaded before the server starts, and a request chooses among them.
- Requests that the original would answer with a server error, or not honour, are rejected first.
- The original uses one thread per model and seeds torch when a request arrives. Here all models share one thread, and
  the seed is set when the request is processed. (Its paged batching would be faster for many concurrent clients, but it
  uses the first request's temperature for all, and model 2's attention does not support a paged cache.)
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
    """Schema of a request; null means absent. The last fields accept only their default, which some clients send."""

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
    """Loaded models by the name used in requests."""

    def __init__(self, models: Mapping[str, tuple[Any, Any]]) -> None:
        super().__init__(model_timeout=-1)
        self.models, self.started = models, int(time.time())
        for model, tokenizer in models.values():
            # By default transformers decodes greedily and limits sampling to the 50 most likely tokens.
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
    """One generation thread for all models, as they share torch's global random generator."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = GenerateManager()

    def get_manager(self, model_id: str, use_cb: bool = False) -> GenerateManager:
        return self.thread


class CheckedCompletions(CompletionHandler):
    """Validates requests and completes them one at a time."""

    def __init__(self, models: LoadedModels, state: OneThread) -> None:
        super().__init__(models, state)
        self.models, self.thread, self.turn = models.models, state.thread, asyncio.Lock()

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Return the answer as JSON or as a stream.

        Raises:
            HTTPException: 400 listing every problem with the request; 404 for an unknown model.
        """
        request = self.checked({name: value for name, value in body.items() if value is not None})
        async with self.turn:
            await self.thread.async_submit(lambda: None)  # waits for the previous stream to finish
            return await super().handle_request(request, request_id)

    def checked(self, body: dict[str, Any]) -> dict[str, Any]:
        """Validate a request; return the fields that the handler reads, with ``max_tokens`` capped to the context."""
        try:
            request = CompletionRequest.model_validate(body)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, item['loc'][:1]))}: {item['msg']}" for item in error.errors()]
            raise HTTPException(400, "; ".join(dict.fromkeys(problems))) from None
        if request.model not in self.models:
            raise HTTPException(404, f"no model {request.model[:100]!a}; available: {', '.join(self.models)}")
        model, tokenizer = self.models[request.model]
        length, context = len(prompt_ids(tokenizer, request.prompt)), context_of(model)
        if length >= context:
            raise HTTPException(
                400,
                f"prompt: {length:,} tokens including the start token; the model's context is {context:,}: use a "
                "shorter prompt",
            )
        fields = request.model_dump(exclude={"user", "n", "best_of", "echo", "presence_penalty"}, exclude_none=True)
        return fields | {"max_tokens": min(request.max_tokens, context - length)}


def completions_app(models: Mapping[str, tuple[Any, Any]]) -> FastAPI:
    """Build the application that serves ``models``: name to (model, tokenizer)."""
    manager, state = LoadedModels(models), OneThread()
    unused: Any = None  # handlers of chat, transcription, …, whose routes are removed below
    app = build_server(manager, unused, CheckedCompletions(manager, state), unused, unused, unused, state)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in PATHS]

    @app.exception_handler(AnyHTTPException)
    async def refused(_: Any, error: AnyHTTPException) -> JSONResponse:
        message = f"{error.detail}; available: {', '.join(PATHS)}" if error.detail == "Not Found" else error.detail
        return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, error.status_code)

    @app.exception_handler(RequestValidationError)
    async def no_json(_: Any, error: RequestValidationError) -> JSONResponse:
        message = "the body must be a JSON object, sent as application/json"
        return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, 400)

    return app
