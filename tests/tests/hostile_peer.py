"""A peer of the manager's tunnel port that means no good. Runs in a pod; standard library only.

usage: hostile_peer.py CASE HOST [CERTIFICATE KEY]   prints one JSON object about what came back
"""
import json, os, socket, ssl, struct, sys, time

case, host = sys.argv[1], sys.argv[2]
PORT = 8443
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


SETTINGS = frame(4, 0, 0)
# HPACK without a table: literal, never indexed, plain text.
def header(name, value):
    return b"\x10" + bytes([len(name)]) + name + bytes([len(value)]) + value


def tls(alpn=("h2",)):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    if alpn:
        context.set_alpn_protocols(list(alpn))
    if len(sys.argv) > 3:
        context.load_cert_chain(sys.argv[3], sys.argv[4])
    return context.wrap_socket(socket.create_connection((host, PORT), 5), server_hostname="tp-manager")


def drain(s, seconds, enough=float("inf")):
    """What the peer says until it closes or has said enough, and how it closes."""
    s.settimeout(seconds)
    got, start = b"", time.time()
    try:
        while time.time() - start < seconds and len(got) < enough:
            piece = s.recv(65536)
            if not piece:
                return got, "fin"
            got += piece
    except ConnectionResetError:
        return got, "rst"
    except (TimeoutError, socket.timeout):
        return got, "open"
    except ssl.SSLError as error:
        return got, "alert " + str(error.reason)
    return got, "open"


start = time.time()
result = {}
try:
    if case == "garbage":
        s = socket.create_connection((host, PORT), 5)
        s.sendall(os.urandom(4096))
        got, end = drain(s, 15)
        # A TLS alert record is all that a stranger may get.
        result = {"bytes": len(got), "end": end, "record": got[:1].hex()}
    elif case == "plain-http":
        s = socket.create_connection((host, PORT), 5)
        s.sendall(b"GET /v1/cluster HTTP/1.1\r\nHost: x\r\n\r\n")
        got, end = drain(s, 15)
        result = {"bytes": len(got), "end": end, "record": got[:1].hex()}
    elif case == "silence":
        s = socket.create_connection((host, PORT), 5)
        got, end = drain(s, 30)
        result = {"bytes": len(got), "end": end}
    elif case == "request":
        s = tls()
        s.sendall(PREFACE + SETTINGS + frame(1, 5, 1, header(b":method", b"GET") + header(b":scheme", b"https") + header(b":authority", b"x") + header(b":path", b"/v1/cluster")))
        got, end = drain(s, 8, enough=201)
        result = {"bytes": len(got), "end": end, "alpn": s.selected_alpn_protocol()}
    elif case in ("rapid-reset", "settings-flood", "ping-flood", "continuation", "empty-data", "header-bomb"):
        s = tls()
        s.sendall(PREFACE + SETTINGS + frame(4, 1, 0))
        block = header(b":method", b"CONNECT") + header(b":authority", b"nothing.svc.cluster.local:80")
        sent, stream, end = 0, 1, "open"
        s.settimeout(5)
        try:
            while time.time() - start < 10 and sent < 300000:
                burst = b""
                for _ in range(200):
                    if case == "rapid-reset":
                        burst += frame(1, 4, stream, block) + frame(3, 0, stream, struct.pack(">I", 8)); stream += 2
                    elif case == "settings-flood":
                        burst += SETTINGS
                    elif case == "ping-flood":
                        burst += frame(6, 0, 0, b"12345678")
                    elif case == "continuation":
                        burst += frame(1, 0, 1, block) if sent == 0 and not burst else frame(9, 0, 1, header(b"x-%d" % (sent % 10), b"y" * 120))
                    elif case == "empty-data":
                        burst += (frame(1, 4, 1, block) if sent == 0 and not burst else b"") + frame(0, 0, 1)
                    else:
                        burst += frame(1, 4, stream, block + header(b"x-bomb", b"y" * 120) * 100); stream += 2
                    sent += 1
                s.sendall(burst)
        except (ConnectionError, ssl.SSLError, TimeoutError, socket.timeout, OSError) as error:
            end = type(error).__name__
        got, final = drain(s, 2) if end == "open" else (b"", end)
        result = {"sent": sent, "end": final}
    else:
        raise SystemExit("unknown case " + case)
except (ConnectionError, ssl.SSLError, OSError) as error:
    result = {"bytes": 0, "end": "handshake " + str(getattr(error, "reason", None) or type(error).__name__)}
result["ms"] = int((time.time() - start) * 1000)
print(json.dumps(result))
