"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from server.openapi import operation
from server.protocol.responses import ModelCard, ModelList, encode
from server.service import Service, service_of

router = APIRouter(tags=["models"])


@router.get("/v1/models", **operation(None, ModelList, (401,)))
async def list_models(request: Request) -> Response:
    """The joint model, and each member alone."""
    service = service_of(request)
    cards = [_card(service, name) for name in service.models.names]
    return Response(encode(ModelList("list", cards)), media_type="application/json")


@router.get("/v1/models/{id:path}", **operation(None, ModelCard, (401, 404)))
async def get_model(request: Request, model_id: Annotated[str, Path(alias="id")]) -> Response:
    """One model; the id of a member has a slash."""
    service = service_of(request)
    service.models.member(model_id)
    return Response(encode(_card(service, model_id)), media_type="application/json")


def _card(service: Service, name: str) -> ModelCard:
    engine = service.started_engine
    card = ModelCard(
        id=name,
        object="model",
        created=service.created,
        owned_by="collm",
        parent=service.models.parent(name),
        max_model_len=None if engine is None else engine.info.max_model_len,
    )
    if service.models.member(name) is None:
        card.chat = service.chat_template is not None
        card.example_prompt = service.settings.example_prompt
        if engine is not None:
            card.collaboration = service.models.served(engine.info)
    return card
