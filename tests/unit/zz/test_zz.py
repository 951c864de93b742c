import socket, asyncio
def test_a(): socket.create_connection(("127.0.0.1", 1))
async def test_b(): await asyncio.open_connection("127.0.0.1", 1)
def test_c(): socket.getaddrinfo("x", 1)
