"""A client with one connection that it keeps: for each line of stdin it asks as ada, and prints which server answered.

usage: held_open.py grpc|http ADDRESS     the servers are those of agent/tests/others
"""
import http.client
import json
import sys

ADA = {"x-tp-user": "ada"}


def by_grpc(address):
    import grpc
    # Python's channel learns of a reset with its next call, which is then unavailable: what clients try again.
    again = {"maxAttempts": 2, "initialBackoff": "0.1s", "maxBackoff": "0.1s", "backoffMultiplier": 1,
             "retryableStatusCodes": ["UNAVAILABLE"]}
    config = {"methodConfig": [{"name": [{}], "retryPolicy": again}]}
    channel = grpc.insecure_channel(address, [("grpc.service_config", json.dumps(config))])
    ask = channel.unary_unary("/shop.v1.Echo/Unary")
    return lambda: ask(b"", metadata=list(ADA.items()), timeout=20).decode()


def by_http(address):
    connection = http.client.HTTPConnection(address, timeout=20)

    def once():
        connection.request("GET", "/graphql?query=query+GetCart+%7B+ran+%7D", headers=ADA)
        return json.loads(connection.getresponse().read())["data"]["ran"]

    def ask():
        try:
            return once()
        except ConnectionError:
            # What was kept was closed meanwhile: what every client that keeps connections does for a GET (RFC 9110 §9.2.2).
            connection.close()
            return once()

    return ask


ask = {"grpc": by_grpc, "http": by_http}[sys.argv[1]](sys.argv[2])
for _ in sys.stdin:
    print(ask().split()[0], flush=True)
