"""Socket calls that curl does not make, each printing what came of it. Arguments are the calls."""
import ctypes, errno, hashlib, os, platform, signal, socket, struct, sys, threading, time

def tcp(host, port):
    return socket.create_connection((host, port), timeout=20)

def refused(host, port):
    begun = time.time()
    try:
        tcp(host, port)
        print("connected")
    except OSError as error:
        print(errno.errorcode.get(error.errno, error), "at once" if time.time() - begun < 3 else "late")

def udp(host, size):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.settimeout(5)
    sent = os.urandom(size)
    s.sendto(sent, (host, 7))
    print("same" if s.recv(70000) == sent else "other")

def ping(host):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
    s.settimeout(10)
    s.sendto(struct.pack("!BBHHH", 8, 0, 0, 0, 1) + b"payload", (host, 0))
    answer = s.recv(2000)
    print("answered" if answer[0] == 0 and answer[8:] == b"payload" else answer)

def half_close(host):
    s = tcp(host, 9)
    s.sendall(b"all of it")
    s.shutdown(socket.SHUT_WR)
    whole = b"".join(iter(lambda: s.recv(4096), b""))
    print(whole.decode().strip() == "9 " + hashlib.sha256(b"all of it").hexdigest())

def reset(host):
    s = tcp(host, 14)
    s.sendall(b"x")
    try:
        while s.recv(100):
            pass
        print("FIN")
    except OSError as error:
        print(errno.errorcode[error.errno])

def echo(host, mebibytes):
    s = tcp(host, 7)
    block, sent, got, count = os.urandom(1 << 20), hashlib.sha256(), hashlib.sha256(), 0
    def send():
        for _ in range(mebibytes):
            s.sendall(block)
        s.shutdown(socket.SHUT_WR)
    sender = threading.Thread(target=send)
    sender.start()
    s.settimeout(60)
    while piece := s.recv(1 << 20):
        got.update(piece)
        count += len(piece)
    for _ in range(mebibytes):
        sent.update(block)
    sender.join()
    print(count, sent.digest() == got.digest())

def many(host, number):
    sockets = [tcp(host, 7) for _ in range(number)]
    for i, s in enumerate(sockets):
        s.sendall(b"%d" % i)
    print(sum(s.recv(100) == b"%d" % i for i, s in enumerate(sockets)))

def peer(host):
    print(tcp(host, 7).getpeername() == (socket.gethostbyname(host), 7))

def interrupted(host):
    """A signal with a handler comes while connecting: the call goes on, as SA_RESTART promises."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.siginterrupt(signal.SIGALRM, False)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    address = (socket.gethostbyname(host), 7)
    came = 0
    for _ in range(50):
        with socket.socket() as s:
            s.connect(address)
            s.sendall(b"x")
            came += s.recv(1) == b"x"
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(came == 50)

def beside(silent, host):
    """A destination that does not answer in one thread, and one that does in another."""
    begun, failed = time.time(), []
    def wait():
        try:
            tcp(silent, 80)
        except OSError as error:
            failed.append(error.errno)
    waiting = threading.Thread(target=wait)
    waiting.start()
    came = []
    for i in range(20):
        s = tcp(host, 7)
        s.sendall(b"%d" % i)
        came.append(s.recv(9) == b"%d" % i)
    print(all(came), time.time() - begun < 2, bool(failed), end=" ")
    waiting.join()
    print(failed in ([errno.EHOSTUNREACH], [errno.ETIMEDOUT]))

def unknown(host):
    begun = time.time()
    try:
        print(socket.gethostbyname(host))
    except socket.gaierror:
        print("no such name", "at once" if time.time() - begun < 3 else "late")

def outside(host):
    print(bool(socket.gethostbyname(host)))

def io_uring():
    result = ctypes.CDLL(None, use_errno=True).syscall(425, 8, 0)
    print(errno.errorcode[ctypes.get_errno()] if result < 0 else result)

def cut(host):
    """Its connection is ended while it waits; what it opens after that has no way."""
    s = tcp(host, 7)
    address = s.getpeername()
    s.sendall(b"x")
    print(s.recv(1).decode(), flush=True)
    came = []
    for call in (lambda: s.recv(1), lambda: tcp(*address)):
        try:
            came.append(str(call()))
        except OSError as error:
            came.append(errno.errorcode[error.errno])
    print(*came)

for call in sys.argv[1:]:
    eval(call)
    sys.stdout.flush()
