"""A gRPC server and a client of it, in Debian's grpcio, without generated code: messages are bytes.

usage: grpc_peer.py serve NAME [ADDRESS [CERTIFICATE KEY]]   prints its port
       grpc_peer.py call ADDRESS [CERTIFICATE]               calls it in every way as ada and as eve; exits with 0 when all
                                                             answers are right
"""
import sys
import time
from concurrent import futures

import grpc


class Echo(grpc.GenericRpcHandler):
    def __init__(self, name):
        self.name = name.encode()

    def service(self, details):
        method = details.method.rsplit("/", 1)[1]
        return {
            "Unary": grpc.unary_unary_rpc_method_handler(self.unary),
            "Download": grpc.unary_stream_rpc_method_handler(self.download),
            "Upload": grpc.stream_unary_rpc_method_handler(self.upload),
            "Chat": grpc.stream_stream_rpc_method_handler(self.chat),
            "Fail": grpc.unary_unary_rpc_method_handler(self.fail),
            "Slow": grpc.unary_unary_rpc_method_handler(self.slow),
        }[method]

    def unary(self, request, context):
        context.set_trailing_metadata([("x-trailer", "last"), ("bytes-bin", b"\0\xff")])
        return self.name + b" " + request

    def download(self, request, context):
        for n in range(int(request)):
            yield self.name + b" %d" % n

    def upload(self, requests, context):
        return self.name + b" %d" % sum(len(request) for request in requests)

    def chat(self, requests, context):
        for request in requests:
            yield self.name + b" " + request

    def fail(self, request, context):
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not today")

    def slow(self, request, context):
        # Says how much time the client has left, as its deadline arrived here.
        left = context.time_remaining()
        assert left is not None and left < 60, left
        while context.is_active():
            time.sleep(0.02)
        return b""


def read(path):
    with open(path, "rb") as file:
        return file.read()


def serve(name, address="127.0.0.1:0", certificate=None, key=None):
    server = grpc.server(futures.ThreadPoolExecutor(16))
    server.add_generic_rpc_handlers([Echo(name)])
    if certificate is None:
        port = server.add_insecure_port(address)
    else:
        pair = (read(key), read(certificate))
        port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    print(port, flush=True)
    server.start()
    server.wait_for_termination()


def dial(address, certificate):
    if certificate is None:
        return grpc.insecure_channel(address)
    # The certificate is for the Service's name, which the node cannot resolve.
    options = [("grpc.ssl_target_name_override", "web")]
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(read(certificate)), options)


def call(address, certificate=None):
    with dial(address, certificate) as channel:
        for turn in range(20):
            for user, name in (("ada", b"local"), ("eve", b"app")):
                one_of_each(channel, [("x-tp-user", user)], name)


def one_of_each(channel, metadata, name):
    method = "/shop.v1.Echo/%s"
    answer, details = channel.unary_unary(method % "Unary").with_call(b"x" * 3000, metadata=metadata, timeout=20)
    assert answer == name + b" " + b"x" * 3000, answer[:40]
    trailers = dict(details.trailing_metadata())
    assert trailers["x-trailer"] == "last" and trailers["bytes-bin"] == b"\0\xff", trailers
    got = list(channel.unary_stream(method % "Download")(b"300", metadata=metadata, timeout=20))
    assert got == [name + b" %d" % n for n in range(300)], got[:3]
    pieces = [b"y" * 10000] * 50
    got = channel.stream_unary(method % "Upload")(iter(pieces), metadata=metadata, timeout=20)
    assert got == name + b" 500000", got
    chat = channel.stream_stream(method % "Chat")(ping_pong(), metadata=metadata, timeout=20)
    for n, got in enumerate(chat):
        assert got == name + b" %d" % n, got
        answered.release()
    for wanted, rpc, timeout in (("FAILED_PRECONDITION", "Fail", 20), ("DEADLINE_EXCEEDED", "Slow", 0.1)):
        try:
            channel.unary_unary(method % rpc)(b"", metadata=metadata, timeout=timeout)
        except grpc.RpcError as error:
            assert error.code().name == wanted, error
        else:
            raise AssertionError(rpc + " did not fail")


def ping_pong():
    """Each message waits for the answer to the one before."""
    for n in range(20):
        yield b"%d" % n
        assert answered.acquire(timeout=20)


if __name__ == "__main__":
    import threading
    answered = threading.Semaphore(0)
    {"serve": serve, "call": call}[sys.argv[1]](*sys.argv[2:])
