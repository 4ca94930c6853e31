"""Non-blocking socket calls on one event loop, each printing what came of it. Arguments are the calls."""
import asyncio, errno, socket, sys, time

async def echo(host, text):
    reader, writer = await asyncio.open_connection(host, 7)
    writer.write(text)
    writer.write_eof()
    back = await reader.read(-1)
    writer.close()
    return back == text

async def one(host):
    print(await echo(host, b"once"))

async def many(host, number):
    begun = time.time()
    came = await asyncio.gather(*(echo(host, b"%d" % i * 100) for i in range(number)))
    print(sum(came), "together" if time.time() - begun < 20 else "late")

async def failure(host, port):
    begun = time.time()
    try:
        await asyncio.open_connection(host, port)
        print("connected")
    except OSError as error:
        print(errno.errorcode.get(error.errno, error), "at once" if time.time() - begun < 2 else "late")

async def beside(silent, host):
    """A destination that does not answer, and one that does, in one loop."""
    begun = time.time()
    async def wait():
        try:
            await asyncio.open_connection(silent, 80)
            return "connected"
        except OSError as error:
            return errno.errorcode.get(error.errno, str(error))
    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    came = [await echo(host, b"x") for _ in range(20)]
    soon = time.time() - begun < 2
    print(all(came), soon, waiting.done(), end=" ")
    print(await waiting in ("EHOSTUNREACH", "ETIMEDOUT"))

async def progress(host, port):
    """What a bare non-blocking socket sees, step by step."""
    loop = asyncio.get_running_loop()
    s = socket.socket()
    s.setblocking(False)
    address = (socket.gethostbyname(host), port)
    print(errno.errorcode[s.connect_ex(address)], end=" ")
    writable = loop.create_future()
    loop.add_writer(s, lambda: writable.done() or writable.set_result(None))
    await asyncio.wait_for(writable, 10)
    loop.remove_writer(s)
    number = s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    print(errno.errorcode.get(number, number), s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), end=" ")
    print("no peer" if number else s.getpeername() == address)

async def run():
    for call in sys.argv[1:]:
        await eval(call)
        sys.stdout.flush()

asyncio.run(run())
