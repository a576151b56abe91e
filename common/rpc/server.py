"""A daemon's gRPC server: threads, limits, health, reflection, and errors that never show a traceback."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, cast

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from common.ipc.channel import ClosedError, RequestError
from common.logs import leave_session
from common.rpc.access import ANYBODY, Access, is_allowed, names_of
from common.rpc.channel import BULK_OPTIONS
from common.rpc.errors import RefusalError, status_of

__all__ = ["Server", "tune_allocator"]

# A stream keeps its thread: 16 lanes, 64 devices, mappings, and then there is still room for calls and watchers.
THREADS = 128

_log = structlog.get_logger()


class _Edge(grpc.ServerInterceptor):
    """Lets only those in who may call, and turns what a servicer raises into a status."""

    def __init__(self, access: Access) -> None:
        self._access = access

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
            behaviour = _guard_stream(handler.stream_stream, method, self._access)
            return grpc.stream_stream_rpc_method_handler(
                behaviour, handler.request_deserializer, handler.response_serializer
            )
        if handler.response_streaming:
            behaviour = _guard_stream(handler.unary_stream, method, self._access)
            return grpc.unary_stream_rpc_method_handler(
                behaviour, handler.request_deserializer, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            _guard_unary(handler.unary_unary, method, self._access),
            handler.request_deserializer,
            handler.response_serializer,
        )


def _guard_unary(behaviour: Callable[..., Any] | None, method: str, access: Access) -> Callable[..., Any]:
    assert behaviour is not None

    def guarded(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            _check(method, context, access)
            return behaviour(request, context)
        except Exception as error:  # noqa: BLE001  # the edge: whatever it is, the peer gets a status
            _abort(context, error, method)

    return guarded


def _guard_stream(behaviour: Callable[..., Any] | None, method: str, access: Access) -> Callable[..., Any]:
    assert behaviour is not None

    def guarded(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            _check(method, context, access)
            yield from behaviour(request, context)
        except Exception as error:  # noqa: BLE001  # the edge: whatever it is, the peer gets a status
            _abort(context, error, method)

    return guarded


def _check(method: str, context: grpc.ServicerContext, access: Access) -> None:
    leave_session()  # that of this thread's last call
    names = names_of(cast("Mapping[str, Iterable[bytes]]", context.auth_context()))  # its stub is wrong
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
            options=[*BULK_OPTIONS, ("grpc.so_reuseport", 0)],
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


def tune_allocator() -> None:
    """Keep freed message buffers instead of handing them back to the kernel, and all of them in one place.

    glibc maps every block of a message's size afresh and unmaps it again, so that each message faults in all of its
    pages anew: a third of a gRPC stream's time. And it keeps an arena for each thread, of which a server has many.
    """
    m_trim_threshold, m_top_pad, m_mmap_threshold, m_arena_max = -1, -2, -3, -8
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, 64 << 20)
        libc.mallopt(m_trim_threshold, 128 << 20)
        libc.mallopt(m_top_pad, 16 << 20)
        libc.mallopt(m_arena_max, 1)
    except (OSError, AttributeError):
        return
