"""POST /tokenize and /detokenize. Knows their JSON; text and ids are the tokenizer's."""

from typing import Any

from aiohttp import web

from jaxinfer.errors import RequestError
from jaxinfer.server import messages
from jaxinfer.server.answer import json_response
from jaxinfer.server.body import parse, read_json
from jaxinfer.server.generation import encode
from jaxinfer.server.protocol import DetokenizeRequest, TokenizeRequest
from jaxinfer.server.state import STATE


async def tokenize(request: web.Request) -> web.Response:
    """Handler: the ids of a prompt, or of messages as the chat template writes them."""
    parsed = parse(await read_json(request), TokenizeRequest)
    body = parsed.value
    serving = request.app[STATE].serving
    serving.check_model(body.model)
    special = body.add_special_tokens
    if body.messages is not None:
        text = await messages.render(
            serving,
            body,
            parsed.raw,
            num_bytes=request.content_length,
            template_kwargs=body.chat_template_kwargs,
        )
        param = "messages"
        special = bool(special)
    elif body.prompt is not None:
        text, param = body.prompt, "prompt"
        special = special is not False
    else:
        raise RequestError("prompt or messages is required.", param="prompt")
    token_ids = await encode(serving, text, add_special_tokens=special, param=param)
    shown: dict[str, Any] = {
        "count": len(token_ids),
        "max_model_len": serving.info.max_model_len,
        "tokens": token_ids,
        "token_strs": None,
    }
    if body.return_token_strs:
        shown["token_strs"] = [serving.tokenizer.token_text(token_id) for token_id in token_ids]
    return json_response(shown, ignored=parsed.unknown)


async def detokenize(request: web.Request) -> web.Response:
    """Handler: the text of ids, special tokens included."""
    parsed = parse(await read_json(request), DetokenizeRequest)
    serving = request.app[STATE].serving
    serving.check_model(parsed.value.model)
    for token_id in parsed.value.tokens:
        if not 0 <= token_id < serving.info.vocab_size:
            raise RequestError(
                f"tokens holds token id {token_id}, which is outside the vocabulary "
                f"(0 to {serving.info.vocab_size - 1}).",
                param="tokens",
            )
    text = serving.tokenizer.decode(parsed.value.tokens, skip_special_tokens=False)
    return json_response({"prompt": text}, ignored=parsed.unknown)
