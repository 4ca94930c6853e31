"""usage: websocket_peer.py serve NAME [ADDRESS] (prints its port) | call ADDRESS (as ada and as eve)"""
import asyncio
import sys

import websockets


async def serve(name, address="127.0.0.1:0"):
    async def echo(socket):
        await socket.send(name)
        async for message in socket:
            await socket.send(message)

    host, port = address.split(":")
    server = await websockets.serve(echo, host, int(port), max_size=None)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.Future()


async def call(address):
    for user, name in (("ada", "local"), ("eve", "app")) * 3:
        uri = f"ws://{address}/chat"
        async with websockets.connect(uri, extra_headers={"x-tp-user": user}, max_size=None) as socket:
            assert await socket.recv() == name
            for message in ("text", b"\0" * 300000, "", b"\xff"):
                await socket.send(message)
                assert await socket.recv() == message
            await (await socket.ping())


asyncio.run({"serve": serve, "call": call}[sys.argv[1]](*sys.argv[2:]))
