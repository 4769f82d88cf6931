"""The settings of the processes: the workers, and the health of their loops."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from realtime.config.annotations import NonNegative, Positive, PositiveSeconds, PositiveShare, Seconds, Share, about


class WorkersSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The worker processes. Each has an event loop of its own."""

    count: Annotated[
        int, Meta(ge=0, le=1024), about("Number of worker processes. 0: one for each CPU core that the server may use.")
    ] = 0
    threads: Annotated[
        int, Meta(ge=1, le=1024), about("Maximum number of threads of each worker for plain (not async) handlers.")
    ] = 16
    thread_queue: Annotated[NonNegative, about("Maximum number of calls in each worker that wait for a thread.")] = 1000
    processes: Annotated[
        int,
        Meta(ge=0, le=1024),
        about(
            'Number of processes of each worker for handlers with run="process". 0: the worker\'s share of the cores.'
        ),
    ] = 0
    process_queue: Annotated[
        NonNegative, about("Maximum number of calls in each worker that wait for such a process.")
    ] = 100
    io_uring: Annotated[
        bool,
        about(
            "Fan-out submits many sends in one system call, through io_uring, where the kernel has it and permits it."
        ),
    ] = True
    handler_timeout: Annotated[Seconds, about("Time limit of a handler's call. 0: no limit.")] = 10.0
    task_lease: Annotated[
        float,
        Meta(ge=0.5, le=60),
        about(
            'Time for which the worker that runs the functions of @app.every(where="one") may be out of reach before'
            " another worker runs them."
        ),
    ] = 5.0
    cache_lease: Annotated[
        Seconds,
        about(
            "Time for which one worker computes a cached value and the others wait for it. Then another worker computes"
            " it as well. 0: each worker computes its own values."
        ),
    ] = 10.0
    max_error_series: Annotated[
        Positive,
        about(
            "Maximum number of pairs of a handler and a type of exception that each worker counts on their own in"
            ' realtime_handler_errors_total. Further types count as exception="other".'
        ),
    ] = 200
    sample_calls: Annotated[
        Positive,
        about(
            "Number of first calls of a handler that may run on a worker's loop together, before the worker knows how"
            " long one blocks the loop. Further calls wait for the end of these. Handlers that never shed load do not"
            " wait."
        ),
    ] = 5
    sample_timeout: Annotated[Seconds, about("Time limit of this wait, which each handler has once in a worker.")] = 0.4
    restart_delay: Annotated[
        Seconds,
        about("Delay before the supervisor replaces a dead worker. It doubles with each death."),
    ] = 0.1
    restart_delay_max: Annotated[Seconds, about("Maximum of this delay.")] = 30.0
    restart_reset: Annotated[
        Seconds,
        about("Lifetime of a worker after which restart_delay starts again from its first value."),
    ] = 60.0
    start_timeout: Annotated[
        PositiveSeconds, about("Time limit for a worker to load the application and become ready.")
    ] = 30.0
    max_age: Annotated[
        Seconds,
        about(
            "Age at which a new process takes the place of a worker, and its clients. The workers are replaced at"
            " different times, from half of this age on. 0: never."
        ),
    ] = 0.0
    max_rss: Annotated[
        NonNegative,
        about(
            "Resident memory of a worker, in bytes, at which a new process takes its place, and its clients. 0: never."
        ),
    ] = 0


class LoopSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The health of the workers' event loops, and the limits of a worker's load."""

    interval: Annotated[float, Meta(ge=0.001), about("Interval between two heartbeats of a worker's loop.")] = 0.04
    lagging: Annotated[
        Seconds,
        about(
            "A worker whose loop lags by this much is lagging: the supervisor finds out what blocks the loop. 0: never."
        ),
    ] = 0.05
    steering: Annotated[
        bool,
        about(
            "The supervisor steers new clients to workers by their health and load. false: the kernel spreads clients"
            " evenly."
        ),
    ] = True
    rescue: Annotated[
        bool,
        about("The supervisor hands new clients that wait for an unavailable worker to another worker."),
    ] = True
    rebalance: Annotated[
        bool,
        about(
            "The supervisor moves clients from a worker that is much busier than another one for long, a few at a time."
        ),
    ] = True
    rebalance_difference: Annotated[
        PositiveShare,
        about("Difference between the busy shares of two loops, from 0 to 1, from which clients move."),
    ] = 0.4
    rebalance_delay: Annotated[
        PositiveSeconds,
        about("Time for which a worker must be so much busier before clients move, and before more of them move."),
    ] = 30.0
    relief: Annotated[
        bool, about("While a handler blocks a worker's loop, a second thread of the worker serves its other clients.")
    ] = True
    relief_after: Annotated[
        float, Meta(ge=0.005), about("Relief begins when a turn of a worker's loop has taken this long.")
    ] = 0.03
    slice: Annotated[
        float,
        Meta(ge=0.0005),
        about("Time for which the server's own work occupies a loop before other work gets its turn."),
    ] = 0.005
    stuck: Annotated[
        Seconds,
        about("The supervisor kills and replaces a worker without a heartbeat for this long. 0: never."),
    ] = 10.0
    max_lag: Annotated[
        Seconds,
        about(
            "A worker whose loop lags by this much is under pressure: other workers take its new clients, and it sheds"
            " load. 0: never."
        ),
    ] = 0.2
    max_utilization: Annotated[
        Share,
        about(
            "A worker whose loop is busy for this share of the time, from 0 to 1, logs a warning and sheds no load."
            " 0: never."
        ),
    ] = 0.0
    max_rss: Annotated[
        NonNegative,
        about(
            "A worker with this much resident memory, in bytes, sheds load, and a new process takes its place, and its"
            " clients. 0: never."
        ),
    ] = 0
    # A quarter of a gigabyte of frames is a thousand slow clients with a quarter of client.queue_max_size each.
    max_queued_bytes: Annotated[
        NonNegative,
        about(
            "A worker that queues this many bytes for its slow clients, together, sheds load and disconnects those with"
            " the longest queues. 0: never."
        ),
    ] = 256 * 1024 * 1024
    # Half of workers.thread_queue: calls at the end of such a queue hardly finish in time, and more would be refused.
    max_threads_waiting: Annotated[
        NonNegative, about("A worker with this many calls that wait for a thread sheds load. 0: never.")
    ] = 500
