"""The Ray Serve deployment: HTTP requests are read, batched and classified.

A replica decodes images on threads, and runs one batch at a time on a thread of its own, so that
its event loop stays free for further requests. It counts the images that it has accepted itself:
`/healthz` and `/metrics` therefore answer also while `/predict` is refused.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from torch import Tensor

from dsnet.deploy.bundle import check_bundle_examples
from dsnet.errors import DsnetError
from orchestration.serving.loopback import keep_replica_on_loopback
from orchestration.serving.metrics import CONTENT_TYPE, Tally
from orchestration.serving.requests import RequestImages, point_of, read_images
from orchestration.serving.served_bundle import opened
from orchestration.serving.settings import MIB, ServeSettings

METHODS = {"/": "GET", "/healthz": "GET", "/metrics": "GET", "/predict": "POST"}
RETRY_AFTER_S = 1
HEALTHY_S = 10.0
"""How long the result of a check of the examples is valid."""
_NUM_DECODERS = 2
_READ_TO_REFUSE = 16
"""How far a body that is too large is read before its connection is closed, in multiples of the
limit."""
_CLIENT_GONE = 499
_log = logging.getLogger(__name__)


class RefusedError(Exception):
    """A request that gets no predictions.

    Attributes:
        status: of the answer.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status

    @property
    def response(self) -> Response:
        """The answer."""
        return refusal(self.status, str(self))


class Answer(NamedTuple):
    """What a batch says of one image."""

    class_name: str
    probability: float
    route: str
    madds: int

    def to_json(self) -> dict[str, Any]:
        """As the server answers it."""
        return {
            "class": self.class_name,
            "probability": self.probability,
            "route": self.route,
            "madds": self.madds,
        }


def refusal(status: int, reason: str) -> Response:
    """An answer without predictions, as JSON."""
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else {}
    return JSONResponse({"error": reason}, status_code=status, headers=headers)


class Classifier:
    """One replica.

    Args:
        path: the bundle's folder.
        settings: batches, limits and budget.
        threads: threads of a batch.
        total: actor of the `Tally` of all replicas.

    Raises:
        DsnetError: the bundle cannot be read or does not give the answers of its examples.
    """

    def __init__(self, path: Path, settings: ServeSettings, threads: int, total: ActorHandle) -> None:
        keep_replica_on_loopback()
        torch.set_num_threads(threads)
        self._bundle = opened(path, settings, threads)
        self._settings = settings
        self._total = total
        self._unsent = Tally()
        self._sending: asyncio.Task[None] | None = None
        self._num_waiting = 0
        self._decoders = ThreadPoolExecutor(_NUM_DECODERS, "decode")
        self._runner = ThreadPoolExecutor(1, "batch")
        in_batches: Any = serve.batch(max_batch_size=settings.max_batch, batch_wait_timeout_s=settings.wait_ms / 1e3)
        self._classify: Callable[[Tensor, str], Awaitable[Answer]] = in_batches(self._classify_batch)
        self._num_examples = check_bundle_examples(self._bundle)
        self._checked_at = time.monotonic()

    async def __call__(self, request: Request) -> Response:
        """Answer one HTTP request."""
        path = request.url.path
        if path not in METHODS:
            return refusal(404, f"unknown path {path}; there are {', '.join(METHODS)}")
        if request.method != METHODS[path]:
            return refusal(405, f"{path} takes {METHODS[path]}, not {request.method}")
        match path:
            case "/predict":
                return await self._predict(request)
            case "/metrics":
                return await self._metrics()
            case "/healthz":
                return await self._health()
        return JSONResponse(self._about())

    def _about(self) -> dict[str, Any]:
        """What is served, and how to ask."""
        bundle = self._bundle
        return {
            "bundle": bundle.path.name,
            "classes": list(bundle.class_names),
            "routes": list(bundle.route_names),
            "image_shape": list(bundle.image_shape),
            "engine": bundle.engine,
            "operating_point": bundle.operating_point.name,
            "operating_points": [
                {"name": point.name, "madds_m": point.madds_m, "latency_ms": point.latency_ms, "top1": point.top1}
                for point in bundle.operating_points
            ],
            "use": "POST /predict with an image file, or JSON {pixels: ...} or {images: [base64, ...]}; "
            "?budget_madds=, ?budget_latency= or ?point= chooses the operating point; GET /healthz, /metrics",
        }

    async def _health(self) -> Response:
        try:
            num_examples = await asyncio.get_running_loop().run_in_executor(self._runner, self._check_examples)
        except DsnetError as error:
            return refusal(503, str(error))
        return JSONResponse({"status": "ok", "examples": num_examples})

    def _check_examples(self) -> int:
        if time.monotonic() > self._checked_at + HEALTHY_S:
            self._num_examples = check_bundle_examples(self._bundle)
            self._checked_at = time.monotonic()
        return self._num_examples

    async def _metrics(self) -> Response:
        unsent, self._unsent = self._unsent, Tally()
        self._total.merge.remote(unsent)
        return PlainTextResponse(await self._total.text.remote(), headers={"content-type": CONTENT_TYPE})

    async def _predict(self, request: Request) -> Response:
        started, status, seconds = time.perf_counter(), 500, None
        try:
            content = await self._answer(request, started)
            status, seconds = 200, time.perf_counter() - started
            return JSONResponse(content)
        except RefusedError as error:
            status = error.status
            return error.response
        except asyncio.CancelledError:
            status = _CLIENT_GONE
            raise
        finally:
            self._unsent.answered(status, seconds)
            self._send()

    async def _answer(self, request: Request, started: float) -> dict[str, Any]:
        """The JSON answer to a request for predictions.

        Raises:
            RefusedError: it gets none.
        """
        with self._place(1):
            point, sent = await self._read(request)
            with self._place(len(sent.pixels) - 1):
                answers = await asyncio.gather(*(self._classify(image, point) for image in sent.pixels))
        rest = {"operating_point": point, "milliseconds": 1e3 * (time.perf_counter() - started)}
        rows = [answer.to_json() for answer in answers]
        return {"predictions": rows, **rest} if sent.is_list else {**rows[0], **rest}

    @contextmanager
    def _place(self, num_images: int) -> Iterator[None]:
        """Places in the queue for the length of the block.

        Raises:
            RefusedError: 503, there are not so many.
        """
        if self._num_waiting + num_images > self._settings.max_queue:
            raise RefusedError(503, f"the queue is full ({self._num_waiting} images); try again later")
        self._num_waiting += num_images
        try:
            yield
        finally:
            self._num_waiting -= num_images

    async def _read(self, request: Request) -> tuple[str, RequestImages]:
        """The operating point and the images of a request.

        Raises:
            RefusedError: 400 or 413.
        """
        try:
            point = point_of(dict(request.query_params), self._bundle)
            body = await self._body(request)
            kind = request.headers.get("content-type", "")
            loop = asyncio.get_running_loop()
            sent = await loop.run_in_executor(self._decoders, read_images, body, kind, self._bundle)
        except DsnetError as error:
            raise RefusedError(400, str(error)) from error
        if len(sent.pixels) > self._settings.max_queue:
            raise RefusedError(
                413, f"{len(sent.pixels)} images are more than the queue takes ({self._settings.max_queue}); send fewer"
            )
        return point, sent

    async def _body(self, request: Request) -> bytes:
        """The body. Of one that is larger than the limit the rest is read too, but not kept: a
        client that is still sending would get a broken connection instead of the answer.

        Raises:
            RefusedError: 413, it is larger.
        """
        limit, body, num_bytes = self._settings.max_mib * MIB, bytearray(), 0
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes <= limit:
                body += chunk
            elif num_bytes > _READ_TO_REFUSE * limit:
                break
        if num_bytes > limit:
            raise RefusedError(
                413, f"the body is larger than {self._settings.max_mib} MiB; send fewer or smaller images"
            )
        return bytes(body)

    async def _classify_batch(self, images: list[Tensor], points: list[str]) -> list[Answer]:
        """The answers for images [C, H, W], each at its operating point."""
        answers = await asyncio.get_running_loop().run_in_executor(self._runner, self._run, images, points)
        self._unsent.batches.add(len(images))
        for point, answer in zip(points, answers, strict=True):
            self._unsent.classified(point, answer.route, answer.madds)
        return answers

    @torch.inference_mode()
    def _run(self, images: Sequence[Tensor], points: Sequence[str]) -> list[Answer]:
        answers: dict[int, Answer] = {}
        for point in dict.fromkeys(points):
            rows = [row for row, own in enumerate(points) if own == point]
            found = self._bundle.at(point)(torch.stack([images[row] for row in rows]))
            sure = found.probabilities.amax(1).tolist()
            names = [self._bundle.class_names[label] for label in found.classes.tolist()]
            routes = [self._bundle.route_names[route] for route in found.routes.tolist()]
            own = [Answer(*each) for each in zip(names, sure, routes, found.madds.tolist(), strict=True)]
            answers |= dict(zip(rows, own, strict=True))
        return [answers[row] for row in range(len(images))]

    def _send(self) -> None:
        """Send what was counted; what is counted meanwhile is sent together afterwards."""
        if self._sending is None or self._sending.done():
            self._sending = asyncio.get_running_loop().create_task(self._send_all())

    async def _send_all(self) -> None:
        while self._unsent.requests:
            unsent, self._unsent = self._unsent, Tally()
            try:
                await self._total.merge.remote(unsent)
            except RayActorError as error:
                _log.warning("the numbers of %d requests are lost: %s", sum(unsent.requests.values()), error)
