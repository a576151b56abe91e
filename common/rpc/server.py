"""A daemon's gRPC server: threads, limits, health, reflection, and errors that never show a traceback."""

from __future__ import annotations

import errno
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from common.ipc.channel import ClosedError, RequestError
from common.logs import leave_session
from common.rpc.access import ANYBODY, Access, caller, is_allowed
from common.rpc.channel import BULK_OPTIONS
from common.rpc.errors import RefusalError, status_of

__all__ = ["Server"]

# A stream keeps its thread. So none may have more of them than a migration needs, and what is left is for calls.
MAX_STREAMS = {"SendPages": 32, "SendDeviceState": 80, "SendMappings": 2}
MAX_OTHER_STREAMS = 32  # of each other kind: watchers, reflection
THREADS = 208

REQUEST_SECONDS = 10.0
"""How long a call may take to bring its request, and a connection to say that it speaks HTTP/2 (and TLS)."""

_LIMITS: list[tuple[str, int]] = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", 128),  # of a connection; more of them wait at the caller
    ("grpc.max_allowed_incoming_connections", 512),
    ("grpc.max_connection_idle_ms", 300_000),
    ("grpc.server_handshake_timeout_ms", int(REQUEST_SECONDS * 1000)),
    ("grpc.http2.settings_timeout", int(REQUEST_SECONDS * 1000)),
]

_log = structlog.get_logger()


class _Edge(grpc.ServerInterceptor):
    """Lets only those in who may call, and turns what a servicer raises into a status."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._patience = _Patience()
        self._streams = _Streams()

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        if handler.request_streaming and handler.response_streaming:
            behaviour = _guard_stream(handler.stream_stream, method, self._access, self._streams)
            return grpc.stream_stream_rpc_method_handler(
                behaviour, handler.request_deserializer, handler.response_serializer
            )
        if handler.response_streaming:
            unary_stream = handler.unary_stream
            assert unary_stream is not None

            def take_one(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
                return unary_stream(self._patience.take(requests, context), context)

            behaviour = _guard_stream(take_one, method, self._access, self._streams)
            return grpc.stream_stream_rpc_method_handler(
                behaviour, handler.request_deserializer, handler.response_serializer
            )
        # As a stream of one request, for which nobody waits for ever.
        return grpc.stream_unary_rpc_method_handler(
            _guard_unary(handler.unary_unary, method, self._access, self._patience),
            handler.request_deserializer,
            handler.response_serializer,
        )


class _Streams:
    """Counts the streams that hold a thread, by what they are for."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def one_more(self, method: str) -> Iterator[None]:
        """Have one more of a kind; refuse it if there are too many."""
        name = method.rpartition("/")[2]
        with self._lock:
            if self._open[name] >= MAX_STREAMS.get(name, MAX_OTHER_STREAMS):
                raise RefusalError(
                    grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS", f"too many streams of {name} are open here"
                )
            self._open[name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._open[name] -= 1


class _Patience:
    """Ends calls that hold a thread and do not bring their request."""

    def __init__(self) -> None:
        self._waiting: dict[grpc.ServicerContext, float] = {}
        self._lock = threading.Lock()
        self._watching = False

    def take(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        """Return the request of a call."""
        with self._lock:
            self._waiting[context] = time.monotonic() + REQUEST_SECONDS
            if not self._watching:
                self._watching = True
                threading.Thread(target=self._watch, name="patience", daemon=True).start()
        try:
            for request in requests:
                return request
        finally:
            with self._lock:
                self._waiting.pop(context, None)
        raise RefusalError(grpc.StatusCode.INVALID_ARGUMENT, "BAD_REQUEST", "a call without a request")

    def _watch(self) -> None:
        while True:
            time.sleep(REQUEST_SECONDS / 10)
            with self._lock:
                late = [context for context, end in self._waiting.items() if time.monotonic() > end]
                self._watching = bool(self._waiting)
                if not self._watching:
                    return
            for context in late:
                context.cancel()


def _guard_unary(
    behaviour: Callable[..., Any] | None, method: str, access: Access, patience: _Patience
) -> Callable[..., Any]:
    assert behaviour is not None

    def guarded(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        try:
            _check(method, context, access)
            return behaviour(patience.take(requests, context), context)
        except Exception as error:  # noqa: BLE001  # the edge: whatever it is, the peer gets a status
            _abort(context, error, method)

    return guarded


def _guard_stream(
    behaviour: Callable[..., Any] | None, method: str, access: Access, streams: _Streams
) -> Callable[..., Any]:
    assert behaviour is not None

    def guarded(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            _check(method, context, access)
            with streams.one_more(method):
                yield from behaviour(requests, context)
        except Exception as error:  # noqa: BLE001  # the edge: whatever it is, the peer gets a status
            _abort(context, error, method)

    return guarded


def _check(method: str, context: grpc.ServicerContext, access: Access) -> None:
    leave_session()  # that of this thread's last call
    names = caller(context)
    if not is_allowed(method, names, access):
        who = ", ".join(sorted(names)) or "a caller without a name"
        _log.warning("refused", method=method, caller=who, peer=context.peer())
        raise RefusalError(
            grpc.StatusCode.PERMISSION_DENIED, "NOT_ALLOWED", f"{who} may not call {method.rpartition('/')[2]} here"
        )


def _abort(context: grpc.ServicerContext, error: Exception, method: str) -> None:
    if not context.is_active():
        return
    if isinstance(error, RequestError):
        error = RefusalError(grpc.StatusCode.FAILED_PRECONDITION, error.reason, str(error))
    elif isinstance(error, ClosedError):
        error = RefusalError(grpc.StatusCode.ABORTED, "MACHINE_GONE", "the machine process has ended")
    elif isinstance(error, OSError):
        _log.error("failed", method=method, message=str(error))
        reason = errno.errorcode.get(error.errno or 0, "EIO")
        error = RefusalError(grpc.StatusCode.ABORTED, reason, error.strerror or str(error))
    if not isinstance(error, RefusalError):
        _log.exception("defect", method=method)
        error = RefusalError(grpc.StatusCode.INTERNAL, "INTERNAL", f"{type(error).__name__}: {error}")
    context.abort_with_status(status_of(error))


class Server:
    """A server; `address` is where it listens, with the port that was bound."""

    def __init__(
        self,
        listen: str,
        register: Callable[[grpc.Server], None],
        services: Sequence[str],
        credentials: grpc.ServerCredentials | None = None,
        access: Access = ANYBODY,
    ) -> None:
        """Bind `listen` (HOST:PORT, port 0: any); raise OSError if that port cannot be had.

        With credentials callers must show a certificate, and `access` says whose may call what.
        """
        self._server = grpc.server(
            futures.ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="rpc"),
            interceptors=[_Edge(access)],
            options=[*BULK_OPTIONS, *_LIMITS],
            maximum_concurrent_rpcs=THREADS,
        )
        register(self._server)
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        for name in ("", *services):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        host, _, _ = listen.rpartition(":")
        try:
            if credentials is None:
                port = self._server.add_insecure_port(listen)
            else:
                port = self._server.add_secure_port(listen, credentials)
        except RuntimeError as error:
            raise OSError(
                f"cannot listen on {listen}: the port is in use or the address is not of this host"
            ) from error
        if port == 0:
            raise OSError(f"cannot listen on {listen}")
        self.address = f"{host}:{port}"

    def start(self) -> None:
        """Serve."""
        self._server.start()

    def stop(self, grace: float) -> None:
        """Refuse new calls, give running ones `grace` seconds, end."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace).wait()
