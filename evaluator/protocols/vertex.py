"""Vertex AI's online prediction.

    request:   POST .../endpoints/ID:predict {"instances": [text], "parameters": {"maxOutputTokens", "temperature": 0}}
    answer:    {"predictions": [text], "deployedModelId", "model", "modelVersionId"}
    token:     `Authorization: Bearer ...` (`gcloud auth print-access-token`); Google's are good for an hour

What an instance is, a container decides. It is the text, or, where there are --parameter `instance.NAME`, the object
{"prompt": text, NAME: value}: vLLM's containers want their sampling parameters there. There is nothing to ask before
the first request: an endpoint has one model, and its description needs other rights than a prediction.

Shapes: PredictRequest and PredictResponse of the REST reference, projects.locations.endpoints.predict.
"""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from evaluator.errors import OptionsError, UsageError
from evaluator.protocols import http
from evaluator.protocols.base import Answer, Connection, ServedModel
from evaluator.protocols.torchserve import prediction_of, refuse_stream
from evaluator.tokenizers import Prompt

OF_INSTANCE = "instance."  # what the names of parameters begin with that belong into the instance


class Vertex:
    """The Endpoint of the one model there is. Which version answered is known after the first answer."""

    takes_ids = False
    continues = False
    repeats = True  # it is up to the container

    def __init__(self, client: http.Http, url: str, connection: Connection) -> None:
        self.model = ServedModel(connection.model, "", None)
        self._client = client
        self._url = url
        given = {name: http.plain(text) for name, text in connection.parameters.items()}
        self._instance = {
            name.removeprefix(OF_INSTANCE): value for name, value in given.items() if name.startswith(OF_INSTANCE)
        }
        self._parameters = {name: value for name, value in given.items() if not name.startswith(OF_INSTANCE)}

    def serialize(self, prompt: Prompt, max_output_tokens: int) -> bytes:
        instance = {"prompt": prompt.text, **self._instance} if self._instance else prompt.text
        parameters = {"maxOutputTokens": max_output_tokens, "temperature": 0, **self._parameters}
        return json.dumps({"instances": [instance], "parameters": parameters}).encode()

    async def send(self, request: bytes) -> Answer:
        answer = await self._client.post(self._url, request)
        text = prediction_of(answer)
        version = answer.get("modelVersionId")
        if isinstance(version, str) and not self.model.version:
            self.model = ServedModel(self.model.name, version, None)
        return Answer(text=text)


@asynccontextmanager
async def connect(connection: Connection) -> AsyncIterator[Vertex]:
    """Prepare requests to the endpoint at a URL that ends in /endpoints/ID, :predict or /predict. Sends none.

    Raises:
        UsageError: the endpoint is no such URL.
        OptionsError: Google is called without a token, or a stream is asked for.
    """
    refuse_stream(connection, "Vertex AI's predict")
    url = http.base_url(connection)
    if re.search(r"/endpoints/[^/:]+$", url):
        url += ":predict"
    if not re.search("[:/]predict$", url):
        raise UsageError(
            f"--endpoint: expected the URL of a Vertex AI endpoint, found {url}\n"
            "  mend: https://REGION-aiplatform.googleapis.com/v1/projects/PROJECT/locations/REGION/endpoints/ID:predict"
        )
    authorised = "authorization" in {name.lower() for name in connection.headers}
    if not authorised and re.match(r"https://[^/]*\.(googleapis|vertexai\.goog)\b", url):
        raise OptionsError(
            "--endpoint: expected a token for Vertex AI, found none\n"
            '  mend: EVALUATE_TOKEN="$(gcloud auth print-access-token)", or --token-file'
        )
    async with http.opened(connection) as client:
        yield Vertex(client, url, connection)
