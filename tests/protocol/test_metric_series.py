"""Labels of metrics come from closed sets: no input of clients makes a series."""

from __future__ import annotations

from tests.protocol.sessions import Server, token

CLIENTS = 10_000


def test_names_users_channels_methods_and_commands_of_many_clients_make_no_series() -> None:
    server = Server()

    def take_part(number: int) -> None:
        name = f"n{number}"
        peer = server.peer()
        connect = {"token": token(sub=name), "name": name, "version": name, "data": name}
        peer.say({"id": 1, "connect": connect})
        peer.say(
            {"id": 2, "subscribe": {"channel": name}},
            {"id": 3, "subscribe": {"channel": f"{name}:unknown"}},
            {"id": 4, "publish": {"channel": name, "data": name}},
            {"id": 5, "rpc": {"method": name}},
            {"id": 6, "unsubscribe": {"channel": name}},
        )
        assert peer.close_code is None
        peer.say({"id": 7, name: {}})
        assert peer.close_code is not None

    def series() -> int:
        return len(server.metrics.snapshot())

    take_part(0)
    before = series()
    for number in range(1, CLIENTS):
        take_part(number)
    assert series() == before > 0
