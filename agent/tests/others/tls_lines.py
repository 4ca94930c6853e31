"""A TLS server that is no HTTP: answers a line backwards, and ends with its client. Prints its port."""

import socket
import ssl
import sys
import threading

context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(*sys.argv[1:])
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)


def serve(tcp):
    try:
        with context.wrap_socket(tcp, server_side=True) as tls, tls.makefile("rw") as lines:
            for line in lines:
                lines.write("app " + line.rstrip("\n")[::-1] + "\n")
                lines.flush()
    except OSError:
        pass


while True:
    tcp, _ = listener.accept()
    threading.Thread(target=serve, args=[tcp], daemon=True).start()
