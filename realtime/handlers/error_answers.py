"""The application's answers to exceptions of its HTTP handlers (`HTTP.on_error`).

The answer is made where the handler ran, and travels as an exception: a cache does not keep it.
The module imports no Twisted: neither does the process of a handler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from realtime.app import ErrorFunction, Handler
from realtime.errors import RealtimeError
from realtime.handlers.results import PreparedResponse, result_converter

Answers = Mapping[type[Exception], ErrorFunction]
"""The functions that answer exceptions, by type; one also answers the subtypes that have no function of their own."""


class ErrorAnswer(RealtimeError):
    """A handler raised an exception, and the application answers it with `response`."""

    def __init__(self, response: PreparedResponse) -> None:
        super().__init__(f"answered with status {response.status}")
        self.response = response


def with_answers(handler: Handler, answers: Answers) -> Handler:
    """Return the handler with a function that raises ErrorAnswer for the exceptions that `answers` has."""
    if not answers or handler.kind != "http":
        return handler
    answering = _answering_on_loop if handler.run == "loop" else _answering
    return dataclasses.replace(handler, function=answering(handler.function, answers))


def _answering(function: Callable[..., Any], answers: Answers) -> Callable[[Any], Any]:
    def call(request: Any) -> Any:
        try:
            return function(request)
        except Exception as error:
            _raise_answer(answers, request, error)
            raise

    return call


def _answering_on_loop(function: Callable[..., Any], answers: Answers) -> Callable[[Any], Any]:
    async def call(request: Any) -> Any:
        try:
            result = function(request)
            return await result if hasattr(result, "__await__") else result
        except Exception as error:
            _raise_answer(answers, request, error)
            raise

    return call


def _raise_answer(answers: Answers, request: Any, error: Exception) -> None:
    """Raise the answer to an exception, if there is a function for its type, or else for its nearest base."""
    answer = next((answers[kind] for kind in type(error).__mro__ if kind in answers), None)
    if answer is not None:
        raise ErrorAnswer(result_converter("http")(answer(request, error))) from error
