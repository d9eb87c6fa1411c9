"""A proxy between client and server that cuts, stalls and refuses connections."""

import contextlib
import socket
import threading


class Proxy:
    """Forwards TCP connections to a server's socket until it is told otherwise."""

    def __init__(self, host, port):
        self.host, self.server_port = host, port
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.open = True
        self.stalled = threading.Event()
        self.stalled.set()
        self.pairs = []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            if not self.open:
                client.close()
                continue
            try:
                if self.host.startswith("/"):
                    server = socket.socket(socket.AF_UNIX)
                    server.connect(f"{self.host}/.s.PGSQL.{self.server_port}")
                else:
                    server = socket.create_connection((self.host, self.server_port))
            except OSError:
                client.close()
                continue
            self.pairs.append((client, server))
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self.forward, args=(source, target), daemon=True).start()

    def forward(self, source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.stalled.wait()
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self):
        for pair in self.pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.stalled.set()
        self.listener.close()
        for pair in self.pairs:
            for end in pair:
                end.close()
